"""`llamafactory-ext sweep` and `report` on a tiny model: real trainings, real scores, real kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from sweeps import PATH, make_place, sweep, write_sweep
from sweeps import report as report_of

from llamafactory_ext.sweep.results import read_results

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SWEEP_KILLS", "3"))
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, data, problems, and a sweep with a cell that fails."""
    folder = make_place(tmp_path_factory.mktemp("sweep"))
    write_sweep(folder, "full", finetuning_type="full", axes=[
        {"pref_loss": ["sigmoid", "minor_dpo"], "pref_beta": [0.02, 0.2], "seed": [1, 2]},
        {"pref_loss": "sr_dpo", "sr_lambda": 0.3, "pref_beta": 0.2, "seed": 1},
        {"pref_loss": "sigmoid", "model_name_or_path": "model", "max_grad_norm": "much"},
    ])  # fmt: skip
    return folder


def states(folder):
    return {cell.name: cell.records["train"].state for cell in read_results(folder).cells if cell.records}


@pytest.fixture(scope="module")
def full(place):
    """The sweep left alone."""
    run = sweep(place, "full.yaml")
    assert run.returncode == 1, run.stdout + run.stderr
    return run


def failing(found):
    return [name for name, state in found.items() if state == "failed"]


def test_a_dry_run_runs_nothing(place):
    run = sweep(place, "full.yaml", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "10 cells" in run.stdout
    assert "10 cells, 60 steps" in run.stdout
    assert not (place / "full" / "cells").exists()


def test_every_cell_is_trained_and_scored_and_a_failed_one_stops_no_other(place, full):
    found = states(place / "full")
    assert len(found) == 10
    assert failing(found) == ["sigmoid-model_name_or_pathmodel-max_grad_normmuch"]
    assert sorted(found.values()) == ["done"] * 9 + ["failed"]
    assert "failed: train sigmoid-model_name_or_pathmodel-max_grad_normmuch" in full.stdout
    results = read_results(place / "full")
    for cell in results.cells:
        if cell.is_trained:
            assert cell.summary["problems"] == 5
            assert cell.pairs.pairs == 5
            assert len(cell.log_history) > 5
            assert "trains" in (cell.folder / "train.log").read_text()
    assert [base.summary["problems"] for base in results.bases] == [5]


def test_the_reference_was_computed_once_for_all(place, full):
    logs = {path.parent.name: path.read_text() for path in (place / "full" / "cells").glob("*/train.log")}
    asked = [name for name, log in logs.items() if "reference log-probabilities: 100%" in log.lower()]
    plain = [name for name in asked if not name.startswith("sr_")]
    assert len(plain) <= 1, asked
    assert len(list((place / "full" / "references").iterdir())) >= 1


def test_again_does_nothing_but_say_so(place, full):
    before = {path: path.stat().st_mtime_ns for path in (place / "full" / "cells").rglob("*.json")}
    run = sweep(place, "full.yaml")
    assert run.returncode == 1
    assert "failed:" in run.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_rerun_failed_tries_again(place, full):
    log = place / "full" / "cells" / "sigmoid-model_name_or_pathmodel-max_grad_normmuch" / "train.log"
    attempts = log.read_text().count(" $ llamafactory-cli")
    sweep(place, "full.yaml", "--only", "*much*", "--rerun-failed")
    assert log.read_text().count(" $ llamafactory-cli") == attempts + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing*"], "no cell matches nothing*; the cells are sigmoid-beta0.02-seed1"),
        (["--launcher", "slurm"], "Slurm needs a time limit: write a cell's minutes"),
    ],
)
def test_refused(words, message, place, full):
    run = sweep(place, "full.yaml", *words)
    assert run.returncode == 2
    assert message in run.stderr


