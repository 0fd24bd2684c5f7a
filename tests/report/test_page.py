"""The page of a sweep in every state: nothing run, some failed, some missing, no scores, no reference, not finite."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from recorded import record_run, write_problems
from recorded_sweeps import RECIPE, make_sweep, record, score, score_pairs, train
from typer.testing import CliRunner

from llamafactory_ext import __version__
from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation import gsm8k
from llamafactory_ext.report import page as page_module
from llamafactory_ext.report.page import write_report
from llamafactory_ext.report.table import groups
from llamafactory_ext.sweep.files import write_recipes, write_sweep
from llamafactory_ext.sweep.records import Record
from llamafactory_ext.sweep.results import read_results
from llamafactory_ext.sweep.spec import Sweep
from llamafactory_ext.sweep.tasks import Agenda
from llamafactory_ext.training.monitors import STOPPED

AXES = {"pref_loss": ["sigmoid", "minor_dpo"], "learning_rate": [1e-5], "pref_beta": [0.02, 0.2]}
SVG = {"SVG": "svg"}


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path, AXES)


def report(sweep, figure_files=SVG):
    """The page and the rows of the table of cells; the page shows SVG, and other files of figures take far longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "FIGURE_FILES", figure_files)
        page = write_report(sweep.output, sweep.output / "report").read_text(encoding="utf-8")
    with (sweep.output / "report" / "cells.csv").open() as file:
        return page, {row["cell"]: row for row in csv.DictReader(file)}


def test_nothing_has_run(sweep):
    page, rows = report(sweep)
    assert '<b class="missing">4</b> cells missing' in page
    assert list(rows) == ["base", *(cell.name for cell in sweep.cells())]
    assert not (sweep.output / "report" / "scores.svg").exists()


def test_some_cells_are_missing_and_some_have_failed(sweep):
    first, second, third, _ = sweep.cells()
    train(sweep, first)
    score(sweep, first.name, 4)
    train(sweep, third)
    score(sweep, third.name, 9)
    score(sweep, "base", 5)
    record(sweep, second.name, "train", Record("failed", error="ValueError: <no> such thing"))
    page, rows = report(sweep)
    for count, cells, state in ((2, "cells", "done"), (1, "cell", "failed"), (1, "cell", "missing")):
        assert f'<b class="{state}">{count}</b> {cells} {state}' in page
    assert "ValueError: &lt;no&gt; such thing" in page
    assert rows[first.name]["strict"] == "0.4"
    assert rows[first.name]["final chosen"] == "3.0"
    assert rows[second.name]["error"] == "ValueError: <no> such thing"
    assert rows["base"]["strict"] == "0.5"
    assert "50.0%</b> base, untrained, of 10 problems" in page
    assert (sweep.output / "report" / "rewards_lr1e-05.svg").is_file()
    tests = (sweep.output / "report" / "tests.csv").read_text().splitlines()
    assert tests[1].startswith("MinorDPO,1e-05,0.02,0.9,0.4,0.5,5,0,0.0625,0.0625")
    assert '<td class="failed">30.0 (1 flagged)</td>' in page
    assert "<td>base, untrained</td><td></td><td>30.0</td>" in page, "beside what training did"


def test_a_run_that_was_stopped_says_where(sweep):
    first, second, *_ = sweep.cells()
    for cell in (first, second):
        train(sweep, cell)
    file = second.model / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"][-1][STOPPED] = 1.0
    file.write_text(json.dumps(state))
    page, rows = report(sweep)
    assert page.count("stopped at step") == page.count("done: stopped at step 3, degenerating") == 1
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
    for shown in ("<td>20.0</td>", "<td>80.0</td>", "<td>49.0–94.3</td>", '<td class="strong">0.031</td>'):
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
        assert ("Sr-DPO, sr_lambda = 0.3" in picture or "sr_lambda = 0.3" in picture) is name.endswith("single"), name
        assert ("MinorDPO" in picture) is not name.endswith("single"), name
    assert (sweep.output / "report" / "refinement_lr5e-05_beta0.1.svg").is_file()


def test_without_a_reference_and_without_scores(tmp_path):
    sweep = make_sweep(tmp_path, {"pref_loss": ["orpo"]}, gsm8k=None)
    (cell,) = sweep.cells()
    train(sweep, cell, metrics=())
    page, rows = report(sweep)
    assert rows["orpo"]["final chosen"] == ""
    assert "There is nothing to test: no scored method has a scored DPO cell" in page
    assert "No model has been scored on problems yet" in page


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
    changed = make_sweep(tmp_path, {"seed": [1]}, gsm8k=evaluation)
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


def test_the_page_says_when_and_by_which_version_it_was_written(sweep, monkeypatch):
    monkeypatch.setattr(page_module, "today", lambda: "2026-01-31")
    page, _ = report(sweep)
    assert f"Report of 2026-01-31 by llamafactory-ext {__version__}." in page


def test_the_best_cell_is_linked_to_its_row(sweep):
    for right, cell in enumerate(sweep.cells(), start=3):
        train(sweep, cell)
        score(sweep, cell.name, right)
    page, _ = report(sweep)
    best = sweep.cells()[-1].name
    assert f'<a href="#cell-{best}">{best}</a>, 60.0% strict accuracy.' in page
    assert page.count(f'<tr id="cell-{best}">') == 1


