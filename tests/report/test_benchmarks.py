"""Benchmarks: means over seeds with their intervals, paired tests, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_sweeps import benchmark, make_sweep, tasks_of, train
from scipy.stats import norm, ttest_ind
from test_page import changed, report
from test_table import cell

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation.harness_results import HarnessResults, TaskScore
from llamafactory_ext.evaluation.paired import _p_by_magnitude, sign_flip_p
from llamafactory_ext.report.benchmark_tables import benchmark_tests_table, benchmarks_table
from llamafactory_ext.report.benchmarks import (
    AVERAGE,
    average,
    check_benchmarks,
    compare_benchmarks,
    mean_of_means,
    measured,
)
from llamafactory_ext.report.look import look_of
from llamafactory_ext.report.table import groups, t_interval
from llamafactory_ext.sweep.results import SweepResults

AXES = {"pref_loss": ["sigmoid", "sr_dpo"]}
LM_EVAL = {"tasks": ["a", "b"], "engine": "hf"}


def harness(hash="h", metric="acc", **tasks):
    """Results of a run: task -> the values of its examples."""
    scores = {
        name: TaskScore(metric, float(np.mean(values)), None, 5, 1, hash, {str(n): v for n, v in enumerate(values)})
        for name, values in tasks.items()
    }
    return HarnessResults(Path("nowhere"), scores, float(np.mean([score.value for score in scores.values()])))


def benched(loss, results, **place):
    made = cell(loss, [0], **place)
    object.__setattr__(made, "benchmarks", results)
    return made


# --- means -----------------------------------------------------------------------------------------------------------


def test_a_mean_over_seeds_has_wilsons_interval_of_one_runs_examples():
    """Wilson's, by hand, with a share of 3/8 and n = 4."""
    found = measured([harness(a=[1.0, 1.0, 0.0, 0.0]), harness(a=[1.0, 0.0, 0.0, 0.0])], "a")
    z = 1.959964
    half = z * (0.375 * 0.625 / 4 + z**2 / 64) ** 0.5
    assert found.value == 0.375
    np.testing.assert_allclose(
        found.interval, [(0.375 + z**2 / 8 + s * half) / (1 + z**2 / 4) for s in (-1, 1)], rtol=1e-6
    )


def test_other_values_have_students_interval():
    """Means over the seeds 1, 2, 3: 2 -+ 4.302653 * 1 / sqrt(3)."""
    found = measured([harness(a=[0.5, 2.0, 3.0]), harness(a=[1.5, 2.0, 3.0])], "a")
    assert found.value == 2
    np.testing.assert_allclose(found.interval, [2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], rtol=1e-6)


hundredths = st.integers(-900, 900).map(lambda n: n / 100)
samples = st.lists(hundredths, min_size=2, max_size=9, unique=True)


@given(samples, samples)
@settings(deadline=None)
def test_the_interval_of_an_average_is_welchs(a, b):
    """The mean of two means is half of the difference of one mean and the negative other."""
    a, b = np.array(a), np.array(b)
    low, high = ttest_ind(a, -b, equal_var=False).confidence_interval(0.95)
    found = mean_of_means([a, b])
    assert found.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert found.interval == pytest.approx((low / 2, high / 2))
    assert mean_of_means([a]).interval == pytest.approx(t_interval(a.tolist()))


def test_averages_without_spread_or_of_single_examples():
    assert average([harness(a=[1.0, 1.0], b=[0.0, 0.0])]).interval == (0.5, 0.5)
    assert average([harness(a=[1.0], b=[0.0, 1.0])]).interval is None


# --- tests -----------------------------------------------------------------------------------------------------------


def test_groups_are_compared_with_their_unrefined_loss():
    """Task a: better on 6 examples, worse on none, McNemar's 2 / 2^6; b: no difference. The average of the differences
    is (6/8 + 0) / 2; only a's examples differ, by equal amounts, so that its p is a's. Holm over three groups' nine."""
    zeros, ones = [0.0] * 8, [1.0] * 6 + [0.0] * 2
    found = groups(
        [
            benched("sigmoid", harness(a=zeros, b=ones), seed=1),
            benched("ipo", harness(a=zeros, b=ones), seed=1),
            benched("sr_dpo", harness(a=ones, b=ones), seed=1, sr_lambda=0.3),
            benched("sr_ipo", harness(a=zeros, b=ones), seed=1, sr_lambda=0.3),
            benched("sr_dpo", harness(a=ones, b=ones), seed=1, sr_lambda=0.3, pref_beta=0.5),  # has no DPO beside it
        ]
    )
    rows = compare_benchmarks(found)
    assert [(row.group.variant.name, row.baseline.variant.name, row.task) for row in rows] == [
        (ours, theirs, task)
        for ours, theirs in (("IPO", "DPO"), ("Sr-DPO", "DPO"), ("Sr-IPO", "IPO"))
        for task in ("a", "b", AVERAGE)
    ]
    a, b, mean = rows[3:6]
    assert (a.ours, a.theirs, a.difference.value, a.better, a.worse) == (0.75, 0, 0.75, 6, 0)
    assert (b.difference.value, b.better, b.worse, b.p) == (0, 0, 0, 1)
    assert (mean.ours, mean.theirs, mean.difference.value) == (0.75, 0.375, 0.375)
    assert a.p == mean.p == pytest.approx(2 / 2**6)
    assert a.p_holm == pytest.approx(9 * 2 / 2**6)
    assert mean.difference.interval == pytest.approx(
        tuple(each / 2 for each in t_interval([1, 1, 1, 1, 1, 1, 0, 0])), rel=1e-9
    )


