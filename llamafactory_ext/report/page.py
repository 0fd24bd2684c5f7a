"""`llamafactory-ext report`: the page, its figures as files, and its tables as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..plots import CURVES, save
from ..sweep.results import Result, SweepResults, read_results
from ..training.monitors import PER_TOKEN, stopped_at
from ..whole_files import write_whole
from .figures import (
    UNREFINED,
    coefficient_figure,
    refinement_figure,
    reward_figure,
    reward_list_figure,
    score_figure,
    score_list_figure,
    sizes_figure,
)
from .table import Comparison, Group, check_problems, compare_with_dpo, degenerated, final, groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 96
TEMPLATE = Path(__file__).with_name("page.html.j2")
COEFFICIENT = ("sigmoid", "minor_dpo", "dpop", "sr_dpo")  # the log-sigmoid losses, which have one


@dataclass(frozen=True)
class Section:
    """A figure of the page.

    Args:
        name: of its files.
        title, caption: above and below it.
        image: the figure, as the address of an image that holds it.
        width: its natural one, in pixels of the page.
    """

    name: str
    title: str
    caption: str
    image: str
    width: int


def write_report(folder: Path, output: Path) -> Path:
    """Write the page of a sweep, and each figure as PNG and SVG and the cells and tests as CSV beside it.

    Args:
        folder: the sweep's.
        output: a folder.

    Raises:
        UserError: if the folder is not that of a sweep, or its cells were scored on different problems.
    """
    results = read_results(folder)
    check_problems([*results.bases, *results.cells])
    found = groups([cell for cell in results.cells if cell.recipe])
    comparisons = compare_with_dpo(found)
    sections = [_written(output, *figure) for figure in _figures(results, found)]
    _write_csv(output / "cells.csv", [_row(cell) for cell in [*results.bases, *results.cells]])
    _write_csv(output / "tests.csv", [_test_row(comparison) for comparison in comparisons])
    write_whole(output / "index.html", _render(results, found, comparisons, sections))
    return output / "index.html"


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(results: SweepResults, found: Sequence[Group]) -> Iterator[tuple[str, str, str, Figure]]:
    """name, title, caption and figure, for all that the sweep has something for."""
    several_sizes = len({group.size for group in found if group.size}) > 1
    sized = [group for group in found if group.size and several_sizes]  # these have a figure of their own
    others = [group for group in found if group not in sized]
    base = _base_accuracy(results)
    swept, single = _on_several_betas(others)
    for name, title, scores in (
        ("scores", "Accuracy", score_figure(swept, base)),
        ("scores_single", "Accuracy at one beta", score_list_figure(single, base)),
    ):
        if scores is not None:
            yield (
                name,
                title,
                "Strict accuracy with Wilson's 95% interval for one run's number of problems; dots are seeds. "
                "After Figure 6 of arXiv 2408.09834.",
                scores,
            )
    for rate in sorted({group.learning_rate for group in found}):
        for ending, members, draw in (("", swept, reward_figure), ("_single", single, reward_list_figure)):
            figure = draw([group for group in members if group.learning_rate == rate], f"learning rate {rate:g}")
            if figure is not None:
                yield (
                    f"rewards_lr{rate:g}{ending}",
                    f"Normalized rewards, learning rate {rate:g}{', at one beta' if ending else ''}",
                    "Log-ratios to the reference in nats, free of β: thin lines are seeds, thick ones their mean. "
                    "After Figures 2 to 5 of arXiv 2408.09834.",
                    figure,
                )
    yield from _refinement_figures(others)
    sizes = sizes_figure(sized)
    if sizes is not None:
        yield (
            "sizes",
            "Number of pairs",
            "Means over seeds. After Figures 2 and 3 of arXiv 2405.21040.",
            sizes,
        )
    betas = sorted({group.beta for group in found if group.cells[0].loss in COEFFICIENT})
    if betas:
        yield (
            "coefficient",
            "Coefficient",
            "Left: the factor before DPO's gradient. Right: the gradient of the losses with respect to a rejected "
            "answer's log-probability, where the chosen answer is as likely as under the reference: MinorDPO's stops "
            "at 0. After Figure 1 of arXiv 2408.09834.",
            coefficient_figure(betas),
        )


def _on_several_betas(found: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The groups of methods that the sweep has on more than one beta, and the others."""
    betas: dict[str, set[float]] = {}
    for group in found:
        betas.setdefault(group.method, set()).add(group.beta)
    swept = [group for group in found if len(betas[group.method]) > 1]
    return swept, [group for group in found if len(betas[group.method]) == 1]


