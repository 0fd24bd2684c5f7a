"""`benchmarks/foresight.py`: its data, and what it makes of scores before and after."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from foresight import SCORES, correlations, dropping, interval, made, spearman
from scipy.stats import spearmanr


def test_half_of_the_pairs_differ_in_a_number():
    pairs = list(itertools.islice(made(), 40))
    kinds = [pair["kind"] for pair in pairs]
    assert {kinds.count("corrupted"), kinds.count("another")} <= set(range(15, 26))
    for pair in pairs:
        words = [pair[side].split() for side in ("chosen", "rejected")]
        different = sum(a != b for a, b in zip(*words, strict=False))
        assert (len(words[0]) == len(words[1]) and different == 1) == (pair["kind"] == "corrupted")


def test_intervals_of_known_samples():
    rng = np.random.default_rng(0)
    sample = rng.normal(1, 1, 400)
    mean, low, high = (float(part.strip("[],")) for part in interval(np.mean, sample).split())
    assert mean == pytest.approx(sample.mean(), abs=0.01)
    assert (low, high) == pytest.approx((sample.mean() - 0.098, sample.mean() + 0.098), abs=0.03)  # 1.96 / sqrt(400)
    assert interval(spearman, sample, -sample) == "-1.00 [-1.00, -1.00]"
    with_ties = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])
    assert spearman(*with_ties) == pytest.approx(spearmanr(*with_ties).statistic)


def test_tables_by_hand():
    """Scores 0 to 19 before, and chosen log-probabilities that fall by as much, of two trainings in the mean."""
    before = [{**dict.fromkeys(SCORES, n), "chosen_logp": -1.0} for n in range(20)]
    after = [[{"chosen_logp": -1.0 - share * n} for n in range(20)] for share in (0.5, 1.5)]
    lines = correlations(before, after, ["corrupted", "another"] * 10)
    assert "| `normalized_ches` | -1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00] |" in lines
    assert "| pairs | 20 pairs, 95% fell | 10 pairs, 90% fell | 10 pairs, 100% fell |" in lines
    assert "| mean change, nats | -9.50 | -9.00 | -10.00 |" in lines

    def constant(logp):
        return [[{"chosen_logp": logp}, {"chosen_logp": logp + 1}]]

    found = dropping({"before": constant(-3), "train": constant(-5), "kept": constant(-4), "random": constant(-4.5)})
    assert found[2:] == [
        "| all pairs | -2.00 [-2.00, -2.00] |",
        "| without the worst tenth | -1.00 [-1.00, -1.00] |",
        "| without a random tenth | -1.50 [-1.50, -1.50] |",
        "| without the worst minus without a random tenth | +0.50 [+0.50, +0.50] |",
        "| the same by training | +0.50 |",
    ]
