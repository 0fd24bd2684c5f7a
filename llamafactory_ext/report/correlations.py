"""Correlations of margins with the data's own scores, with bootstrap intervals (arXiv 2405.21040, Table 4).

x are the margins of n pairs in nats, y the differences of their scores. A bootstrap sample is a number w >= 0 of copies
per pair, so that all coefficients are those of weighted pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..sweep.results import Result
from .look import Look
from .table import Group, Interval, same_seeds, unrefined
from .tabular import Entry, Row, Table
from .words import SETTING, bounds, counts, setting, shown_setting, signed

DRAWS = 2_000
BLOCK = 500  # rows of an n x n matrix in memory
KINDS: dict[str, Callable[[Result], Mapping[int, float]]] = {
    "margin": lambda cell: cell.margins,
    "augmented margin": lambda cell: cell.augmented_margins,
}
Values = NDArray[np.float64]


# --- coefficients ----------------------------------------------------------------------------------------------------


def pearson(x: Values, y: Values, weights: Values) -> Values:
    """Pearson's coefficient of each sample.

    Args:
        x, y: shape (n,) or, one row per sample, (samples, n).
        weights: copies of each pair, shape (samples, n).

    Returns:
        Shape (samples,); nan where a side is constant.
    """
    total = weights.sum(axis=1, keepdims=True)
    x, y = (side - (weights * side).sum(axis=1, keepdims=True) / total for side in (x, y))
    covariance, of_x, of_y = ((weights * product).sum(axis=1) for product in (x * y, x * x, y * y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((of_x > 1e-12) & (of_y > 1e-12), covariance / np.sqrt(of_x * of_y), np.nan)


def spearman(x: Values, y: Values, weights: Values) -> Values:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank. Shapes as for `pearson`."""
    return pearson(mid_ranks(x, weights), mid_ranks(y, weights), weights)


def mid_ranks(x: Values, weights: Values) -> Values:
    """The rank of each pair in each sample, shape (samples, n): those below, and half of those that are equal."""
    order = np.argsort(x, kind="stable")
    starts = np.flatnonzero(np.diff(x[order], prepend=np.nan) != 0)  # of equal values
    equal = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(equal, axis=1) - (equal - 1) / 2
    return ranks[:, np.unique(x, return_inverse=True)[1]]


def kendall(x: Values, y: Values, weights: Values) -> Values:
    """Kendall's tau-b. Shapes as for `pearson`, x and y with one dimension.

    tau = sum w_i w_j s_ij t_ij / sqrt(sum w_i w_j s_ij^2 sum w_i w_j t_ij^2),  s_ij = sign(x_i - x_j), t_ij likewise
    """
    sums = np.zeros((3, len(weights)))
    for start in range(0, len(x), BLOCK):
        block = slice(start, start + BLOCK)
        s, t = (np.sign(side[block, None] - side[None, :]) for side in (x, y))
        for place, product in enumerate((s * t, s * s, t * t)):
            sums[place] += ((weights[:, block] @ product) * weights).sum(axis=1)
    both, of_x, of_y = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((of_x > 0) & (of_y > 0), both / np.sqrt(of_x * of_y), np.nan)


METHODS = {"Pearson": pearson, "Spearman": spearman, "Kendall": kendall}


