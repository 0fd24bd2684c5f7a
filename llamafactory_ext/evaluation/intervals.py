"""Confidence intervals of rates and means whose observations are not independent, because some share a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any


def wilson_95(rate: float, number: float) -> list[float]:
    """Wilson's 95% interval of a rate from 0 to 1 over so many observations, or effective ones."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(rate * number, number, method="wilson")
    return [float(low), float(high)]


def effective_number(rate: float, variance: float, problems: int, observations: int) -> float:
    """The number of independent observations whose rate would have the same variance (Kish's design effect).

    n_eff = r (1 - r) / Var(r), within the number of problems and that of observations

    Args:
        rate: r, from 0 to 1.
        variance: of the rate, as estimated from how the problems differ.
        problems: their number, which is also the result where the variance is unknown: with a single problem, or if
            nothing varies at 0 or 1.
        observations: their number over all problems.
    """
    if problems == 1 or not 0 < rate < 1:
        return problems
    return observations if variance == 0 else min(max(rate * (1 - rate) / variance, problems), observations)


def clustered_rate(clusters: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """A rate over observations of several problems, with Wilson's interval for the effective number of observations.

    r = sum h / sum m,  Var(r) = n / (n - 1) sum (h - r m)^2 / (sum m)^2  (Cochran, Sampling Techniques, 1977, 6.3)

    Args:
        clusters: of each of n problems, h and m: the observations that count, and all of them, at least one.

    Returns:
        `count`, `rate` from 0 to 1, and `wilson_95`.
    """
    count, total, problems = sum(hits for hits, _ in clusters), sum(size for _, size in clusters), len(clusters)
    rate = count / total
    spread = sum((hits - rate * size) ** 2 for hits, size in clusters)
    variance = spread * problems / max(problems - 1, 1) / total**2
    return {
        "count": count,
        "rate": rate,
        "wilson_95": wilson_95(rate, effective_number(rate, variance, problems, total)),
    }


def mean_95(values: Sequence[float]) -> list[float] | None:
    """Student's 95% interval of a mean; None of fewer than two values.

    m -+ t s / sqrt(n), with the quantile t of Student's distribution with n - 1 degrees of freedom
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values) + half]


def t_test_p(differences: Sequence[float]) -> float | None:
    """The p-value of the paired t-test: of a mean this far from 0 or farther. None of fewer than two differences."""
    from scipy.stats import t

    if len(differences) < 2:
        return None
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if fmean(differences) == 0 else 0.0
    return float(2 * t.sf(abs(fmean(differences)) / error, len(differences) - 1))
