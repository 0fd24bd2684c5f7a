"""The figures of a sweep, after those of the two papers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..plots import CURVES, new_figure
from .table import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
Points = list[tuple[int, float]]  # step, value
PANEL = 2.6  # inches
COLUMNS = 5

UNREFINED = {"sr_dpo": "sigmoid", "sr_ipo": "ipo"}  # loss -> what it is without the refinement term
REFINEMENT = ("margin (nats)", "margin minus the unrefined's (nats)", "accuracy", "augmented margin (nats)")


def coefficient_figure(betas: Sequence[float]) -> Figure:
    """beta sigma(-argument) of DPO against the margin, per beta, and what each loss makes of a rejected answer.

    arXiv 2408.09834, Figure 1; the right panel is the gradient of the losses themselves.
    """
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    nats = np.linspace(-60, 60, 241)
    for beta, colour in zip(betas, _shades(len(betas)), strict=True):
        left.plot(nats, beta / (1 + np.exp(beta * nats)), color=colour, label=f"β = {beta:g}")
    left.set_xlabel("margin (nats)")
    left.set_title("coefficient β σ(-β margin)")
    left.legend(frameon=False)
    beta = betas[len(betas) // 2]
    for loss, label, hue in (("sigmoid", "DPO", COLOURS[0]), ("minor_dpo", "MinorDPO", COLOURS[1])):
        right.plot(nats, rejected_gradient(loss, nats, beta), color=hue, label=label)
    right.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    right.set_xlabel("log-ratio of the rejected answer (nats)")
    right.set_title(f"push on the rejected answer, β = {beta:g}")
    right.legend(frameon=False)
    return figure


def rejected_gradient(loss: str, nats: np.ndarray, beta: float) -> np.ndarray:
    """d loss / d log pi(rejected) at a chosen log-ratio of 0 and each of these rejected log-ratios, by autograd."""
    import torch

    from ..losses.lookup import get_loss
    from ..losses.pairs import PairLogps

    rejected = torch.tensor(nats, dtype=torch.float64, requires_grad=True)
    zeros, ones = torch.zeros_like(rejected), torch.ones_like(rejected)
    get_loss(loss)(PairLogps(zeros, rejected, zeros, zeros, ones, ones), beta=beta).sum().backward()
    assert rejected.grad is not None
    return rejected.grad.numpy()


def reward_figure(groups: Sequence[Group], title: str) -> Figure | None:
    """Normalized rewards over the steps: a row per method, a column per beta (arXiv 2408.09834, Figures 2 to 5).

    Thin lines are seeds, thick ones their mean. None if no cell has logged any.
    """
    methods = list(dict.fromkeys(group.method for group in groups if _has_rewards(group)))
    if not methods:
        return None
    betas = sorted({group.beta for group in groups if group.method in methods})
    places = {(group.method, group.beta): group for group in groups}
    rows = [[places.get((method, beta)) for beta in betas] for method in methods]
    figure, grid = _reward_panels(rows, title, sharey="row")
    for method, row, members in zip(methods, grid, rows, strict=True):
        first = next(axes for axes, group in zip(row, members, strict=True) if group is not None)
        first.set_ylabel(f"{method}\nlog-ratio (nats)")
        first.tick_params(labelleft=True)
    for axes, beta in zip(grid[0], betas, strict=True):
        axes.set_title(f"β = {beta:g}")
    return figure


def reward_list_figure(groups: Sequence[Group], title: str) -> Figure | None:
    """The same for methods that are on one beta each: a panel per group."""
    groups = [group for group in groups if _has_rewards(group)]
    if not groups:
        return None
    columns = min(COLUMNS, len(groups))
    panels = [*groups, *[None] * (-len(groups) % columns)]
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    figure, grid = _reward_panels(rows, title, sharey="all")
    for axes, group in zip(grid.flat, groups, strict=False):
        axes.set_title(f"{group.method}\nβ = {group.beta:g}", fontsize="medium")
    for row in grid:
        row[0].set_ylabel("log-ratio (nats)")
    return figure


def _has_rewards(group: Group) -> bool:
    return bool(_runs(group, "normalized_rewards/chosen"))


def _reward_panels(
    rows: Sequence[Sequence[Group | None]], title: str, sharey: Literal["row", "all"]
) -> tuple[Figure, NDArray[Any]]:
    """A panel per group: nothing where the sweep has none, and a word where it has but nothing was logged."""
    figure = new_figure(PANEL * len(rows[0]) + 0.6, 0.85 * PANEL * len(rows) + 0.6)
    grid = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=sharey, squeeze=False)
    for axes, group in zip(grid.flat, itertools.chain.from_iterable(rows), strict=True):
        if group is None:
            axes.set_axis_off()
        elif _has_rewards(group):
            axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            _draw_rewards(axes, group)
        else:
            axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes, color="0.4")
    for column in grid.T:
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("step")
        lowest.tick_params(labelbottom=True)
    handles, labels = next(axes for axes in grid.flat if axes.get_lines()[1:]).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure, grid


def _draw_rewards(axes: Axes, group: Group) -> None:
    for curve, colour in CURVES.items():
        runs = _runs(group, f"normalized_rewards/{curve}")
        if len(runs) > 1:
            for points in runs:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(*zip(*_mean_curve(runs), strict=True), color=colour, label=curve.removesuffix("s"))


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


def score_figure(groups: Sequence[Group], base: float | None) -> Figure | None:
    """Strict GSM8K accuracy with Wilson's intervals, a panel per learning rate (arXiv 2408.09834, Figure 6).

    Dots are seeds; the dashed line is the untrained model. None if nothing was scored.
    """
    scored = [group for group in groups if group.accuracy is not None]
    if not scored:
        return None
    rates = sorted({group.learning_rate for group in scored})
    methods = list(dict.fromkeys(group.method for group in scored))
    betas = sorted({group.beta for group in scored})
    width = max(4.0, 0.28 * len(methods) * len(betas) + 1.0)
    figure = new_figure(width * len(rates), 3.8)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for axes, rate in zip(panels, rates, strict=True):
        for number, method in enumerate(methods):
            place = (number - (len(methods) - 1) / 2) * 0.8 / len(methods)
            members = [g for g in scored if (g.method, g.learning_rate) == (method, rate)]
            _draw_bars(axes, members, betas, place, 0.8 / len(methods), COLOURS[number % len(COLOURS)], method)
        if base is not None:
            axes.axhline(100 * base, color="0.3", linestyle="--", linewidth=1, label="untrained")
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_xlabel("β")
        axes.set_title(f"learning rate {rate:g}")
    panels[0].set_ylabel("accuracy, strict (%)")
    panels[0].set_ylim(0, 100)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(2, int(width * len(rates) / 1.6)),
        frameon=False,
    )
    return figure


def _draw_bars(
    axes: Axes, groups: Sequence[Group], betas: Sequence[float], place: float, width: float, colour: str, label: str
) -> None:
    for group in groups:
        x = betas.index(group.beta) + place
        assert group.accuracy is not None
        axes.bar(x, 100 * group.accuracy, 0.92 * width, color=colour, label=label)
        axes.errorbar(x, 100 * group.accuracy, yerr=_errors(group), color="0.15", linewidth=1, capsize=2)
        shares = _shares(group)
        if len(shares) > 1:
            axes.scatter([x] * len(shares), shares, s=6, color="0.15", zorder=3)


def _errors(group: Group) -> list[list[float]]:
    """Wilson's interval as lengths, in per cent."""
    assert group.accuracy is not None
    assert group.wilson is not None
    low, high = group.wilson
    # At 0 and at 100 % a bound is off by the last bit, on the wrong side.
    return [[100 * max(0.0, group.accuracy - low)], [100 * max(0.0, high - group.accuracy)]]