def test_only_seeds_that_both_have_are_compared():
    cells = [benched("sigmoid", harness(a=[0.0, 1.0]), seed=1), benched("sr_dpo", harness(a=[0.0, 1.0]), seed=1)]
    cells.append(benched("sr_dpo", harness(a=[1.0, 1.0]), seed=2))
    assert {row.difference.value for row in compare_benchmarks(groups(cells))} == {0}
    assert compare_benchmarks(groups(cells[:1])) == []


def test_dpo_with_a_refinement_term_is_no_baseline():
    cells = [benched("sigmoid", harness(a=[0.0]), seed=1, sr_lambda=0.3), benched("sr_dpo", harness(a=[1.0]), seed=1)]
    assert compare_benchmarks(groups(cells)) == []


@given(st.integers(0, 2**32 - 1), st.floats(-0.05, 0.05))
@settings(deadline=None, max_examples=20)
def test_the_test_of_many_values_is_a_sign_flip_test(seed, shift):
    """The sum under random signs is nearly normal, with the squares' sum as its variance."""
    rng = np.random.default_rng(seed)
    values = np.sign(rng.random(3000) - 0.5 + shift) * rng.choice([1.0, 0.5, 1 / 3], size=3000)
    expected = 2 * norm.sf(abs(values.sum()) / np.sqrt((values**2).sum()))
    assert sign_flip_p(values) == pytest.approx(expected, abs=0.02)


def test_by_magnitude_and_by_sign_agree():
    values = np.array([1.0] * 9 + [-1.0] * 4 + [0.5] * 3)
    assert _p_by_magnitude(values) == pytest.approx(sign_flip_p(values), abs=0.01)
    assert _p_by_magnitude(values / 3) == _p_by_magnitude(values)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (harness(a=[0.0, 1.0]), "Only one of .* was asked b"),
        (harness("other", a=[0.0, 1.0], b=[1.0]), "were not asked the same in a"),
        (harness(metric="exact_match", a=[0.0, 1.0], b=[1.0]), "were not asked the same in a"),
        (harness(a=[0.0, 1.0], b=[1.0, 0.0]), "were not asked the same in b"),
    ],
)
def test_benchmarks_that_cannot_be_compared_are_refused(other, told):
    cells = [benched("sigmoid", harness(a=[0.0, 1.0], b=[1.0])), benched("sr_dpo", None), benched("ipo", other)]
    with pytest.raises(UserError, match=told):
        check_benchmarks(cells)
    check_benchmarks([*cells[:2], cells[0]])


@pytest.fixture
def sweep(tmp_path):
    made = make_sweep(tmp_path, AXES, gsm8k=None, lm_eval=LM_EVAL)
    for each in made.cells():
        train(made, each)
    return made


def test_other_prompts_are_refused_before_a_page_is_written(sweep):
    tasks = tasks_of(sweep)
    for each, hash in zip(sweep.cells(), ("one", "other"), strict=True):
        benchmark(sweep, each.name, {"a": [1.0, 0.0], "b": [1.0]}, hash, at=tasks)
    with pytest.raises(UserError, match="were not asked the same in a"):
        report(sweep)
    assert not (sweep.output / "report").exists()


def test_a_damaged_value_is_named(sweep):
    first = sweep.cells()[0]
    benchmark(sweep, first.name, {"a": [1.0, 0.0], "b": [1.0]})
    changed(first.folder / "lm_eval" / "base" / "results.json", ("rows", "a", 0, "value"), 0.0)
    with pytest.raises(UserError, match=r"results.json is damaged \(.*: a value is not the mean of its rows\)"):
        report(sweep)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_page_has_both_tables_also_without_the_untrained_model(sweep):
    tasks = tasks_of(sweep)
    for each, first in zip(sweep.cells(), (0.0, 1.0), strict=True):
        benchmark(sweep, each.name, {"a": [first, 0.0], "b": [1.0, 1.0]}, at=tasks)
    page, _ = report(sweep)
    assert "untrained</td>" not in page
    assert "<th>a\nacc\n5 shots</th><th>b\nacc\n5 shots</th><th>average</th>" in page
    assert ">50.0\n(9.5–90.5)</td>" in page
    with (sweep.output / "report" / "benchmarks.csv").open() as file:
        dpo, refined = csv.DictReader(file)
    assert (dpo["a"], dpo["average"], refined["a"], refined["average"]) == ("0.0", "0.5", "0.5", "0.75")
    with (sweep.output / "report" / "benchmark_tests.csv").open() as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert rows["a"]["difference"] == "0.5"
    assert rows["average"]["against"] == "DPO"
    assert "<td>Sr-DPO\nagainst DPO</td>" in page


def test_the_untrained_model_stands_first(sweep):
    benchmark(sweep, "base", {"a": [1.0, 1.0], "b": [0.0]})
    for each in sweep.cells():
        benchmark(sweep, each.name, {"a": [1.0, 0.0], "b": [1.0]})
    report(sweep)
    with (sweep.output / "report" / "benchmarks.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base, untrained", "DPO", "Sr-DPO"]


def test_values_beyond_1_are_no_percentages():
    cells = [
        benched("sigmoid", harness(metric="perplexity", a=[10.0, 30.0]), seed=1),
        benched("sr_dpo", harness(metric="perplexity", a=[9.0, 28.0]), seed=1),
    ]
    found = groups(cells)
    look = look_of(group.variant for group in found)
    table = benchmarks_table(SweepResults({}, cells, []), found, look)
    assert table.rows[0].entries[-1].text.startswith("20.0\n")
    assert "percent" not in table.caption
    tests = benchmark_tests_table(compare_benchmarks(found), look)
    assert "percent" not in tests.caption
    assert [entry.text for entry in tests.rows[0].entries[4:7]] == ["18.5", "20.0", "−1.50 (−7.85 to 4.85)"]
