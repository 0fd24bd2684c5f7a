"""The page of a sweep in every state: nothing run, some failed, some missing, no scores, no reference, not finite."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import record_run, write_problems
from typer.testing import CliRunner

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation import gsm8k
from llamafactory_ext.report.page import write_report
from llamafactory_ext.report.table import groups
from llamafactory_ext.sweep.records import Record
from llamafactory_ext.sweep.results import read_results
from llamafactory_ext.sweep.spec import Sweep
from llamafactory_ext.sweep.tasks import Agenda, write_recipes, write_sweep
from llamafactory_ext.training.monitors import STOPPED

RECIPE = {"stage": "dpo", "model_name_or_path": "model", "finetuning_type": "full", "dataset": "pairs"}
AXES = {"pref_loss": ["sigmoid", "minor_dpo"], "learning_rate": [1e-5], "pref_beta": [0.02, 0.2]}


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path, AXES)


def make_sweep(folder, axes, **changes):
    evaluation = {"data": "openai/gsm8k", "engine": "hf", "script": folder / "gsm8k.py"}
    sweep = Sweep(recipe=RECIPE, axes=axes, output=folder / "out", **{"evaluation": evaluation, **changes})
    agenda = Agenda(sweep, sweep.cells())
    write_recipes(agenda, agenda.cells)
    write_sweep(agenda, Path("sweep.yaml"))
    return sweep


def train(sweep, cell, value=1.0, metrics=("normalized_rewards/chosen", "normalized_rewards/rejected")):
    cell.model.mkdir()
    logs = [{"step": step, **dict.fromkeys(metrics, value * step), "monitor/degenerating": 1.0} for step in (1, 2, 3)]
    for log in logs:
        if metrics:
            log["normalized_rewards/margins"] = log[metrics[0]] - log[metrics[1]] / 2
    (cell.model / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    record(sweep, cell.name, "train", Record("done", seconds=90.0))


def record(sweep, name, step, how):
    """Write a record of the sweep's own task."""
    agenda = Agenda(sweep, sweep.cells())
    task = next(t for chain in agenda.chains(agenda.cells) for t in chain if (t.name, t.step) == (name, step))
    task.write(replace(how, command=task.words, identity=task.identity))


def score(sweep, name, right, problems=10, sha256="of the problems"):
    summary = {"accuracy": right / problems, "wilson_95": [0.1, 0.9]}
    rows = [{"index": index, "strict": {"correct": index < right}} for index in range(problems)]
    result = {
        "summary": {
            "problems": problems,
            "problems_sha256": sha256,
            "missing": 0,
            "strict": summary,
            "flexible": summary,
            "degeneration": {"degenerate": 0.3, "cut_off": 0.1},
        },
        "rows": rows,
    }
    folder = sweep.output / name if name == "base" else sweep.output / "cells" / name
    (folder / "scores" / "base").mkdir(parents=True)
    (folder / "scores" / "base" / "results.json").write_text(json.dumps(result))
    record(sweep, name, "score", Record("done", seconds=9.0))


def report(sweep):
    page = write_report(sweep.output, sweep.output / "report").read_text(encoding="utf-8")
    with (sweep.output / "report" / "cells.csv").open() as file:
        return page, {row["cell"]: row for row in csv.DictReader(file)}


def test_nothing_has_run(sweep):
    page, rows = report(sweep)
    assert '<b class="missing">4</b> cells missing' in page
    assert list(rows) == ["base", *(cell.name for cell in sweep.cells())]
    assert not (sweep.output / "report" / "scores.png").exists()


def test_some_cells_are_missing_and_some_have_failed(sweep):
    first, second, third, _ = sweep.cells()
    train(sweep, first)
    score(sweep, first.name, 4)
    train(sweep, third)
    score(sweep, third.name, 9)
    score(sweep, "base", 5)
    record(sweep, second.name, "train", Record("failed", error="ValueError: <no> such thing"))
    page, rows = report(sweep)
    for count, state in ((2, "done"), (1, "failed"), (1, "missing")):
        assert f'<b class="{state}">{count}</b> cells {state}' in page
    assert "ValueError: &lt;no&gt; such thing" in page
    assert rows[first.name]["strict"] == "0.4"
    assert rows[first.name]["final chosen"] == "3.0"
    assert rows[second.name]["error"] == "ValueError: <no> such thing"
    assert rows["base"]["strict"] == "0.5"
    assert "50.0 %</b> base, untrained, of 10 problems" in page
    assert (sweep.output / "report" / "rewards_lr1e-05.svg").is_file()
    tests = (sweep.output / "report" / "tests.csv").read_text().splitlines()
    assert tests[1].startswith("MinorDPO,1e-05,0.02,0.9,0.4,0.5,5,0,0.0625,0.0625")
    assert 'title="1 of 1 runs"' in page  # the monitor's flag
    assert re.search(r"<td>base, untrained</td><td></td><td [^>]*>30.0</td>", page), "beside what training did"


