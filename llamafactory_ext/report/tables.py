"""What stands in the tables of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..plots import CURVES
from ..sweep.results import Result, SweepResults
from ..training.monitors import PER_TOKEN, stopped_at
from .benchmark_tables import benchmark_tests_table, benchmarks_table
from .benchmarks import compare_benchmarks
from .chosen import chosen_table
from .correlations import correlations, correlations_table
from .judged import WinRates, win_rates_table
from .look import Look
from .table import SIGNIFICANT, Comparison, Group, degenerated, final
from .tabular import STRONG, Entry, Row, Table
from .words import (
    SETTING,
    bounds,
    duration,
    number,
    number_interval,
    percent,
    percent_interval,
    setting,
    shown_setting,
    signed,
)


def tables(
    results: SweepResults,
    found: Sequence[Group],
    comparisons: Sequence[Comparison],
    look: Look,
    rates: Sequence[WinRates] = (),
) -> Iterator[Table]:
    """All tables of the page but those of claims, in its order. That of the tests may have no rows."""
    if results.about.get("chosen"):
        yield chosen_table(results.about["chosen"])
    if any(group.degenerate is not None or group.flagged for group in found):
        yield degeneration_table(results, found, look)
    yield tests_table(comparisons, look)
    if any(group.held_out for group in found):
        yield pairs_table(results, found, look)
    if rated := correlations(found):
        yield correlations_table(rated, look)
    if rates:
        yield win_rates_table(rates, look)
    if any(each.benchmarks for each in (*results.bases, *results.cells)):
        yield benchmarks_table(results, found, look)
        if tested := compare_benchmarks(found):
            yield benchmark_tests_table(tested, look)
    yield cells_table(results)


# --- degeneration ----------------------------------------------------------------------------------------------------


def degeneration_table(results: SweepResults, found: Sequence[Group], look: Look) -> Table:
    """A row per method and learning rate, a column per beta."""
    betas = sorted({group.beta for group in found})
    places = {(group.learning_rate, group.variant, group.beta): group for group in found}
    settings = dict.fromkeys((group.learning_rate, group.variant) for group in found)
    rows = [
        Row(tuple(map(Entry, (f"{base.name}, untrained", "", *[percent(_degenerate(base))] * len(betas)))))
        for base in results.bases
        if base.summary
    ]
    for rate, variant in sorted(settings, key=lambda setting: setting[0]):
        entries = [_flagged_entry(places.get((rate, variant, beta))) for beta in betas]
        rows.append(Row((Entry(look.labels[variant]), Entry(f"{rate:g}"), *entries)))
    return Table(
        "degeneration",
        "Degeneration",
        "Share of outputs that are empty, loop or repeat themselves, in percent. Compare with the untrained model, "
        "which has such outputs, too. “2 flagged” means that the monitor found two runs degenerating at their end: "
        "chosen and rejected responses were both less likely than under the reference, by over 0.5 nats per token.",
        (*SETTING[:2], *(f"β = {beta:g}" for beta in betas)),
        tuple(rows),
        tuple(
            {
                **setting(group),
                "degenerate outputs": group.degenerate,
                "flagged runs": group.flagged,
                "runs": len(group.cells),
            }
            for group in found
        ),
    )


def _degenerate(result: Result) -> float | None:
    return result.summary["degeneration"]["degenerate"] if result.summary else None


def _flagged_entry(group: Group | None) -> Entry:
    if group is None:
        return Entry("")
    share = percent(group.degenerate)
    if not group.flagged:
        return Entry(share)
    return Entry(f"{share} ({group.flagged} flagged)" if share else f"{group.flagged} flagged", "failed")


# --- tests -----------------------------------------------------------------------------------------------------------


def tests_table(comparisons: Sequence[Comparison], look: Look) -> Table:
    caption = (
        "Each method against DPO with the same settings and seeds. Accuracies are in percent, the difference is in "
        "points. “Better on” counts the problems that the method solves more often than DPO. p is from a two-sided "
        "sign-flip test over problems; with one seed, this is McNemar's exact test. Holm's correction is over all "
        f"{len(comparisons)} tests; corrected p-values below {SIGNIFICANT} are bold."
    )
    nothing = "There is nothing to test: no scored method has a scored DPO cell with the same settings."
    return Table(
        "tests",
        "Tests against DPO",
        caption if comparisons else nothing,
        (*SETTING, "accuracy", "DPO", "difference", "better on", "worse on", "p", "p (Holm)"),
        tuple(_test_row(comparison, look) for comparison in comparisons),
        tuple(
            {
                **setting(c.group),
                "accuracy": c.accuracy,
                "accuracy of DPO": c.baseline_accuracy,
                "difference": c.difference,
                "problems better": c.better,
                "problems worse": c.worse,
                "p": c.p,
                "p (Holm)": c.p_holm,
            }
            for c in comparisons
        ),
    )


def _test_row(comparison: Comparison, look: Look) -> Row:
    shown = (
        *shown_setting(comparison.group, look),
        percent(comparison.accuracy),
        percent(comparison.baseline_accuracy),
        signed(f"{100 * comparison.difference:+.1f}"),
        str(comparison.better),
        str(comparison.worse),
        f"{comparison.p:.2g}",
    )
    corrected = Entry(f"{comparison.p_holm:.2g}", STRONG if comparison.p_holm < SIGNIFICANT else "")
    return Row((*map(Entry, shown), corrected))


# --- held-out pairs --------------------------------------------------------------------------------------------------


def pairs_table(results: SweepResults, found: Sequence[Group], look: Look) -> Table:
    asked = results.about["sweep"].get("evaluators", {}).get("pairs") or {}
    rows, data = [], []
    for group in found:
        held_out = group.held_out
        if held_out is None:
            continue
        shown = (
            *shown_setting(group, look),
            f"{held_out.pairs:,}",
            number(held_out.margin),
            number_interval(held_out.margin_interval),
            percent(held_out.accuracy),
            percent_interval(held_out.accuracy_interval),
            percent(held_out.augmented),
            percent_interval(held_out.augmented_interval),
        )
        rows.append(shown)
        data.append(
            {
                **setting(group),
                "pairs": held_out.pairs,
                "margin": held_out.margin,
                **bounds("margin", held_out.margin_interval),
                "accuracy": held_out.accuracy,
                **bounds("accuracy", held_out.accuracy_interval),
                "augmented accuracy": held_out.augmented,
                **bounds("augmented accuracy", held_out.augmented_interval),
            }
        )
    heads = [
        *(*SETTING, "pairs", "margin", "95%", "accuracy", "95%"),
        *("augmented\naccuracy", "95%"),
    ]
    used = [place for place in range(len(heads)) if any(row[place] for row in rows)]  # of what the data has
    return Table(
        "pairs",
        "Held-out pairs",
        f"Data set: {asked.get('dataset', 'unknown')}. The margin is a mean in nats. Accuracy is the share of pairs "
        "with a margin above 0, in percent; augmented accuracy is the same under the augmented prompt. Intervals are "
        "95%, for the number of pairs of one run: Student's for the margin, Wilson's for accuracies. After Table 5 of "
        "arXiv 2405.21040.",
        tuple(heads[place] for place in used),
        tuple(Row(tuple(Entry(row[place]) for place in used)) for row in rows),
        tuple(data),
    )


# --- cells -----------------------------------------------------------------------------------------------------------


def cells_table(results: SweepResults) -> Table:
    everything = [*results.bases, *results.cells]
    return Table(
        "cells",
        "Cells",
        "Accuracies are in percent. Chosen, rejected and margin are final log-ratios in nats: means over the last "
        "tenth of a run's logs.",
        (
            *("cell", "training", "time", "scoring", "strict", "95%", "flexible", "no answer"),
            *("chosen", "rejected", "margin"),
        ),
        tuple(_cell_row(cell) for cell in everything),
        tuple(_cell_data(cell) for cell in everything),
    )


def anchor_of(cell: Result) -> str:
    return f"cell-{cell.name}"


def _cell_row(cell: Result) -> Row:
    trained, scored = cell.records.get("train"), cell.records.get("score")
    step = stopped_at(cell.log_history)
    training = trained.state if trained else "missing" if cell.recipe or cell.place else ""
    time = duration(trained.seconds) if trained else ""
    if trained and trained.resumed:
        time += " since it resumed"
    errors = [record.error for record in cell.records.values() if record.error]
    scores = [""] * 4
    if cell.summary:
        strict = cell.summary["strict"]
        scores = [
            percent(strict["accuracy"]),
            percent_interval(tuple(strict["wilson_95"])),
            percent(cell.summary["flexible"]["accuracy"]),
            str(cell.summary["missing"]),
        ]
    stopped = f"{training}: stopped at step {step}, degenerating"
    return Row(
        (
            Entry(cell.name),
            Entry(training if step is None else stopped, training),
            Entry(time),
            Entry(scored.state if scored else "", scored.state if scored else ""),
            *map(Entry, scores),
            *(Entry(number(final(cell.log_history, f"normalized_rewards/{curve}"))) for curve in CURVES),
        ),
        anchor_of(cell),
        "; ".join(errors),
    )


def _cell_data(cell: Result) -> dict[str, Any]:
    history, summary = cell.log_history, cell.summary
    trained = cell.records.get("train")
    curves = {f"final {curve}": final(history, f"normalized_rewards/{curve}") for curve in CURVES}
    return {
        "cell": cell.name,
        **cell.place,
        **{step: record.state for step, record in cell.records.items()},
        "error": "; ".join(record.error for record in cell.records.values() if record.error),
        "train seconds": trained.seconds if trained else None,
        "resumed": trained.resumed if trained else None,  # then the seconds are those since
        **curves,
        **{f"final {name.split('/')[1]}": final(history, name) for name in PER_TOKEN},
        "final loss": final(history, "loss"),
        "final gradient norm": final(history, "grad_norm"),
        "final training accuracy": final(history, "rewards/accuracies"),
        "degenerating": degenerated(history),
        "stopped at step": stopped_at(history),
        "strict": summary["strict"]["accuracy"] if summary else None,
        "wilson low": summary["strict"]["wilson_95"][0] if summary else None,
        "wilson high": summary["strict"]["wilson_95"][1] if summary else None,
        "unanswered": summary["missing"] if summary else None,
        "flexible": summary["flexible"]["accuracy"] if summary else None,
        "degenerate outputs": summary["degeneration"]["degenerate"] if summary else None,
        "cut off": summary["degeneration"]["cut_off"] if summary else None,
        "held-out pairs": cell.pairs.pairs if cell.pairs else None,
        "held-out margin": cell.pairs.means.get("margin") if cell.pairs else None,
        "held-out accuracy": cell.pairs.accuracy if cell.pairs else None,
        "held-out augmented accuracy": cell.pairs.augmented_accuracy if cell.pairs else None,
    }
