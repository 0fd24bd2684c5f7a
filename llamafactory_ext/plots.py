"""Figures: the reward curves of single runs, and what all figures of the package share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .whole_files import whole_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LogHistory = Sequence[Mapping[str, Any]]

# The three curves of arXiv 2408.09834, Figure 2, in colors that color-blind readers can tell apart (Okabe and Ito).
CURVES = {"chosen": "#0072b2", "rejected": "#d55e00", "margins": "#009e73"}


def plot_normalized_rewards(log_history: LogHistory, path: Path, title: str = "") -> Path | None:
    """Plot the normalized rewards of one run (log-ratios in nats, free of beta) against its steps.

    Args:
        log_history: as in `trainer_state.json`: one mapping per log, with `step` and the metrics.
        path: the file to write, whole or not at all; its suffix is the format.
        title: above the curves.

    Returns:
        The path, or None if the run logged no normalized rewards (a loss without reference).
    """
    return plot_runs({title: log_history}, path)


def plot_runs(runs: Mapping[str, LogHistory], path: Path) -> Path | None:
    """Plot several runs side by side on one scale, as in arXiv 2408.09834, Figures 2 to 5; title -> log history."""
    figure = _reward_figure(runs)
    if figure is None:
        return None
    save(figure, path)
    return path


def reward_figure(log_history: LogHistory) -> Figure | None:
    """The same for one run, as a figure for a page; None if the run logged no normalized rewards."""
    figure = _reward_figure({"": log_history})
    if figure is not None:
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.88))  # the page puts its label above the curves
    return figure


def _reward_figure(runs: Mapping[str, LogHistory]) -> Figure | None:
    runs = {title: history for title, history in runs.items() if _points(history, "chosen")[0]}
    if not runs:
        return None

    figure = new_figure(width=5.0 * len(runs), height=3.8)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (title, history) in zip(panels, runs.items(), strict=True):
        _draw(axes, history, title)
    panels[0].set_ylabel("normalized reward (nats)")
    return figure


def _draw(axes: Axes, history: LogHistory, title: str) -> None:
    for curve, color in CURVES.items():
        steps, values = _points(history, curve)
        marker = "o" if len(steps) == 1 else None  # a line through one point is invisible
        axes.plot(steps, values, color=color, marker=marker, label=curve.removesuffix("s"))
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step")
    axes.set_title(title)
    axes.legend(frameon=False)


def _points(history: LogHistory, curve: str) -> tuple[list[int], list[float]]:
    key = f"normalized_rewards/{curve}"
    logs = [log for log in history if key in log]
    return [log["step"] for log in logs], [log[key] for log in logs]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def legend_below(figure: Figure) -> None:
    """One legend for all panels, below them: each label once, in as many columns as fit the figure's width."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    if not entries:
        return
    column = 0.6 + 0.085 * max(map(len, entries))  # inches: the line, and characters of a small font
    columns = max(1, min(len(entries), int(figure.get_figwidth() / column)))
    rows = -(-len(entries) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as its suffix says, whole or not at all."""
    from matplotlib import rc_context

    # TrueType: publishers refuse the Type 3 fonts that matplotlib embeds in a PDF by default.
    with whole_path(path) as unfinished, rc_context({"pdf.fonttype": 42}):
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)
