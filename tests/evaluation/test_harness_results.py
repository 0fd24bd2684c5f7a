"""Results of `eval harness` read and compared, with numbers worked out by hand; needs no lm_eval."""

from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation import compare, harness
from llamafactory_ext.evaluation.harness_results import compare_tasks, interval_95, read_harness, with_holm
from llamafactory_ext.evaluation.harness_tasks import Wanted, parse_tasks


def write(folder, *, hash="same", metric="acc", **tasks):
    """A run's results.json with these values per example."""
    summary = {
        name: {
            "metric": metric,
            "value": math.fsum(values) / len(values),
            "interval_95": interval_95(values),
            "examples": len(values),
            "shots": 5,
            "version": 1.0,
            "hash": hash,
        }
        for name, values in tasks.items()
    }
    average = math.fsum(about["value"] for about in summary.values()) / len(summary)
    rows = {name: [{"id": str(n), "value": value} for n, value in enumerate(values)] for name, values in tasks.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"summary": {"tasks": summary, "average": average}, "rows": rows}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def invoke(app, *words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_intervals_by_hand():
    """Wilson's of 8 in 10: (0.8 + z^2/20 +- z sqrt(0.8 * 0.2 / 10 + z^2/400)) / (1 + z^2/10), z = 1.959964.

    Student's of 0.2, 0.4, 0.6, 0.8: mean 0.5, s = sqrt(0.2/3), t(3) = 3.182446, so 0.5 +- 3.182446 s / 2.
    """
    assert interval_95([1.0] * 8 + [0.0] * 2) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    half = 3.182446 * math.sqrt(0.2 / 3) / 2
    assert interval_95([0.2, 0.4, 0.6, 0.8]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert interval_95([0.5]) is None


def test_results_are_read_as_written(tmp_path):
    found = read_harness(write(tmp_path, arc=[1.0, 0.0, 1.0, 1.0], mc2=[0.25, 0.75]))
    assert list(found.tasks) == ["arc", "mc2"]
    assert found.average == pytest.approx((0.75 + 0.5) / 2)
    arc = found.tasks["arc"]
    assert (arc.value, arc.shots, dict(arc.rows)) == (0.75, 5, {"0": 1.0, "1": 0.0, "2": 1.0, "3": 1.0})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content["rows"]["arc"].pop(), "number of examples"),
        (lambda content: content["rows"]["arc"][0].update(value=0.0), "not the mean of its rows"),
        (lambda content: content["rows"]["arc"][0].update(value="high"), "damaged"),
        (lambda content: content["rows"]["arc"][1].update(id="0"), "number of examples"),
        (lambda content: content["rows"].pop("arc"), "damaged"),
        (lambda content: content["summary"].update(average=0.1), "not that of its tasks"),
        (lambda content: content["summary"]["tasks"]["arc"].pop("hash"), "damaged"),
        (lambda content: content.update(summary={"problems": 3}), "is not of `eval harness`"),
    ],
)
def test_damaged_results_are_refused(tmp_path, damage, message):
    write(tmp_path, arc=[1.0, 0.0])
    content = json.loads((tmp_path / "results.json").read_text())
    damage(content)
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_harness(tmp_path)


