"""How well margins agree with what somebody else thinks of the same answers (arXiv 2405.21040, Table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Scored pairs in a few numbers.

    Args:
        pairs: how many were scored.
        skipped: how many LLaMA-Factory would not train on.
        means: of every number that a pair has, by name.
        accuracy: share of pairs with a margin above 0.
        augmented_accuracy: the same under the augmented prompt, or None.
        correlations: between a margin and the difference of the data's scores: margin's name -> method -> (value, p).
    """

    pairs: int
    skipped: int
    means: dict[str, float]
    accuracy: float
    augmented_accuracy: float | None
    correlations: dict[str, dict[str, tuple[float, float]]]


def summarize(rows: Sequence[dict[str, Any]]) -> Summary:
    """The summary of the rows that `score.score_pairs` writes."""
    scored = [row for row in rows if not row["skipped"]]
    names = [name for name, value in scored[0].items() if isinstance(value, float)] if scored else []
    rated = [row for row in scored if row.get("score_chosen") is not None and row.get("score_rejected") is not None]
    margins = [name for name in ("margin", "augmented_margin") if scored and name in scored[0]]
    differences = [row["score_chosen"] - row["score_rejected"] for row in rated]
    return Summary(
        pairs=len(scored),
        skipped=len(rows) - len(scored),
        means={name: _mean([row[name] for row in scored if row.get(name) is not None]) for name in names},
        accuracy=_mean([row["margin"] > 0 for row in scored]),
        augmented_accuracy=_mean([row["augmented_margin"] > 0 for row in scored])
        if "augmented_margin" in margins
        else None,
        correlations={name: correlate([row[name] for row in rated], differences) for name in margins if len(rated) > 2},
    )


def correlate(margins: Sequence[float], differences: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Pearson's, Spearman's and Kendall's (tau-b) coefficient and its p-value, two-sided; nan if a side is constant."""
    from scipy.stats import kendalltau, pearsonr, spearmanr

    methods = {"Pearson": pearsonr, "Spearman": spearmanr, "Kendall": kendalltau}
    if len(set(margins)) < 2 or len(set(differences)) < 2:
        return {name: (float("nan"), float("nan")) for name in methods}
    results = {name: method(margins, differences) for name, method in methods.items()}
    return {name: (float(result.statistic), float(result.pvalue)) for name, result in results.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