def _refinement_figures(found: Sequence[Group]) -> Iterator[tuple[str, str, str, Figure]]:
    logged = [group for group in found if any(cell.log_history for cell in group.cells)]
    refined = [group for group in logged if group.cells[0].loss in UNREFINED]
    for rate, beta in sorted({(group.learning_rate, group.beta) for group in refined}):
        members = [g for g in logged if (g.learning_rate, g.beta) == (rate, beta)]
        by_loss = {loss: [g for g in members if g.cells[0].loss == loss] for loss in (*UNREFINED, *UNREFINED.values())}
        families = [by_loss[plain] + by_loss[loss] for loss, plain in UNREFINED.items() if by_loss[loss]]
        yield (
            f"refinement_lr{rate:g}_beta{beta:g}",
            f"Self-refinement, learning rate {rate:g}, β = {beta:g}",
            "Margins, the share of pairs with a margin above 0, and margins under the augmented prompt, as means over "
            "seeds. After Figure 1 of arXiv 2405.21040.",
            refinement_figure(families),
        )


def _written(output: Path, name: str, title: str, caption: str, figure: Figure) -> Section:
    for suffix in (".png", ".svg"):
        save(figure, output / f"{name}{suffix}")
    content = base64.b64encode((output / f"{name}.svg").read_bytes()).decode()
    width = round(PIXELS_PER_INCH * float(figure.get_figwidth()))
    return Section(name, title, caption, f"data:image/svg+xml;base64,{content}", width)


def _base_accuracy(results: SweepResults) -> float | None:
    """The untrained model's accuracy, where there is one such model."""
    scored = [base.summary["strict"]["accuracy"] for base in results.bases if base.summary]
    return scored[0] if len(scored) == 1 else None


# --- tables ----------------------------------------------------------------------------------------------------------


def _row(cell: Result) -> dict[str, Any]:
    history = cell.log_history
    summary = cell.summary
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
        "degenerating": degenerated(history),
        "stopped at step": stopped_at(history),
        "strict": summary["strict"]["accuracy"] if summary else None,
        "wilson low": summary["strict"]["wilson_95"][0] if summary else None,
        "wilson high": summary["strict"]["wilson_95"][1] if summary else None,
        "unanswered": summary["missing"] if summary else None,
        "flexible": summary["flexible"]["accuracy"] if summary else None,
        "degenerate outputs": summary["degeneration"]["degenerate"] if summary else None,
        "cut off": summary["degeneration"]["cut_off"] if summary else None,
        "held-out margin": cell.pairs.means.get("margin") if cell.pairs else None,
        "held-out accuracy": cell.pairs.accuracy if cell.pairs else None,
        "held-out augmented accuracy": cell.pairs.augmented_accuracy if cell.pairs else None,
    }


def _test_row(comparison: Comparison) -> dict[str, Any]:
    group = comparison.group
    return {
        "method": group.method,
        "learning rate": group.learning_rate,
        "beta": group.beta,
        "accuracy": comparison.accuracy,
        "accuracy of DPO": comparison.baseline_accuracy,
        "difference": comparison.difference,
        "problems better": comparison.better,
        "problems worse": comparison.worse,
        "p": comparison.p,
        "p (Holm)": comparison.p_holm,
    }


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


# --- the page --------------------------------------------------------------------------------------------------------


def _render(
    results: SweepResults, found: Sequence[Group], comparisons: Sequence[Comparison], sections: Sequence[Section]
) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "number": _number, "duration": _duration}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        about=results.about,
        axes=yaml.safe_dump(results.about["sweep"]["axes"], sort_keys=False),
        recipe=_shared_recipe(results.cells),
        bases=results.bases,
        cells=results.cells,
        states=_states(results.cells),
        groups=found,
        betas=sorted({group.beta for group in found}),
        rates=sorted({group.learning_rate for group in found}),
        comparisons=comparisons,
        sections=sections,
        final=final,
        stopped_at=stopped_at,
    )


def _states(cells: Sequence[Result]) -> dict[str, int]:
    """How many cells are in which state: that of the first command that is not done."""
    states: dict[str, int] = {}
    for cell in cells:
        unfinished = [record.state for record in cell.records.values() if record.state != "done"]
        state = unfinished[0] if unfinished else "done" if cell.is_trained else "missing"
        states[state] = states.get(state, 0) + 1
    return states


def _shared_recipe(cells: Sequence[Result]) -> str:
    """What all recipes have in common, as YAML."""
    recipes = [cell.recipe for cell in cells if cell.recipe]
    if not recipes:
        return ""
    shared = {key: value for key, value in recipes[0].items() if all(recipe.get(key) == value for recipe in recipes)}
    return str(yaml.safe_dump(shared, sort_keys=False, allow_unicode=True))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
