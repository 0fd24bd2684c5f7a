"""Correlations of margins with the data's scores: as scipy's, with bootstrap intervals over pairs."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recorded_sweeps import make_sweep, score_pairs, train
from scipy.stats import kendalltau, pearsonr, spearmanr
from test_page import report
from test_table import cell

from llamafactory_ext.report import correlations as module
from llamafactory_ext.report.correlations import METHODS, correlation_gain, correlations
from llamafactory_ext.report.table import groups

SCIPY = {"Pearson": pearsonr, "Spearman": spearmanr, "Kendall": kendalltau}
few = st.integers(-3, 3).map(float)  # many are equal


def rated(loss, margins, gaps, augmented=(), **place):
    made = cell(loss, [0], **place)
    values = {"margins": margins, "score_gaps": gaps, "augmented_margins": augmented}
    for name, found in values.items():
        object.__setattr__(made, name, {n: value for n, value in enumerate(found) if value is not None})
    return made


@given(st.lists(st.tuples(few, few, st.integers(0, 3)), min_size=3, max_size=12))
@settings(deadline=None)
@pytest.mark.parametrize("method", METHODS)
def test_coefficients_of_weighted_pairs_are_those_of_their_copies(method, pairs):
    x, y, copies = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
    assume(copies.any())
    found = METHODS[method](x, y, np.stack([np.ones(len(x)), copies]))
    for value, times in zip(found, (np.ones(len(x)), copies), strict=True):
        a, b = (np.repeat(side, times.astype(int)) for side in (x, y))
        if len(set(a)) < 2 or len(set(b)) < 2:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(SCIPY[method](a, b).statistic)


def test_blocks_of_a_long_list_add_up(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 25))
    expected = METHODS["Kendall"](x, y, np.ones((1, 25)))
    monkeypatch.setattr(module, "BLOCK", 7)
    assert METHODS["Kendall"](x, y, np.ones((1, 25))) == pytest.approx(expected)


def test_intervals_are_percentiles_over_samples_of_pairs(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 40)
    rng = np.random.default_rng(1)
    gaps = rng.normal(size=20)
    margins = gaps + rng.normal(size=20)
    (row,) = correlations(groups([rated("sigmoid", margins, gaps)]))
    weights = np.random.default_rng(0).multinomial(20, [1 / 20] * 20, size=40)
    for method, found in row.values.items():
        draws = [SCIPY[method](np.repeat(margins, w), np.repeat(gaps, w)).statistic for w in weights]
        assert found.value == pytest.approx(SCIPY[method](margins, gaps).statistic)
        assert found.interval == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    assert (row.kind, row.pairs, row.baseline, row.differences) == ("margin", 20, None, {})


def test_over_seeds_it_is_the_mean_and_the_gain_is_over_the_seeds_and_pairs_that_both_have():
    gaps = [0.0, 1.0, 2.0, 3.0]
    up, down, other = gaps, gaps[::-1], [0.0, 1.0, 3.0, 2.0]
    cells = [
        rated("sigmoid", down, gaps, seed=1),
        rated("sr_dpo", up, gaps, seed=1, sr_lambda=0.3),
        rated("sr_dpo", other, gaps, seed=2, sr_lambda=0.3),
    ]
    dpo, refined = correlations(groups(cells))
    assert dpo.values["Spearman"].value == pytest.approx(-1)
    assert refined.values["Spearman"].value == pytest.approx((1 + 0.8) / 2)  # 1 - 6 * 2 / (4 * 15)
    assert refined.values["Kendall"].value == pytest.approx((1 + 4 / 6) / 2)  # five of six pairs agree, one does not
    assert refined.differences["Spearman"].value == pytest.approx(2)
    assert refined.baseline is dpo.group
    shorter = rated("sigmoid", [*down[:3], None], gaps, seed=1)
    gain = correlation_gain(groups(cells)[1], groups([shorter])[0])
    assert gain["Pearson"].value == pytest.approx(2)


def test_the_same_margins_gain_nothing():
    rng = np.random.default_rng(0)
    gaps, margins = rng.normal(size=(2, 30))
    cells = [rated("ipo", margins, gaps, margins, seed=1), rated("sr_ipo", 2 * margins, gaps, margins, seed=1)]
    for row in correlations(groups(cells)):
        for estimate in row.differences.values():
            assert estimate.value == pytest.approx(0, abs=1e-12)
            assert estimate.interval == pytest.approx((0, 0), abs=1e-12)
    assert [row.kind for row in correlations(groups(cells))] == ["margin", "augmented margin"] * 2


@pytest.mark.parametrize(
    ("margins", "gaps"), [([1.0, 2.0], [0.0, 1.0]), ([1.0, 2.0, 3.0], [None, 1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0] * 3)]
)
def test_too_few_pairs_or_equal_scores_have_no_correlation(margins, gaps):
    assert correlations(groups([rated("sigmoid", margins, gaps)])) == []


def test_the_page_has_the_table(tmp_path):
    """Margins 0 to 3 against gaps 0 to 3 in the reverse order; the last pair has no scores."""
    sweep = make_sweep(tmp_path, {"pref_loss": ["sigmoid"]}, gsm8k=None, pairs={"dataset": "others"})
    (only,) = sweep.cells()
    train(sweep, only)
    scores = {"score_chosen": [4.0, 3.0, 2.0, 1.0, None], "score_rejected": [1.0] * 4 + [None]}
    score_pairs(sweep, only, [0, 1, 2, 3, 9], **scores)
    page, _ = report(sweep)
    with (sweep.output / "report" / "correlations.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["pairs"], row["of the"], row["baseline"]) == ("4", "margin", "")
    assert [float(row[method]) for method in METHODS] == pytest.approx([-1, -1, -1])
    assert "over 4 held-out pairs" in page
    assert "<th>Pearson\ngain</th>" in page
