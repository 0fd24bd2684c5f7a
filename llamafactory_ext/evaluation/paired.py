"""Paired tests: whether two models differ on the same examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 20_000
MANY = 2_000  # values; beyond it, signs are drawn by magnitude


def sign_flip_p(values: NDArray[np.float64]) -> float:
    """Two-sided p-value of mean 0 under random signs: exact where values differ in their signs only or are few, else by
    `RESAMPLES` draws."""
    import numpy as np
    from scipy.stats import binomtest, permutation_test

    values = values[values != 0]
    if len(values) == 0:
        return 1.0
    if len(set(np.abs(values))) == 1:  # McNemar's
        return float(binomtest(int((values > 0).sum()), len(values)).pvalue)
    if len(values) > MANY:
        return _p_by_magnitude(values)
    result = permutation_test(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _p_by_magnitude(values: NDArray[np.float64]) -> float:
    """The same for many values, most of which share their magnitude with others.

    With random signs, m values of magnitude a sum to a (2 B - m), where B is binomial with m draws and probability 1/2.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    scaled = np.round(values / np.abs(values).max(), 9)  # equal but for rounding is equal
    sums = np.zeros(RESAMPLES)
    for magnitude, count in zip(*np.unique(np.abs(scaled), return_counts=True), strict=True):
        sums += magnitude * (2 * rng.binomial(count, 0.5, RESAMPLES) - count)
    extreme = int((np.abs(sums) >= abs(scaled.sum()) - 1e-6).sum())
    return (extreme + 1) / (RESAMPLES + 1)
