"""The figures of a sweep whose horizontal axis is the training step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..plots import CURVES, legend_below, new_figure
from .look import Look
from .table import Group
from .variants import UNREFINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # step, value
PANEL = 2.6  # inches
LINE = 0.17  # inches of a line of text
COLUMNS = 5
ROW_WIDTH, TITLE_WIDTH = 20, 22  # characters that fit beside a panel, and above it

# Metric -> its axis, and whether that is logarithmic.
TRAINING = {
    "loss": ("loss", True),
    "grad_norm": ("gradient norm", True),
    "rewards/accuracies": ("training accuracy", False),
}
REFINEMENT = ("margin (nats)", "margin minus the unrefined loss's", "training accuracy", "augmented margin (nats)")


# --- rewards ---------------------------------------------------------------------------------------------------------


def reward_figure(groups: Sequence[Group], title: str, look: Look) -> Figure | None:
    """Normalized rewards over the steps: a row per method, a column per beta (arXiv 2408.09834, Figures 2 to 5).

    Thin lines are seeds, thick lines their mean. The panels of a row share a scale. None if no cell has logged any.
    """
    variants = list(dict.fromkeys(group.variant for group in groups if _has_rewards(group)))
    if not variants:
        return None
    betas = sorted({group.beta for group in groups if group.variant in variants})
    places = {(group.variant, group.beta): group for group in groups}
    rows = [[places.get((variant, beta)) for beta in betas] for variant in variants]
    figure, grid = _reward_panels(rows, title, sharey="row")
    for variant, row, members in zip(variants, grid, rows, strict=True):
        first = next(axes for axes, group in zip(row, members, strict=True) if group is not None)
        first.set_ylabel(f"{look.wrapped(variant, ROW_WIDTH)}\nlog-ratio (nats)")
        first.tick_params(labelleft=True)
    for axes, beta in zip(grid[0], betas, strict=True):
        axes.set_title(f"β = {beta:g}")
    return figure


def reward_list_figure(groups: Sequence[Group], title: str, look: Look) -> Figure | None:
    """The same for methods that are on one beta each: a panel per group, all on one scale."""
    groups = [group for group in groups if _has_rewards(group)]
    if not groups:
        return None
    columns = min(COLUMNS, len(groups))
    panels = [*groups, *[None] * (-len(groups) % columns)]
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    titles = [f"{look.wrapped(group.variant, TITLE_WIDTH)}\nβ = {group.beta:g}" for group in groups]
    lines = max(text.count("\n") + 1 for text in titles)
    figure, grid = _reward_panels(rows, title, sharey="all", lines=lines)
    for axes, text in zip(grid.flat, titles, strict=False):
        axes.set_title(text, fontsize="medium")
    for row in grid:
        row[0].set_ylabel("log-ratio (nats)")
    return figure


def _has_rewards(group: Group) -> bool:
    return bool(_runs(group, "normalized_rewards/chosen"))


def _reward_panels(
    rows: Sequence[Sequence[Group | None]], title: str, sharey: Literal["row", "all"], lines: int = 1
) -> tuple[Figure, NDArray[Any]]:
    """A panel per group: nothing where the sweep has none, "missing" where it has one that logged nothing.

    Args:
        lines: of text above each panel.
    """
    height = 0.85 * PANEL + LINE * (lines - 1)
    figure = new_figure(PANEL * len(rows[0]) + 0.8, height * len(rows) + 0.6)
    grid = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=sharey, squeeze=False)
    for axes, group in zip(grid.flat, itertools.chain.from_iterable(rows), strict=True):
        if group is None:
            axes.set_axis_off()
        elif _has_rewards(group):
            axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            _draw_rewards(axes, group)
        else:
            _mark_missing(axes)
    for column in grid.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("step")
        lowest.tick_params(labelbottom=True)
    legend_below(figure)
    figure.align_ylabels()
    figure.suptitle(title)
    return figure, grid


def _draw_rewards(axes: Axes, group: Group) -> None:
    for curve, color in CURVES.items():
        _draw_runs(axes, _runs(group, f"normalized_rewards/{curve}"), color, curve.removesuffix("s"))


def _draw_runs(axes: Axes, runs: Sequence[Points], color: str, label: str, width: float = 1.5) -> None:
    """A thin line per seed, where there are several, and a thick one for their mean."""
    if len(runs) > 1:
        for points in runs:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.4)
    mean = _mean_curve(runs)
    marker = "o" if len(mean) == 1 else None  # a line through one point is invisible
    if mean:
        axes.plot(*zip(*mean, strict=True), color=color, label=label, linewidth=width, marker=marker)


def _mark_missing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes, color="0.4")


def _runs(group: Group, metric: str) -> list[Points]:
    """A metric over the steps, of each seed that has logged it."""
    runs = ([(log["step"], log[metric]) for log in cell.log_history if metric in log] for cell in group.cells)
    return [points for points in runs if points]


def _mean_curve(runs: Sequence[Points]) -> Points:
    """The mean of runs at the steps that all of them have logged."""
    if not runs:
        return []
    values = [dict(points) for points in runs]
    steps = sorted(set.intersection(*(set(points) for points in values)))
    return [(step, float(np.mean([points[step] for points in values]))) for step in steps]


# --- training --------------------------------------------------------------------------------------------------------


def training_figure(groups: Sequence[Group], title: str, look: Look) -> Figure | None:
    """Loss, gradient norm and training accuracy over the steps: a row each, a column per beta, a line per method.

    Thin lines are seeds, thick lines their mean. The panels of a row share a scale. None if no cell has logged any.
    """
    metrics = [metric for metric in TRAINING if any(_runs(group, metric) for group in groups)]
    if not metrics:
        return None
    betas = sorted({group.beta for group in groups})
    figure = new_figure(max(6.0, PANEL * len(betas) + 0.8), 0.85 * PANEL * len(metrics) + 0.6)
    grid = figure.subplots(len(metrics), len(betas), sharex=True, sharey="row", squeeze=False)
    for row, metric in zip(grid, metrics, strict=True):
        for axes, beta in zip(row, betas, strict=True):
            for group in groups:
                if group.beta == beta:
                    _draw_runs(axes, _runs(group, metric), look.colors[group.variant], look.labels[group.variant])
            if not axes.get_lines():
                _mark_missing(axes)
        label, logarithmic = TRAINING[metric]
        row[0].set_ylabel(label)
        if logarithmic and _spans_decades([value for g in groups for run in _runs(g, metric) for _, value in run]):
            _make_logarithmic(row[0])
    for axes, beta in zip(grid[0], betas, strict=True):
        axes.set_title(f"β = {beta:g}")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    legend_below(figure)
    figure.align_ylabels()
    figure.suptitle(title)
    return figure


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether small values would lie on the axis: all are above 0, and the largest is 30 times the smallest or more."""
    finite = [value for value in values if np.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= 30 * min(finite)


def _make_logarithmic(axes: Axes) -> None:
    """A logarithmic axis whose ticks read 0.5, 1, 2."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


# --- refinement ------------------------------------------------------------------------------------------------------


def refinement_figure(families: Sequence[Sequence[Group]], look: Look) -> Figure:
    """What the refinement does over the steps, as means over seeds (arXiv 2405.21040, Figure 1): a row per loss.

    Args:
        families: of a loss, its group without refinement if there is one, then those with it, of one learning rate and
            beta; with logs.
        look: of the sweep.
    """
    figure = new_figure(3.4 * len(REFINEMENT), 3.0 * len(families))
    for row, family in zip(figure.subplots(len(families), len(REFINEMENT), squeeze=False), families, strict=True):
        plain = family[0] if family[0].variant.loss not in UNREFINED else None
        for group in family:
            width = 3.5 if group is plain else 1.2  # visible where the others lie on it
            for axes, points in zip(row, _refinement_curves(group, plain), strict=True):
                if points:
                    label = look.wrapped(group.variant, TITLE_WIDTH)
                    color = look.colors[group.variant]
                    axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=width)
        for axes, title in zip(row, REFINEMENT, strict=True):
            axes.set_title(title, fontsize="medium")
            axes.set_xlabel("step")
            if not axes.get_lines():
                _mark_missing(axes)
                axes.set_xticks([])
                axes.set_yticks([])
        if row[0].get_lines():
            row[0].legend(frameon=False, fontsize="x-small")
    return figure


def _refinement_curves(group: Group, plain: Group | None) -> list[Points]:
    """A curve per panel of `REFINEMENT`, empty where there is none."""
    margins = _mean_curve(_runs(group, "normalized_rewards/margins"))
    others = dict(_mean_curve(_runs(plain, "normalized_rewards/margins"))) if plain and plain is not group else {}
    return [
        margins,
        [(step, margin - others[step]) for step, margin in margins if step in others],
        _mean_curve(_runs(group, "rewards/accuracies")),
        _mean_curve(_runs(group, "sr/augmented_margins")),
    ]