def test_a_run_that_was_stopped_says_where(sweep):
    first, second, *_ = sweep.cells()
    for cell in (first, second):
        train(sweep, cell)
    file = second.model / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"][-1][STOPPED] = 1.0
    file.write_text(json.dumps(state))
    page, rows = report(sweep)
    assert page.count("stopped at step") == page.count("stopped at step 3 as it degenerated") == 1
    assert (rows[first.name]["stopped at step"], rows[second.name]["stopped at step"]) == ("", "3")


def test_the_numbers_of_a_recorded_sweep_by_hand(tmp_path):
    """Ten problems, of which each cell solves the first; DPO and MinorDPO, which has no answer to the last.

    DPO 2 of 10, MinorDPO 8 of 10: accuracies 0.2 and 0.8, difference 0.6.
    Better on problems 2 to 7, worse on none: 6 discordant of one sign, McNemar's p = 2 / 2^6 = 0.03125, one test only.
    Wilson of 8 of 10, z = 1.959964: (8 + z^2/2 -+ z sqrt(8 * 2 / 10 + z^2/4)) / (10 + z^2)
        = (9.9207 -+ 1.959964 * sqrt(2.5604)) / 13.8415 = (9.9207 -+ 3.1362) / 13.8415 = 0.4902 and 0.9433
    Logs of steps 1 to 3 are the step times 2: the last tenth is the last one: chosen 6, rejected 6, margin 6 - 3 = 3.
    """
    sweep = make_sweep(tmp_path, {"pref_loss": ["sigmoid", "minor_dpo"]})
    data = write_problems(tmp_path / "test.jsonl", 10)
    for cell, right, answered in zip(sweep.cells(), (2, 8), (10, 9), strict=True):
        train(sweep, cell, value=2.0)
        answers = {n: f"So the answer is: {n if n < right else 99}" for n in range(answered)}
        record_run(cell.folder / "scores" / "base", data, answers)
        words = ["--score-only", "--data", str(data), "--output", str(cell.folder / "scores")]
        assert CliRunner().invoke(gsm8k.app, words).exit_code == 0
        record(sweep, cell.name, "score", Record("done"))
    page, rows = report(sweep)
    minor = rows["minor_dpo"]
    assert [float(minor[f"final {name}"]) for name in ("chosen", "rejected", "margins")] == [6.0, 6.0, 3.0]
    assert [float(rows[name]["strict"]) for name in ("sigmoid", "minor_dpo")] == [0.2, 0.8]
    with (sweep.output / "report" / "tests.csv").open() as file:
        (test,) = csv.DictReader(file)
    assert test["method"] == "MinorDPO"
    numbers = ("accuracy", "accuracy of DPO", "difference", "problems better", "problems worse", "p", "p (Holm)")
    assert [float(test[name]) for name in numbers] == pytest.approx([0.8, 0.2, 0.6, 6, 0, 0.03125, 0.03125])
    _, minor_group = groups(read_results(sweep.output).cells)
    assert minor_group.wilson == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert [rows[name]["unanswered"] for name in ("sigmoid", "minor_dpo")] == ["0", "1"]
    for shown in ("<td>20.0</td>", "<td>80.0 (1 unanswered)</td>", "<td>49.0–94.3</td>", "<b>0.031</b>"):
        assert shown in page


def test_numbers_of_pairs_have_a_figure_of_their_own(tmp_path):
    sweep = make_sweep(tmp_path, {"pref_loss": ["sigmoid", "sr_dpo"], "max_samples": [256, 512]})
    for cell in sweep.cells():
        train(sweep, cell)
        score(sweep, cell.name, 5)
    page, rows = report(sweep)
    assert rows["sr_dpo-max_samples256"]["strict"] == "0.5"
    assert (sweep.output / "report" / "sizes.svg").is_file()
    assert not (sweep.output / "report" / "scores.svg").exists()
    assert "Number of pairs" in page


def test_methods_on_one_beta_have_figures_of_their_own(tmp_path):
    axes = [
        {"pref_loss": ["sigmoid", "minor_dpo"], "pref_beta": [0.02, 0.1]},
        {"pref_loss": "sr_dpo", "pref_beta": 0.1, "sr_lambda": [0.1, 0.3]},
    ]
    sweep = make_sweep(tmp_path, axes)
    for cell in sweep.cells():
        train(sweep, cell)
        score(sweep, cell.name, 5)
    report(sweep)
    names = ("scores", "scores_single", "rewards_lr5e-05", "rewards_lr5e-05_single")
    shown = {name: (sweep.output / "report" / f"{name}.svg").read_text() for name in names}
    for name, picture in shown.items():
        assert ("Sr-DPO sr_lambda=0.3" in picture) is name.endswith("single"), name
        assert ("MinorDPO" in picture) is not name.endswith("single"), name
    assert (sweep.output / "report" / "refinement_lr5e-05_beta0.1.svg").is_file()


def test_without_a_reference_and_without_scores(tmp_path):
    sweep = make_sweep(tmp_path, {"pref_loss": ["orpo"]}, evaluation=None)
    (cell,) = sweep.cells()
    train(sweep, cell, metrics=())
    page, rows = report(sweep)
    assert rows["orpo"]["final chosen"] == ""
    assert "There is no scored cell" in page