def test_equal_cells_are_counted(sweep):
    for cell in sweep.cells():
        train(sweep, cell)
        score(sweep, cell.name, 5)
    page, _ = report(sweep)
    assert f"{sweep.cells()[0].name}</a>, 50.0% strict accuracy, the first of 4 with this score." in page


def test_every_link_leads_somewhere_and_every_file_is_linked(sweep):
    for cell in sweep.cells():
        train(sweep, cell)
        score(sweep, cell.name, 5)
    page, _ = report(sweep, page_module.FIGURE_FILES)
    links = set(re.findall(r'href="([^"]+)"', page))
    places = {link[1:] for link in links if link.startswith("#")}
    assert places <= set(re.findall(r' id="([^"]+)"', page))
    files = {path.name for path in (sweep.output / "report").iterdir()}
    assert {link for link in links if not link.startswith("#")} == files - {"index.html"}
    figures = re.findall(r'<h2 id="([^"]+)">[^<]*</h2>\s*<figure>', page)
    tables = re.findall(r'<h2 id="([^"]+)">[^<]*</h2>\s*<p class="caption">', page)
    assert {"scores", "rewards_lr1e-05"} < set(figures)
    assert {"claims_minor_dpo", "degeneration", "tests", "cells"} == set(tables)
    assert files >= {f"{name}.{suffix}" for name in figures for suffix in ("png", "svg", "pdf")}
    assert files >= {f"{name}.{suffix}" for name in tables for suffix in ("csv", "tex")}
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert (sweep.output / "report" / f"scores.{suffix}").read_bytes().startswith(start)
    assert b"/Type3" not in (sweep.output / "report" / "scores.pdf").read_bytes()


def test_held_out_rows_have_their_number_of_pairs_and_intervals(tmp_path):
    """Two seeds of four pairs: per pair, mean margins 1, 2, 3, -2; their mean is 1 and their deviation sqrt(14 / 3).

    Student's t with 3 degrees of freedom: 1 -+ 3.182446 * sqrt(14 / 3) / 2 = -2.4374 and 4.4374.
    Accuracy: 3 of 4 pairs in both seeds. Wilson: (3 + 1.9207 -+ 1.96 sqrt(0.75 + 0.9604)) / 7.8415 = 0.3006, 0.9544.
    """
    sweep = make_sweep(tmp_path, {"pref_loss": ["sigmoid"], "seed": [1, 2]}, pairs={"dataset": "others"})
    for cell, margins in zip(sweep.cells(), ((0, 2, 4, -2), (2, 2, 2, -2)), strict=True):
        train(sweep, cell)
        score_pairs(sweep, cell, [margin or 0.001 for margin in margins])
    page, rows = report(sweep)
    with (sweep.output / "report" / "pairs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["pairs"] == "4"
    numbers = ("margin", "margin low", "margin high", "accuracy", "accuracy low", "accuracy high")
    expected = [1, -2.4374, 4.4374, 0.75, 0.3006, 0.9544]
    assert [float(row[name]) for name in numbers] == pytest.approx(expected, abs=1e-3)
    assert "<td>4</td><td>1.00</td><td>−2.44 to 4.44</td><td>75.0</td><td>30.1–95.4</td></tr>" in page
    assert "augmented accuracy</th>" not in page, "no column for what was not measured"
    assert {rows[cell.name]["held-out pairs"] for cell in sweep.cells()} == {"4"}


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
    assert " ".join(agenda.chains(agenda.cells)[0][0].argv) in page
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
    changed(next(sweep.output.rglob(file)), place, value)
    with pytest.raises(UserError, match=rf"{re.escape(file)} is damaged \(.*\): remove it, then run"):
        report(sweep)


def test_answers_read_by_different_rules_are_not_compared(sweep):
    first, second = sweep.cells()[:2]
    for cell in (first, second):
        train(sweep, cell)
        score(sweep, cell.name, right=5)
    changed(next((sweep.output / "cells" / first.name).rglob("results.json")), ("extractor",), "2")
    with pytest.raises(UserError, match=r"different versions of the extractor \(2 and None\): score both"):
        report(sweep)


def test_a_recipe_with_other_than_numbers_is_named(sweep):
    cell = sweep.cells()[0]
    train(sweep, cell)
    (cell.folder / "recipe.yaml").write_text("pref_beta: {a: 1}")
    with pytest.raises(UserError, match=r"recipe.yaml is damaged \(pref_beta is not a number\)"):
        report(sweep)


@pytest.mark.parametrize("value", ["x", [], {"a": 1}])
def test_a_record_with_odd_values_counts_as_none(value, sweep):
    cell = sweep.cells()[0]
    train(sweep, cell)
    for key in ("seconds", "error"):
        changed(cell.folder / "train.json", (key,), value)
        report(sweep)


@pytest.mark.parametrize(("dataset", "told"), [("pairs", 1), ("others", 0)])
def test_a_sweep_that_trains_on_its_held_out_pairs_says_so(dataset, told, tmp_path):
    page, _ = report(make_sweep(tmp_path, {"pref_loss": ["sigmoid"]}, pairs={"dataset": dataset}))
    note = "Cells train on the held-out pairs &#39;pairs&#39;: their scores say nothing about new pairs."
    assert page.count(note) == told
