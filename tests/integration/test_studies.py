"""The papers' studies from sweep file to report, at toy size: the files of examples/ with a tiny model."""

from __future__ import annotations

import json

import pytest
import studies

from llamafactory_ext.sweep.results import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge():
    with studies.judge_server() as address:
        yield address


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return studies.make_place(tmp_path_factory.mktemp("studies"))


def test_minor_dpo_on_metamath(place, judge):
    results = read_results(studies.run_study("metamath", place, judge, most=1))
    assert len(results.cells) == 3
    assert {cell.loss for cell in results.cells} == {"sigmoid", "dpop", "minor_dpo"}
    assert [cell.summary["problems"] for cell in [*results.bases, *results.cells]] == [4] * 4


def test_sr_on_hh_rlhf(place, judge):
    folder = studies.run_study("hh_rlhf", place, judge, most=2)
    results = read_results(folder)
    seeds, sizes = 2, 2
    assert len(results.cells) == 4 * seeds + 2 * sizes
    earlier = {cell.name: cell.pairs.means["margin"] for cell in read_results(place / "hh_rlhf0").cells}
    for choice in results.about["chosen"]:
        loss = choice["place"]["pref_loss"]
        candidates = {value: earlier[f"{loss}-sr_lambda{value}"] for value in choice["measured"]}
        assert choice["measured"] == pytest.approx(candidates)
        assert f"{choice['value']:g}" == max(candidates, key=candidates.get)
    judged = {cell.name: cell.judged for cell in results.cells if cell.judged}
    assert len(judged) == 2 * seeds + sizes
    for name, summary in judged.items():
        baseline = "sigmoid" if name.startswith("sr_dpo") else "ipo"
        assert summary["b"].startswith(f"{baseline}-")
        assert summary["b"].endswith(name[name.index("seed") :])
        assert sum(summary[kind]["count"] for kind in ("win", "tie", "lose")) == summary["judged"]


def test_sr_on_ultrafeedback(place, judge):
    folder = studies.run_study("ultrafeedback", place, judge, most=1)
    results = read_results(folder)
    assert len(results.cells) == 4
    for cell in results.cells:
        assert cell.benchmarks.tasks["sums"].metric == "acc"
        assert set(cell.pairs.correlations["margin"]) == {"Pearson", "Spearman", "Kendall"}
    assert json.loads((folder / "sweep.json").read_text())["sweep"]["evaluators"]["lm_eval"]["tasks"] == "sums"