# --- estimates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A coefficient or a difference of two, as a mean over seeds.

    Args:
        value: over all pairs.
        interval: 95%, by the percentiles of the bootstrap over pairs.
    """

    value: float
    interval: Interval


@dataclass(frozen=True)
class Correlations:
    """How well a group's margins agree with the data's scores.

    Args:
        group: whose margins.
        kind: which margins, of `KINDS`.
        pairs: with scores, which every seed has scored.
        values: method -> the coefficient.
        baseline: the group without refinement that it is compared with, or None.
        differences: method -> the coefficient minus the baseline's, with the seeds and pairs that both have.
    """

    group: Group
    kind: str
    pairs: int
    values: Mapping[str, Estimate]
    baseline: Group | None
    differences: Mapping[str, Estimate]


def correlations(found: Sequence[Group]) -> list[Correlations]:
    """Of every group and kind of margin that can be told from at least three pairs with scores."""
    rows = []
    for group in found:
        baseline = unrefined(group, found)
        for kind in KINDS:
            cells = _rated(group, kind)
            pairs = _shared(cells, kind)
            values = estimates([(cell, None) for cell in cells], kind)
            if values:
                differences = correlation_gain(group, baseline, kind) if baseline else {}
                rows.append(Correlations(group, kind, len(pairs), values, baseline, differences))
    return rows


def correlation_gain(group: Group, baseline: Group, kind: str = "margin") -> dict[str, Estimate]:
    """Method -> a group's coefficient minus the baseline's, on the same pairs and seeds; empty if there are none."""
    return estimates(same_seeds(_rated(group, kind), _rated(baseline, kind)), kind)


def estimates(cells: Sequence[tuple[Result, Result | None]], kind: str) -> dict[str, Estimate]:
    """Method -> the mean over cells of the coefficient, less that of the other cell where there is one.

    Args:
        cells: one per seed; with scored pairs.
        kind: of margins.

    Returns:
        Empty where fewer than three pairs have scores; without the methods that have no value, as a side is constant.
    """
    everyone = [cell for pair in cells for cell in pair if cell is not None]
    pairs = _shared(everyone, kind)
    if len(pairs) < 3:
        return {}
    rng = np.random.default_rng(0)  # the same samples for all
    drawn = rng.multinomial(len(pairs), [1 / len(pairs)] * len(pairs), size=DRAWS)
    weights = np.vstack([np.ones(len(pairs)), drawn])  # the first are the pairs themselves
    gaps = np.array([everyone[0].score_gaps[index] for index in pairs])

    def coefficient(method: str, cell: Result | None) -> Values:
        if cell is None:
            return np.zeros(len(weights))
        margins = KINDS[kind](cell)
        return METHODS[method](np.array([margins[index] for index in pairs]), gaps, weights)

    found = {}
    for method in METHODS:
        value, *draws = np.mean([coefficient(method, a) - coefficient(method, b) for a, b in cells], axis=0)
        if np.isfinite(value):
            low, high = np.nanpercentile(draws, [2.5, 97.5])
            found[method] = Estimate(float(value), (float(low), float(high)))
    return found


def _rated(group: Group, kind: str) -> list[Result]:
    return [cell for cell in group.cells if cell.score_gaps and KINDS[kind](cell)]


def _shared(cells: Sequence[Result], kind: str) -> list[int]:
    """The pairs that have scores and that every cell has this margin of."""
    sets = [cell.score_gaps.keys() & KINDS[kind](cell).keys() for cell in cells]
    return sorted(set.intersection(*sets)) if sets else []


# --- table -----------------------------------------------------------------------------------------------------------


def correlations_table(rows: Sequence[Correlations], look: Look) -> Table:
    kinds = {row.kind for row in rows} != {"margin"}
    heads = (*SETTING, *(["of the"] if kinds else []))
    return Table(
        "correlations",
        "Correlations with scores",
        f"Of margins with the differences of the data's own scores, over {counts(row.pairs for row in rows)} held-out "
        "pairs, as means over seeds, with "
        f"95% intervals by percentiles of {DRAWS:,} bootstrap samples of the pairs. Below is the gain over "
        "the loss without refinement (other losses: to DPO) with the same settings, on the same pairs. After Table 4 "
        "of arXiv 2405.21040.",
        (*heads, *(f"{method}\ngain" for method in METHODS)),
        tuple(_row(row, look, kinds) for row in rows),
        tuple(_data(row) for row in rows),
    )


def _row(row: Correlations, look: Look, kinds: bool) -> Row:
    """The setting stands beside the first kind of margins only."""
    named = shown_setting(row.group, look) if row.kind == "margin" else ("",) * 3
    lines = [
        filter(None, (_shown(row.values.get(method), ""), _shown(row.differences.get(method), "+")))
        for method in METHODS
    ]
    return Row(tuple(map(Entry, (*named, *([row.kind.split()[0]] if kinds else []), *map("\n".join, lines)))))


def _shown(estimate: Estimate | None, sign: str) -> str:
    if estimate is None:
        return ""
    value, low, high = (signed(f"{each:{sign}.2f}") for each in (estimate.value, *estimate.interval))
    return f"{value} ({low} to {high})"


def _data(row: Correlations) -> dict[str, object]:
    data: dict[str, object] = {**setting(row.group), "of the": row.kind, "pairs": row.pairs}
    data["baseline"] = row.baseline.method if row.baseline else None
    for method in METHODS:
        for name, estimate in ((method, row.values.get(method)), (f"{method} gain", row.differences.get(method))):
            data[name] = estimate.value if estimate else None
            data |= bounds(name, estimate.interval if estimate else None)
    return data
