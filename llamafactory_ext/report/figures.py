"""The figures of a sweep that compare settings: scores, numbers of pairs, and the losses' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import legend_below, new_figure
from .look import COLORS, Look
from .table import Group, Interval
from .variants import NAMES, SIZE, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_BY_SIDE = 12.0  # inches: wider panels go below each other
BAR_WIDTH = 24  # characters of a label beside a bar
STYLES = ("-", "--", ":", "-.")  # settings of one method
DARK = "0.15"


# --- the losses ------------------------------------------------------------------------------------------------------


def coefficient_figure(betas: Sequence[float]) -> Figure:
    """beta sigma(-argument) of DPO against the margin, per beta, and each loss's gradient at a rejected response.

    arXiv 2408.09834, Figure 1; the right panel is the gradient of the losses themselves.
    """
    from matplotlib import colormaps

    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    nats = np.linspace(-60, 60, 241)
    for beta, shade in zip(betas, np.linspace(0.1, 0.85, len(betas)), strict=True):
        color = colormaps["viridis"](shade)  # of a beta, not of a method
        left.plot(nats, beta / (1 + np.exp(beta * nats)), color=color, label=f"β = {beta:g}")
    left.set_xlabel("margin (nats)")
    left.set_title("coefficient β σ(-β margin)")
    left.legend(frameon=False)
    beta = betas[len(betas) // 2]
    for loss in ("sigmoid", "minor_dpo"):
        right.plot(nats, rejected_gradient(loss, nats, beta), color=COLORS[loss], label=NAMES[loss])
    right.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    right.set_xlabel("log-ratio of the rejected response (nats)")
    right.set_title(f"gradient at the rejected response, β = {beta:g}")
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


# --- scores ----------------------------------------------------------------------------------------------------------


def score_figure(groups: Sequence[Group], base: float | None, look: Look) -> Figure | None:
    """Strict GSM8K accuracy with Wilson's intervals, a panel per learning rate (arXiv 2408.09834, Figure 6).

    Dots are seeds; the dashed line is the untrained model. All panels share a scale. None if nothing was scored.
    """
    scored = [group for group in groups if group.accuracy is not None]
    if not scored:
        return None
    rates = sorted({group.learning_rate for group in scored})
    variants = list(dict.fromkeys(group.variant for group in scored))
    betas = sorted({group.beta for group in scored})
    width = max(4.0, 0.28 * len(variants) * len(betas) + 1.0)
    shape = (1, len(rates)) if width * len(rates) <= SIDE_BY_SIDE else (len(rates), 1)
    figure = new_figure(width * shape[1], 3.4 * shape[0])
    panels = figure.subplots(*shape, sharey=True, squeeze=False).flat
    bar = 0.8 / len(variants)
    for axes, rate in zip(panels, rates, strict=True):
        for group in (group for group in scored if group.learning_rate == rate):
            x = betas.index(group.beta) + (variants.index(group.variant) - (len(variants) - 1) / 2) * bar
            _draw_bar(axes, group, x, bar, look)
        if base is not None:
            axes.axhline(100 * base, color="0.3", linestyle="--", linewidth=1, label="untrained")
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_xlabel("β")
        axes.set_title(f"learning rate {rate:g}")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy, strict (%)")
    figure.axes[0].set_ylim(0, _top(scored, base))
    legend_below(figure)
    return figure


def _draw_bar(axes: Axes, group: Group, x: float, width: float, look: Look) -> None:
    assert group.accuracy is not None
    color, label = look.colors[group.variant], look.labels[group.variant]
    axes.bar(x, 100 * group.accuracy, 0.92 * width, color=color, label=label)
    axes.errorbar(x, 100 * group.accuracy, yerr=_errors(group), **_visible_on_bars())
    shares = _shares(group)
    if len(shares) > 1:
        axes.scatter([x] * len(shares), shares, s=8, color="white", edgecolors=DARK, linewidths=0.7, zorder=3)


def _visible_on_bars() -> dict[str, Any]:
    """The look of an interval: dark with a white border, for bars are dark, too."""
    from matplotlib.patheffects import withStroke

    return {
        "color": DARK,
        "linewidth": 1,
        "capsize": 2,
        "path_effects": [withStroke(linewidth=2.5, foreground="white")],
    }


def _errors(group: Group) -> list[list[float]]:
    """Wilson's interval as lengths, in percent."""
    assert group.accuracy is not None
    assert group.wilson is not None
    low, high = group.wilson
    # At 0 and at 100 % a bound is off by the last bit, on the wrong side.
    return [[100 * max(0.0, group.accuracy - low)], [100 * max(0.0, high - group.accuracy)]]


def _shares(group: Group) -> list[float]:
    """Accuracies of the seeds, in percent."""
    return [100 * cell.summary["strict"]["accuracy"] for cell in group.scored if cell.summary]


def _top(scored: Sequence[Group], base: float | None) -> float:
    """The end of an axis of accuracies that begins at 0, in percent: above every interval."""
    highest = [group.wilson[1] for group in scored if group.wilson] + [base or 0.0]
    return min(100.0, 115 * max(highest))


