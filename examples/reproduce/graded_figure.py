"""Delta by gap, and how the refinement changes margins by gap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llamafactory_ext.plots import legend_below, new_figure, save
from llamafactory_ext.report.claims.graded import REFINED, Graded
from llamafactory_ext.report.variants import Variant

STYLES = {"sigmoid": ("#0072b2", "o"), "ipo": ("#d55e00", "s")}  # by the loss without refinement
WIDTHS = {0.0: 0.7, 0.3: 1.2, 1.0: 1.9, 3.0: 2.8}  # the larger lambda, the thicker


def draw(study: Mapping[Variant, Graded], path: Path) -> None:
    """Means over held-out pairs with each gap."""
    figure = new_figure(width=10, height=3.8)
    left, right = figure.subplots(1, 2)
    for variant, graded in study.items():
        plain = REFINED.get(variant, variant)
        weight = dict(variant.values).get("sr_lambda", 0.0)
        color, marker = STYLES[plain.loss]
        look = {"color": color, "marker": marker, "linewidth": WIDTHS[weight], "markersize": 4}
        label = variant.name + (f", lambda {weight:g}" if weight else "")
        left.plot(*_by_gap(graded.gap, graded.delta), **look, label=label)
        if variant in REFINED and plain in study:
            right.plot(*_by_gap(graded.gap, graded.margin - study[plain].margin), **look, label=label)
    left.set_ylabel("Delta")
    right.set_ylabel("margin minus that without refinement (nats)")
    for axes in (left, right):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_xticks(range(4))
        axes.set_xlabel("gap (wrong results)")
    legend_below(figure)
    save(figure, path)


def _by_gap(gap: np.ndarray, values: np.ndarray) -> tuple[list[int], list[float]]:
    levels = sorted({int(each) for each in gap})
    return levels, [float(values[gap == level].mean()) for level in levels]