def test_results_that_are_missing_or_no_json(tmp_path):
    with pytest.raises(UserError, match="name the folder of a finished run"):
        read_harness(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_harness(tmp_path)


def test_tasks_are_compared_by_hand(tmp_path):
    """arc: of 10 examples, 8 only the second has right, 1 only the first: p = 2 (C(9,0) + C(9,1)) / 2^9 = 20/512.

    mc2: differences 0.1, 0.2, 0.3, whose 8 sums under random signs are as far from 0 as 0.6 twice: p = 2/8. Holm: the
    smaller p is doubled.
    """
    first = read_harness(write(tmp_path / "a", arc=[0.0] * 8 + [1.0, 1.0], mc2=[0.1, 0.2, 0.3]))
    second = read_harness(write(tmp_path / "b", arc=[1.0] * 8 + [0.0, 1.0], mc2=[0.2, 0.4, 0.6]))
    found = compare_tasks(first, second)
    arc, mc2 = found["arc"], found["mc2"]
    assert (arc.examples, arc.better, arc.worse) == (10, 8, 1)
    assert arc.difference == pytest.approx(0.7)
    assert arc.p == pytest.approx(20 / 512)
    assert arc.p_holm == pytest.approx(40 / 512)
    assert mc2.p == mc2.p_holm == pytest.approx(2 / 8)
    # Differences of arc: eight 1, one -1, one 0: mean 0.7, s^2 = (9 - 10 * 0.49) / 9; t(9) = 2.262157.
    half = 2.262157 * math.sqrt((9 - 4.9) / 9 / 10)
    assert arc.interval == pytest.approx((0.7 - half, 0.7 + half), abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_a_comparison_turned_round(pairs):
    from llamafactory_ext.evaluation.harness_results import TaskScore, _compared

    def scored(values):
        rows = {str(n): float(value) for n, value in enumerate(values)}
        return TaskScore("acc", sum(rows.values()) / len(rows), None, 0, 1, "", rows)

    a, b = map(scored, zip(*pairs, strict=True))
    there, back = _compared(a, b), _compared(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert there.p == pytest.approx(back.p)
    assert (there.better, there.worse) == (back.worse, back.better)
    assert _compared(a, a).p == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash": "other", "arc": [1.0, 0.0]}, "were not asked the same in arc"),
        ({"metric": "acc_norm", "arc": [1.0, 0.0]}, "have acc and acc_norm of arc"),
        ({"arc": [1.0, 0.0, 1.0]}, "were not asked the same in arc"),
        ({"gsm8k": [1.0, 0.0]}, "have no task in common"),
    ],
)
def test_what_was_not_the_same_is_not_compared(tmp_path, change, message):
    first, second = read_harness(write(tmp_path / "a", arc=[1.0, 0.0])), read_harness(write(tmp_path / "b", **change))
    with pytest.raises(UserError, match=message):
        compare_tasks(first, second)


def test_the_command_compares_runs_of_benchmarks(tmp_path):
    """Three runs, so Holm's method is over both rows: p = 2/2^8 and 2/2^6, the smaller doubled."""
    runs = [
        write(tmp_path / name / "base", arc=[1.0] * right + [0.0] * (10 - right))
        for name, right in {"dpo": 0, "sr": 8, "minor": 6}.items()
    ]
    file = tmp_path / "comparison.json"
    result = invoke(compare.app, *runs, "--output", file)
    assert result.exit_code == 0, result.output
    sr, minor = json.loads(file.read_text())
    assert (sr["run"], sr["task"], sr["p"], sr["p_holm"]) == (str(runs[1]), "arc", 2 / 2**8, 4 / 2**8)
    assert (minor["difference"], minor["p_holm"]) == (pytest.approx(0.6), pytest.approx(2 / 2**6))
    assert "+0.800" in result.output


def test_other_runs_and_options_beside_benchmarks_are_refused(tmp_path):
    a, b = write(tmp_path / "a", arc=[1.0]), write(tmp_path / "b", arc=[0.0])
    refused = invoke(compare.app, a, b, "--tier", "flexible")
    assert refused.exit_code == 2
    assert "leave them out" in refused.output
    (b / "results.json").write_text(json.dumps({"rows": [], "summary": {}}))
    refused = invoke(compare.app, a, b)
    assert refused.exit_code == 2
    assert "is not of `eval harness`" in " ".join(refused.output.split())


def test_holm_over_all(tmp_path):
    found = compare_tasks(*(read_harness(write(tmp_path / n, arc=[float(n)] * 6, b=[0.0] * 6)) for n in "01"))
    assert [each.p_holm for each in with_holm(list(found.values()))] == [pytest.approx(4 / 2**6), 1.0]


# --- words of the command ---------------------------------------------------------------------------------------------


def test_tasks_with_shots_metrics_and_filters():
    assert parse_tasks("a, b:5,c:0:acc, d::acc_norm,e:2:exact_match:flexible-extract") == [
        Wanted("a"),
        Wanted("b", 5),
        Wanted("c", 0, "acc"),
        Wanted("d", None, "acc_norm"),
        Wanted("e", 2, "exact_match", "flexible-extract"),
    ]


def test_the_leaderboards_tasks_have_the_papers_shots():
    """arXiv 2405.21040, Table 3."""
    shots = {each.task: each.shots for each in parse_tasks("open_llm_leaderboard,piqa")}
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "piqa": None,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--tasks is empty"),
        ("a:five", "write NAME, NAME:SHOTS"),
        ("a:-1", "write NAME, NAME:SHOTS"),
        ("a:1:acc:none:more", "write NAME, NAME:SHOTS"),
        (":5", "write NAME, NAME:SHOTS"),
        ("a:1,b,a:2", "has a twice"),
        ("gsm8k,open_llm_leaderboard", "has gsm8k twice"),
        ("my/tasks.yaml", "with --include-path"),
    ],
)
def test_wrong_tasks(words, message, tmp_path):
    result = invoke(harness.app, "--model", tmp_path, "--tasks", words, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_without_lm_eval(model32, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    words = ("--engine", "hf", "--model", model32, "--tasks", "piqa", "--output", tmp_path / "out")
    result = invoke(harness.app, *words)
    assert result.exit_code == 2
    assert "pip install lm_eval==0.4.13" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