def test_another_recipe_for_a_trained_cell_is_refused(place, full):
    changed = yaml.safe_load((place / "full.yaml").read_text())
    changed["recipe"]["learning_rate"] = 0.5
    (place / "changed.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    run = sweep(place, "changed.yaml")
    assert run.returncode == 2
    assert "was trained with another `learning_rate`: write another `output`" in run.stderr


def numbers(folder):
    """Everything that was measured in a sweep: logs, answers, scored pairs."""
    found = {}
    for cell in sorted((folder / "cells").iterdir()):
        state = cell / "model" / "trainer_state.json"
        if state.is_file():
            history = json.loads(state.read_text())["log_history"]
            found[cell.name, "log"] = [
                {k: v for k, v in log.items() if "per_second" not in k and "runtime" not in k} for log in history
            ]
        for name in ("scores/base/generations.jsonl", "pairs.jsonl"):
            if (cell / name).is_file():
                rows = [json.loads(line) for line in (cell / name).read_text().splitlines()]
                found[cell.name, name] = sorted(rows, key=lambda row: row["index"])
    return found


def test_killed_again_and_again_it_ends_with_the_same_cells(place, full):
    settings = yaml.safe_load((place / "full.yaml").read_text())
    (place / "killed.yaml").write_text(yaml.safe_dump(settings | {"output": "killed"}, sort_keys=False))
    rng = random.Random(KILLS)
    command = [sys.executable, "-m", "llamafactory_ext.cli", "sweep", "killed.yaml"]
    for kill in range(KILLS):
        process = subprocess.Popen(
            command, cwd=place, env=os.environ | {"PATH": PATH}, start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(rng.uniform(5, 22))
        except subprocess.TimeoutExpired:
            # By turns the sweep alone, whose commands go on, and everything at once, as when a machine goes down.
            (os.kill if kill % 2 else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
    run = sweep(place, "killed.yaml")
    assert run.returncode == 1, run.stdout + run.stderr
    assert states(place / "killed") == states(place / "full")
    assert numbers(place / "killed") == numbers(place / "full")
    leftovers = list((place / "killed" / "cells").rglob("*.unfinished"))
    assert leftovers == []


def test_adapters_are_scored_in_one_load(place, full):
    axes = {"pref_loss": ["sigmoid", "minor_dpo"], "pref_beta": 0.2}
    write_sweep(place, "lora", axes, finetuning_type="lora", lora_rank=4)
    run = sweep(place, "lora.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    results = read_results(place / "lora")
    assert [cell.summary["problems"] for cell in results.cells] == [5, 5]
    assert [base.summary["problems"] for base in results.bases if base.summary] == [5]
    assert (place / "lora" / "adapters" / "score.log").read_text().count(" $ ") == 1
    assert all(cell.pairs.pairs == 5 for cell in results.cells)


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(place, full):
    run = report_of(place, "full")
    assert run.returncode == 0, run.stderr
    return place / "full" / "report"


def test_the_report_shows_every_cell(report):
    page = (report / "index.html").read_text()
    rows = (report / "cells.csv").read_text().splitlines()
    assert len(rows) == 1 + 10 + 1
    for name in (
        "sigmoid-beta0.02-seed1",
        "minor_dpo-beta0.2-seed2",
        "sigmoid-model_name_or_pathmodel-max_grad_normmuch",
    ):
        assert name in page
    assert page.count("data:image/svg+xml") >= 3
    assert "much" in page
    for figure in ("scores", "rewards_lr0.01", "coefficient"):
        assert (report / f"{figure}.png").is_file()
        assert (report / f"{figure}.svg").is_file()
    assert "Sr-DPO sr_lambda=0.3" in (report / "tests.csv").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_asks_nobody(width, report):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{report / 'index.html'}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(box["width"] > 300 for box in [svg.bounding_box() for svg in page.query_selector_all("figure img")])
        browser.close()
    assert asked == [f"file://{report / 'index.html'}"]
    assert errors == []


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    command = [sys.executable, "-m", "llamafactory_ext.cli", "report", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "holds no sweep.json: name the `output`" in run.stderr
