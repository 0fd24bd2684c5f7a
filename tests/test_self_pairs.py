"""The loop on a model's own answers: what it starts from, its steps in order, and all of it with a small model."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from crashes import walk

from llamafactory_ext.data.corruption import Problem
from llamafactory_ext.evaluation.extraction import extract_answer
from llamafactory_ext.evaluation.questions import load_questions
from llamafactory_ext.recipe.reading import parse_recipe
from llamafactory_ext.whole_files import write_whole

ROOT = Path(__file__).parents[1]
LOOP = ROOT / "examples" / "self_pairs_gsm8k"
sys.path.insert(0, str(LOOP))

import self_pairs  # noqa: E402
import toy  # noqa: E402

SCORES = {"problems": 9, "strict": {"accuracy": 0.5, "wilson_95": [0.3, 0.7]}}
RATES = {"pass@1": 0.4, "wilson_95": [0.3, 0.5], "solved": 0.6}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_problem_is_in_two_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SIZES", {"sft": 30, "train": 20, "test": 10})
    toy.make_data(tmp_path)
    solved = {row["instruction"] for row in lines(tmp_path / "sft.jsonl")}
    asked = [{question.text for question in load_questions(str(tmp_path / f"{n}.jsonl"))[0]} for n in ("train", "test")]
    sets = [solved, *asked]
    assert [len(each) for each in sets] == [30, 20, 10]
    assert not any(a & b for a, b in itertools.combinations(sets, 2))


@pytest.mark.parametrize("path", sorted(LOOP.glob("*minor_dpo.yaml")), ids=lambda path: path.stem)
def test_a_round_trains_from_its_reference(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe["pref_loss"] == "minor_dpo"
    assert recipe["dataset"] == "self_pairs"
    assert not {"ref_model", "adapter_name_or_path"} & set(recipe)  # else the reference were another model
    parse_recipe(recipe | {"bf16": False})


# --- the steps, with commands that only write what the real ones write -----------------------------------------------


def fake_run(*words, log=None):
    named = dict(itertools.pairwise(map(str, words)))
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    if "from-samples" in words:
        pairs = Path(named["--output"])
        write_whole(pairs, (Path(named["from-samples"]) / "pass_rates.json").read_text())
        write_whole(pairs.with_name("dataset_info.json"), "{}")
    elif words[0] == "llamafactory-cli":
        model = Path(keys["output_dir"])
        assert not model.exists()
        write_whole(model / "config.json", json.dumps(keys))
        write_whole(model / "all_results.json", "{}")
    elif "evaluation/sample.py" in words:
        write_whole(Path(named["--output"]) / "pass_rates.json", json.dumps({"base": RATES, "of": named["--model"]}))
    elif "evaluation/gsm8k.py" in words:
        write_whole(Path(named["--output"]) / "results.json", json.dumps({"base": SCORES, "of": named["--model"]}))
    else:
        assert words[:3] == ("llamafactory-ext", "eval", "compare")


@pytest.fixture
def faked(monkeypatch):
    def make(folder, *_):
        folder.mkdir(parents=True)
        write_whole(folder / "made", "")

    monkeypatch.setattr(self_pairs, "run", fake_run)
    monkeypatch.setattr(self_pairs, "draw", lambda rounds, path: write_whole(path, "drawn"))
    monkeypatch.setattr(self_pairs, "make_data", make)
    monkeypatch.setattr(self_pairs, "make_model", make)
    monkeypatch.setattr(sys, "argv", ["self_pairs.py"])


def in_a_checkout(folder):
    """The loop in a folder that looks like the checkout."""
    (folder / "examples" / "self_pairs_gsm8k").mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        self_pairs.main()


def results(folder):
    """All files but logs and locks."""
    base = folder / "outputs" / "self_pairs"
    return {
        str(path.relative_to(base)): path.read_text()
        for path in base.rglob("*")
        if path.is_file() and "log" not in path.suffix
    }


@pytest.mark.slow
def test_every_crash_leads_to_the_same_end(faked, tmp_path, monkeypatch):
    monkeypatch.setattr(self_pairs, "ROUNDS", 1)
    assert walk(in_a_checkout, tmp_path / "checkout", results, most=2000) >= 20


def test_each_round_starts_from_the_model_before(faked, tmp_path):
    in_a_checkout(tmp_path)
    found = results(tmp_path)
    start = "outputs/self_pairs/toy/"
    for number, before in ((1, "start"), (2, "round1/model")):
        assert json.loads(found[f"toy/round{number}/samples/pass_rates.json"])["of"] == start + before
        trained = json.loads(found[f"toy/round{number}/model/config.json"])
        assert trained["model_name_or_path"] == start + before
        assert trained["dataset_dir"] == f"{start}round{number}/data"
    scored = [json.loads(found[f"toy/scores/round{number}/results.json"])["of"] for number in range(3)]
    assert scored == [start + name for name in ("start", "round1/model", "round2/model")]
    table = found["toy/rounds.md"].splitlines()
    assert table[2] == "| 0 | 50.0% (30.0-70.0) | 40.0% (30.0-50.0) | 60.0% |"
    assert table[4] == "| 2 | 50.0% (30.0-70.0) |  |  |"


def test_the_plot_shows_both_rates(tmp_path):
    rounds = [
        {"round": number, "problems": 9, "greedy": SCORES["strict"], "sampled": RATES if number < 2 else {}}
        for number in range(3)
    ]
    self_pairs.draw(rounds, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").stat().st_size > 5_000


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wrong_arguments_stop_at_once(tmp_path):
    for folder, words, message in (
        (tmp_path, [], "run it in the checkout's folder"),
        (ROOT, ["--gsm8k", str(tmp_path)], "has no train.jsonl"),
    ):
        command = [sys.executable, str(LOOP / "self_pairs.py"), *words]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert run.returncode == 2
        assert message in run.stderr


def coins(seed):
    """Problems whose answer no model can know: it is right every other time, and can be so at once."""
    rng = random.Random(seed)
    for number in itertools.count():
        yield Problem(f"Coin {number:05d}: heads or tails?", "I toss it.", str(rng.randint(0, 1)))


@pytest.mark.slow
def test_the_whole_loop_with_a_model_that_guesses(tmp_path, monkeypatch):
    """SFT, two rounds and three scores: the real commands, on problems that need seconds of training."""
    monkeypatch.setattr(toy, "SIZES", {"sft": 1280, "train": 24, "test": 16})
    monkeypatch.setattr(toy, "generate", coins)
    monkeypatch.setattr(sys, "argv", ["self_pairs.py"])
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("examples", "evaluation", "data"):
        (checkout / name).symlink_to(ROOT / name)
    in_a_checkout(checkout)
    folder = checkout / "outputs" / "self_pairs" / "toy"
    for number in (1, 2):
        pairs = lines(folder / f"round{number}" / "data" / "self_pairs.jsonl")
        assert len(pairs) >= 8
        for pair in pairs:
            assert extract_answer(pair["chosen"]) != extract_answer(pair["rejected"])
    weights = [folder / name / "model.safetensors" for name in ("start", "round1/model", "round2/model")]
    assert len({path.read_bytes() for path in weights}) == 3
    assert len((folder / "rounds.md").read_text(encoding="utf-8").splitlines()) == 5
    assert (folder / "rounds.png").is_file()

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    for undone in (folder / "round2" / "model", folder / "scores" / "round2"):
        shutil.rmtree(undone)
    in_a_checkout(checkout)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert {path for path in after if after[path] != before[path]} == {weights[2]}