def score_list_figure(groups: Sequence[Group], base: float | None, look: Look) -> Figure | None:
    """The same for methods that are on one beta each: a bar per group."""
    scored = [group for group in groups if group.accuracy is not None]
    if not scored:
        return None
    settings = [f"learning rate {group.learning_rate:g}, β = {group.beta:g}" for group in scored]
    labels = [look.wrapped(group.variant, BAR_WIDTH) for group in scored]
    one_setting = len(set(settings)) == 1
    if not one_setting:
        labels = [f"{label}\n{setting}" for label, setting in zip(labels, settings, strict=True)]
    lines = max(label.count("\n") + 1 for label in labels)
    figure = new_figure(6.5, (0.2 + 0.17 * lines) * len(scored) + 1.4)
    axes = figure.subplots()
    if one_setting:
        axes.set_title(settings[0], fontsize="medium")
    for place, group in enumerate(scored):
        assert group.accuracy is not None
        axes.barh(place, 100 * group.accuracy, 0.7, color=look.colors[group.variant])
        axes.errorbar(100 * group.accuracy, place, xerr=_errors(group), **_visible_on_bars())
        shares = _shares(group)
        if len(shares) > 1:
            axes.scatter(shares, [place] * len(shares), s=8, color="white", edgecolors=DARK, linewidths=0.7, zorder=3)
    if base is not None:
        axes.axvline(100 * base, color="0.3", linestyle="--", linewidth=1, label="untrained")
    legend_below(figure)
    axes.set_yticks(range(len(scored)), labels)
    axes.set_ylim(len(scored) - 0.5, -0.5)  # the first on top
    axes.set_xlim(0, _top(scored, base))
    axes.set_xlabel("accuracy, strict (%)")
    return figure


# --- numbers of pairs ------------------------------------------------------------------------------------------------

Measured = tuple[float | None, Interval | None]


def _held_out_accuracy(group: Group) -> Measured:
    held_out = group.held_out
    if held_out is None:
        return None, None
    return _percent(held_out.accuracy), held_out.accuracy_interval and _both_percent(held_out.accuracy_interval)


SIZE_PANELS: dict[str, Callable[[Group], Measured]] = {
    "margin on held-out pairs (nats)": lambda group: (
        (group.held_out.margin, group.held_out.margin_interval) if group.held_out else (None, None)
    ),
    "accuracy on held-out pairs (%)": _held_out_accuracy,
    "accuracy, strict (%)": lambda group: (_percent(group.accuracy), group.wilson and _both_percent(group.wilson)),
}


def sizes_figure(groups: Sequence[Group], look: Look) -> Figure | None:
    """Held-out margin and accuracies against the number of training pairs (arXiv 2405.21040, Figures 2 and 3).

    Args:
        groups: with a size each. None if there are fewer than two sizes, or nothing was measured.
        look: of the sweep.
    """
    sizes = sorted({group.variant.size for group in groups if group.variant.size})
    panels = {
        title: value_of
        for title, value_of in SIZE_PANELS.items()
        if any(value_of(group)[0] is not None for group in groups)
    }
    if len(sizes) < 2 or not panels:
        return None
    figure = new_figure(4.4 * len(panels), 3.6)
    lines: dict[tuple[Variant, float, float], list[Group]] = {}
    for group in groups:
        lines.setdefault((group.variant.without(SIZE), group.learning_rate, group.beta), []).append(group)
    settings = list(dict.fromkeys((rate, beta) for _, rate, beta in lines))
    axes_of = figure.subplots(1, len(panels), squeeze=False).flat
    for axes, (title, value_of) in zip(axes_of, panels.items(), strict=True):
        for number, ((variant, rate, beta), members) in enumerate(lines.items()):
            shift = 2 ** (0.04 * (number - (len(lines) - 1) / 2))  # so that intervals are beside each other
            style = STYLES[settings.index((rate, beta)) % len(STYLES)]
            label = f"{look.labels[variant]}; learning rate {rate:g}, β = {beta:g}"
            kind = {"color": look.colors[variant], "linestyle": style, "label": label}
            _draw_sizes(axes, members, value_of, shift, kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel("training pairs")
        axes.set_title(title)
    legend_below(figure)
    return figure


def _draw_sizes(
    axes: Axes, members: Sequence[Group], value_of: Callable[[Group], Any], shift: float, kind: dict[str, Any]
) -> None:
    measured = [(group.variant.size or 0, *value_of(group)) for group in members]
    points = [(shift * size, value, interval) for size, value, interval in measured if value is not None]
    if not points:
        return
    sizes, values, intervals = zip(*sorted(points), strict=True)
    axes.plot(sizes, values, marker="o", markersize=4, **kind)
    for size, interval in zip(sizes, intervals, strict=True):
        if interval is not None:
            axes.plot([size, size], interval, color=kind["color"], linewidth=0.8, alpha=0.6)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _both_percent(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]
