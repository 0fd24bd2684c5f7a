"""Paired tests: whether two models differ on the same examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 20_000


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
    result = permutation_test(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