@pytest.mark.parametrize("changes", [{"problems": 8}, {"sha256": "of others"}])
def test_scores_on_different_problems_are_refused(sweep, changes):
    first, second, *_ = sweep.cells()
    train(sweep, first)
    score(sweep, first.name, 4)
    train(sweep, second)
    score(sweep, second.name, 4, **changes)
    with pytest.raises(UserError, match=f"{first.name} and {second.name} were scored on different problems"):
        report(sweep)
    assert not (sweep.output / "report").exists()


def test_scores_of_an_earlier_evaluation_are_not_shown(tmp_path):
    sweep = make_sweep(tmp_path, {"seed": [1]})
    (cell,) = sweep.cells()
    train(sweep, cell)
    score(sweep, cell.name, 4)
    evaluation = {"data": "openai/gsm8k", "engine": "hf", "script": tmp_path / "gsm8k.py", "options": {"limit": 5}}
    changed = make_sweep(tmp_path, {"seed": [1]}, evaluation=evaluation)
    _, rows = report(changed)
    assert rows[cell.name]["strict"] == ""
    assert rows[cell.name]["train"] == "done"


def test_numbers_that_are_not_finite(sweep):
    first, *_ = sweep.cells()
    train(sweep, first, value=float("nan"))
    _, rows = report(sweep)
    assert rows[first.name]["final chosen"] == "nan"


def test_the_page_is_one_file(sweep):
    page, _ = report(sweep)
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert "<link" not in page


def test_commands_and_hashes_to_repeat_it_are_on_the_page(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.jsonl"}}))
    (data / "pairs.jsonl").write_text("{}\n")
    sweep = Sweep(recipe=RECIPE | {"dataset_dir": str(data)}, axes={"seed": [1]}, output=tmp_path / "out")
    agenda = Agenda(sweep, sweep.cells())
    write_recipes(agenda, agenda.cells)
    write_sweep(agenda, Path("sweep.yaml"))
    train(sweep, sweep.cells()[0])
    page, _ = report(sweep)
    assert "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356" in page  # sha256 of "{}\n"
    assert " ".join(agenda.chains(agenda.cells)[0][0].words) in page
    assert "llamafactory-ext sweep sweep.yaml" in page


def changed(path, place, value):
    """A JSON file with another value in a place, given as keys and indices."""
    content = json.loads(path.read_text())
    within = content
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        *(("sweep.json", (key,), value) for key in ("cells", "data", "named", "sweep") for value in ("x", None, [])),
        *(("results.json", ("summary",), value) for value in ("x", [])),
        ("results.json", ("summary", "strict"), []),
        ("results.json", ("summary", "flexible"), 5),
        ("results.json", ("summary", "degeneration"), None),
        ("results.json", ("summary", "strict", "accuracy"), "x"),
        ("results.json", ("summary", "strict", "accuracy"), float("nan")),
        ("results.json", ("summary", "strict", "wilson_95"), [1]),
        ("results.json", ("rows", 0, "strict", "correct"), "x"),
        ("results.json", ("rows",), []),
        *(("trainer_state.json", ("log_history",), value) for value in ([1], None, "x", [{"loss": 1.0}])),
        *(("trainer_state.json", ("log_history", 0, "step"), value) for value in ("x", None, 1.5)),
        *(("trainer_state.json", ("log_history", 0, "normalized_rewards/chosen"), value) for value in ("x", 1e308)),
    ],
)
def test_a_changed_value_is_named(file, place, value, sweep):
    cell = sweep.cells()[0]
    train(sweep, cell)
    score(sweep, cell.name, right=5)
    report(sweep)
    changed(next(sweep.output.rglob(file)), place, value)
    with pytest.raises(UserError, match=rf"{re.escape(file)} is damaged \(.*\): remove it and run"):
        report(sweep)


def test_answers_read_by_different_rules_are_not_compared(sweep):
    first, second = sweep.cells()[:2]
    for cell in (first, second):
        train(sweep, cell)
        score(sweep, cell.name, right=5)
    changed(next((sweep.output / "cells" / first.name).rglob("results.json")), ("extractor",), "2")
    with pytest.raises(UserError, match=r"were read by versions 2 and None of the extractor: score both"):
        report(sweep)


def test_a_recipe_with_other_than_numbers_is_named(sweep):
    cell = sweep.cells()[0]
    train(sweep, cell)
    (cell.folder / "recipe.yaml").write_text("pref_beta: {a: 1}")
    with pytest.raises(UserError, match=r"recipe.yaml is damaged \(pref_beta is no number\)"):
        report(sweep)


@pytest.mark.parametrize("value", ["x", [], {"a": 1}])
def test_a_record_with_odd_values_counts_as_none(value, sweep):
    cell = sweep.cells()[0]
    train(sweep, cell)
    for key in ("seconds", "error"):
        changed(cell.folder / "train.json", (key,), value)
        report(sweep)
