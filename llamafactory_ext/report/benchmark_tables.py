"""The tables of benchmarks: what the models reach, and paired tests (arXiv 2405.21040, Table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..evaluation.harness_results import HarnessResults, TaskScore
from ..sweep.results import SweepResults
from .benchmarks import AVERAGE, BenchmarkComparison, Measured, average, measured, results_of
from .look import Look
from .table import SIGNIFICANT, Group
from .tabular import STRONG, Entry, Row, Table
from .words import (
    SETTING,
    bounds,
    number,
    number_interval,
    percent,
    percent_interval,
    setting,
    shown_setting,
    signed,
    with_interval,
)


def benchmarks_table(results: SweepResults, found: Sequence[Group], look: Look) -> Table:
    """A row per group, the untrained models first; a column per task, and the average."""
    untrained = [
        ((f"{base.name}, untrained", "", ""), {"method": f"{base.name}, untrained"}, results_of([base]))
        for base in results.bases
        if base.benchmarks
    ]
    trained = [
        (shown_setting(group, look), setting(group), results_of(group.cells))
        for group in found
        if results_of(group.cells)
    ]
    rows = [*untrained, *trained]
    tasks = rows[0][2][0].tasks
    shares = {task: is_share([each for _, _, runs in rows for each in runs], task) for task in tasks}
    shares[AVERAGE] = all(shares.values())
    shown, data = [], []
    for named, about, runs in rows:
        scores = {**{task: measured(runs, task) for task in tasks}, AVERAGE: average(runs)}
        entries = [*named, *(_shown(score, share=shares[task]) for task, score in scores.items())]
        shown.append(Row(tuple(map(Entry, entries))))
        data.append(about | {name: value for task, score in scores.items() for name, value in _data(task, score)})
    return Table(
        "benchmarks",
        "Benchmarks",
        f"Tasks of lm-evaluation-harness, {'in percent, ' if shares[AVERAGE] else ''}as means over seeds. Below each, "
        "its 95% interval for the number of examples of one run: Wilson's where examples are right or wrong, otherwise "
        "Student's. After Table 3 of arXiv 2405.21040.",
        (*SETTING, *(_head(task, score) for task, score in tasks.items()), AVERAGE),
        tuple(shown),
        tuple(data),
    )


def is_share(runs: Sequence[HarnessResults], task: str) -> bool:
    """Whether all values are from 0 to 1, so that they are told in percent."""
    return all(0 <= value <= 1 for run in runs for value in run.tasks[task].rows.values())


def _head(task: str, score: TaskScore) -> str:
    shots = "" if score.shots is None else f"\n{score.shots} {'shot' if score.shots == 1 else 'shots'}"
    return f"{task}\n{score.metric}{shots}"


def _shown(score: Measured, *, share: bool) -> str:
    value, interval = (
        (percent(score.value), percent_interval(score.interval))
        if share
        else (number(score.value), number_interval(score.interval))
    )
    return f"{value}\n({interval})" if interval else value


def _data(task: str, score: Measured) -> list[tuple[str, float | None]]:
    return [(task, score.value), *bounds(task, score.interval).items()]


# --- tests -----------------------------------------------------------------------------------------------------------


def benchmark_tests_table(comparisons: Sequence[BenchmarkComparison], look: Look) -> Table:
    shares = _shares(comparisons)
    unit = "Means are in percent, differences in points. " if all(shares.values()) else ""
    return Table(
        "benchmark_tests",
        "Tests on benchmarks",
        "Each method against the loss without refinement (other losses: against DPO) with the same settings and seeds, "
        f"example by example. {unit}Intervals are Student's 95% over examples; the average combines the tasks'. "
        "“Better on” counts the examples with a higher value. p is from a two-sided sign-flip test over examples; in "
        "a task whose examples are right or wrong, with one seed, this is McNemar's exact test. Holm's correction is "
        f"over all {len(comparisons)} tests; corrected p-values below {SIGNIFICANT} are bold. For Table 3 of arXiv "
        "2405.21040.",
        (
            *(*SETTING, "task", "method's", "other's", "difference"),
            *("better\non", "worse\non", "p", "p\n(Holm)"),
        ),
        tuple(_test_row(each, look, share=shares[each.task]) for each in comparisons),
        tuple(
            {
                **setting(each.group),
                "against": each.baseline.method,
                "task": each.task,
                "value": each.ours,
                "value of the other": each.theirs,
                "difference": each.difference.value,
                **bounds("difference", each.difference.interval),
                "examples better": each.better,
                "examples worse": each.worse,
                "p": each.p,
                "p (Holm)": each.p_holm,
            }
            for each in comparisons
        ),
    )


def _shares(comparisons: Sequence[BenchmarkComparison]) -> Mapping[str, bool]:
    runs = results_of([cell for each in comparisons for group in (each.group, each.baseline) for cell in group.cells])
    shares = {each.task: is_share(runs, each.task) for each in comparisons if each.task != AVERAGE}
    return shares | {AVERAGE: all(shares.values())}


def _test_row(each: BenchmarkComparison, look: Look, *, share: bool) -> Row:
    """The setting stands beside the first task only."""
    first = each.task == next(iter(results_of(each.group.cells)[0].tasks))
    against = look.labels[each.baseline.variant]
    method, *others = shown_setting(each.group, look)
    named: tuple[str, ...] = (f"{method}\nagainst {against}", *others) if first else ("",) * 3
    value = percent if share else number
    points = (lambda x: signed(f"{100 * x:+.1f}")) if share else number
    shown = (
        *named,
        each.task,
        value(each.ours),
        value(each.theirs),
        with_interval(points(each.difference.value), " to ".join(map(points, each.difference.interval or ()))),
        f"{each.better:,}",
        f"{each.worse:,}",
        f"{each.p:.2g}",
    )
    corrected = Entry(f"{each.p_holm:.2g}", STRONG if each.p_holm < SIGNIFICANT else "")
    return Row((*map(Entry, shown), corrected))