def _shares(group: Group) -> list[float]:
    """Accuracies of the seeds, in per cent."""
    return [100 * cell.summary["strict"]["accuracy"] for cell in group.scored if cell.summary]


def score_list_figure(groups: Sequence[Group], base: float | None) -> Figure | None:
    """The same for methods that are on one beta each: a bar per group."""
    scored = [group for group in groups if group.accuracy is not None]
    if not scored:
        return None
    figure = new_figure(6.0, 0.32 * len(scored) + 1.4)
    axes = figure.subplots()
    settings = [f"learning rate {group.learning_rate:g}, β = {group.beta:g}" for group in scored]
    labels = [group.method for group in scored]
    if len(set(settings)) == 1:
        axes.set_title(settings[0], fontsize="medium")
    else:
        labels = [f"{method}\n{setting}" for method, setting in zip(labels, settings, strict=True)]
    for place, group in enumerate(scored):
        assert group.accuracy is not None
        axes.barh(place, 100 * group.accuracy, 0.7, color=COLOURS[0])
        axes.errorbar(100 * group.accuracy, place, xerr=_errors(group), color="0.15", linewidth=1, capsize=2)
        shares = _shares(group)
        if len(shares) > 1:
            axes.scatter(shares, [place] * len(shares), s=6, color="0.15", zorder=3)
    if base is not None:
        axes.axvline(100 * base, color="0.3", linestyle="--", linewidth=1, label="untrained")
        figure.legend(loc="outside lower center", frameon=False)
    axes.set_yticks(range(len(scored)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, strict (%)")
    return figure


def refinement_figure(families: Sequence[Sequence[Group]]) -> Figure:
    """What the refinement does over the steps, as means over seeds (arXiv 2405.21040, Figure 1): a row per loss.

    Args:
        families: of a loss, its group without refinement if there is one, then those with it, of one learning rate and
            beta; with logs.
    """
    figure = new_figure(3.4 * len(REFINEMENT), 3.0 * len(families))
    for row, family in zip(figure.subplots(len(families), len(REFINEMENT), squeeze=False), families, strict=True):
        plain = family[0] if family[0].cells[0].loss not in UNREFINED else None
        shades = ["0.6", *_shades(len(family) - 1)] if plain else _shades(len(family))
        for group, colour in zip(family, shades, strict=True):
            width = 3.5 if group is plain else 1.2  # seen where the others lie on it
            for axes, points in zip(row, _refinement_curves(group, plain), strict=True):
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, label=group.method, linewidth=width)
        for axes, title in zip(row, REFINEMENT, strict=True):
            axes.set_title(title, fontsize="medium")
            axes.set_xlabel("step")
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


def sizes_figure(groups: Sequence[Group]) -> Figure | None:
    """Held-out margin and accuracy against the number of training pairs (arXiv 2405.21040, Figures 2 and 3).

    Args:
        groups: with a size each. None if there are fewer than two sizes.
    """
    sizes = sorted({group.size for group in groups if group.size})
    if len(sizes) < 2:
        return None
    panels = {
        "margin on held-out pairs (nats)": lambda group: group.held_out and group.held_out.margin,
        "accuracy, strict (%)": lambda group: None if group.accuracy is None else 100 * group.accuracy,
    }
    figure = new_figure(8.8, 3.6)
    lines: dict[tuple[str, float, float], list[Group]] = {}
    for group in groups:
        lines.setdefault((plain_method(group), group.learning_rate, group.beta), []).append(group)
    for axes, (title, value_of) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, ((method, rate, beta), members) in enumerate(lines.items()):
            points = [(group.size, value) for group in members if (value := value_of(group)) is not None]
            if points:
                label = f"{method}, learning rate {rate:g}, β = {beta:g}"
                width = max(1.0, 4.0 - 2 * number)  # lines that coincide are seen all the same
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, linewidth=width, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel("training pairs")
        axes.set_title(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def plain_method(group: Group) -> str:
    """The method without its number of pairs."""
    return " ".join(word for word in group.method.split() if not word.startswith("pairs="))


def _shades(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps["viridis"](value) for value in np.linspace(0.1, 0.85, count)]
