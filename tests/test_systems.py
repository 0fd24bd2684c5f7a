"""The benchmark of three systems: its mixes of pairs, what it counts, by hand, and its runs on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import systems
import training_runs
from rich.console import Console
from systems_count import Work, scored, work
from systems_data import EXAMPLES, MIXES, long_prompt, share_prompt, write_mix
from systems_report import Mix, Side, plot, show
from tiny import make_data, make_model, make_pairs
from training_report import Case
from training_runs import FULL, Runner
from training_watch import pair_tokens, sequences
from typer.testing import CliRunner

from llamafactory_ext.data.corruption import PROMPT
from llamafactory_ext.errors import UserError

TRL = Path(__file__).parents[1] / ".venv-trl" / "bin" / "python"


def pair(question, chosen, rejected="no"):
    return {"instruction": PROMPT + question, "chosen": chosen, "rejected": rejected}


# --- mixes -----------------------------------------------------------------------------------------------------------


def test_unrelated_responses_differ_from_the_first_token_on_and_are_about_as_long():
    pairs = [pair("a", "One two"), pair("b", "Once more"), pair("c", "Twice, at length"), pair("d", "Six")]
    mixed = share_prompt(pairs)
    assert [each["rejected"] for each in mixed] == ["Six", "Six", "Once more", "One two"]
    assert [each["chosen"] for each in mixed] == [each["chosen"] for each in pairs]


def test_long_prompts_hold_solved_problems_of_their_own():
    solved = [pair(f"question {n}", f"solution {n} " + "." * 200) for n in range(2 * EXAMPLES + 1)]
    first, second = long_prompt([*solved, *(pair(f"short {n}", f"{n}", "-1") for n in range(3))])
    assert first["instruction"].startswith(f"{PROMPT}question 0\nsolution 0 ")
    assert first["instruction"].endswith("\n\nshort 0")
    assert first["instruction"].count("solution") == second["instruction"].count("solution") == EXAMPLES
    assert (first["chosen"], first["rejected"]) == ("0", "-1")
    assert f"question {EXAMPLES}\n" not in first["instruction"]
    assert f"question {EXAMPLES}\n" in second["instruction"]


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_registered_or_too_small(tmp_path, mix):
    source = tmp_path / "pairs.jsonl"
    rows = [pair(f"q{n}", f"{'ab'[n % 2]} {'.' * 200 * (n < 8)}") for n in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    written = write_mix(source, tmp_path / "data", mix, 2)
    assert len(written.read_text(encoding="utf-8").splitlines()) == 2
    registered = json.loads((tmp_path / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    assert registered[mix]["file_name"] == written.name
    with pytest.raises(UserError, match=rf"pairs of {mix} where 13 are needed"):
        write_mix(source, tmp_path / "data", mix, 13)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_scored_tokens():
    # A prompt of 4: responses of 6 and 4 tokens that begin with the same 2, or differ within the prompt.
    assert scored((10, 8, 6), prompt=4, shared=False) == 10
    assert scored((10, 8, 6), prompt=4, shared=True) == 8
    assert scored((10, 8, 3), prompt=4, shared=True) == 10


def test_work():
    # 9 of 10 parameters are in the head; two pairs with prompts of 4 and 3.
    run = {
        "pairs": [(10, 8, 6), (5, 5, 3)],
        "positions": 32,
        "parameters": 10,
        "vocabulary": 3,
        "hidden": 3,
        "layers": 2,
    }

    def counted(system, chunk=100):
        return work(system, 1, [4, 3], run, chunk)

    body = 6 * 1 * 32
    seen, seen_once = (10**2 + 8**2 + 5**2 + 5**2) / 2, (10**2 + 8**2 + 5**2 + 5**2 - 6**2 - 3**2) / 2
    assert counted("stock") == Work(16, 16, (body + 9 * 6 * 32 + 72 * seen) / 2)
    # Without the last position of each of four rows; the logits twice.
    assert counted("trl") == Work(16, 14, (body + 9 * 8 * 28 + 72 * seen) / 2)
    assert counted("trl_narrow") == Work(16, 7, (body + 9 * 8 * 14 + 72 * seen) / 2)
    assert counted("ours") == Work(16, 6, (body + 9 * 6 * 12 + 72 * seen_once) / 2)
    # 8 * 3 logits of the first pair, more than a chunk, are computed twice, the 4 * 3 of the second once.
    assert counted("ours", chunk=20).operations == (body + 9 * (6 * 12 + 2 * 8) + 72 * seen_once) / 2


def test_rows_of_either_system_are_the_same_sequences():
    theirs = {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2, 4, 5]}
    assert sequences({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}) == sequences(theirs)


# --- the report ------------------------------------------------------------------------------------------------------


def side(system, micro_batch, seconds, peaks, operations, losses=(0.7, 0.5), in_reference=0.0):
    trials = dict.fromkeys(peaks, 1.0)
    return Side(system, micro_batch, [seconds], in_reference, list(losses), trials, peaks, Work(9, 9, operations))


@pytest.fixture
def mix():
    return Mix(
        "share_prompt",
        [(10, 8, 6), (5, 5, 2)],
        4.0,
        [
            side("stock", 1, 9.0, {1: 100, 2: 300}, 500.0, in_reference=3.0),
            side("trl", 2, 8.0, {1: 80, 2: 140, 4: 200}, 600.0),
            side("trl_narrow", 1, 6.0, {1: 50, 2: 90}, 400.0, losses=(0.7, 0.75)),
            side("ours", 4, 2.0, {1: 20, 2: 63, 4: 100, 8: 400}, 200.0),
        ],
    )


def test_ratios_and_goals(mix):
    assert (mix.fastest.system, mix.speed, mix.counted) == ("trl_narrow", 3.0, 2.0)
    assert mix.memory == pytest.approx(63 / 90)  # not 20 / 50, 100 / 200, or that of 8, which only ours was tried at
    assert mix.loss_difference == 0.25
    assert [(target.value, target.reached) for target in mix.targets] == [
        (3.0, True),
        (pytest.approx(0.7), False),
        (100 / 50, False),
    ]


def test_what_is_shown_and_written(mix, tmp_path):
    console = Console(record=True, width=160, file=StringIO())
    show({"commit": "abc"}, [mix], console)
    shown = " ".join(console.export_text().split())
    assert "2 pairs of 14 tokens, 10 with the shared prefix once, 4 in the prompt" in shown
    assert "ours is 3.00 times as fast as TRL narrow, which computes 2.00 times as many operations" in shown
    written = json.loads(json.dumps(mix.as_json()))
    assert [each["seconds"] for each in written["sides"]] == [9.0, 8.0, 6.0, 2.0]
    assert written["targets"][0]["reached"]
    plot([mix], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_trials_end_before_the_limit():
    class Linear:
        def trial(self, case, pairs):
            assert pairs == 8
            return {"bytes": 10 * case.micro_batch}

    settings = SimpleNamespace(micro_batches=[8, 4, 2, 1], memory=40)
    assert list(systems.tried(Linear(), "trl", settings)) == [1, 2, 4]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(model, tmp_path):
    data = make_data(tmp_path / "data")
    return Runner(model, "smollm2", data / "pairs.jsonl", "pairs", tmp_path / "out", FULL, TRL)


@pytest.mark.slow
def test_a_trial_takes_the_same_pairs_at_each_micro_batch(runner):
    trial = runner.trial(Case("ours", "sigmoid", 2), 4)
    assert len(trial["seconds"]) == 2  # the third micro-batch is the one whose peak is taken
    assert trial["per_pair"] == pytest.approx(sum(trial["seconds"]) / 4)
    assert trial["bytes"] > 0


@pytest.mark.slow
def test_tokens_are_those_that_are_trained_on(runner, monkeypatch):
    rows = json.loads(runner.tokens().read_text(encoding="utf-8"))["rows"]
    trained = runner.seconds(Case("stock", "sigmoid", 2), turn=0, global_batch=2, steps=1)
    assert [list(pair_tokens(*sequences(row))) for row in rows[:4]] == trained["pairs"]
    assert len(rows) == 12
    assert all(0 < reference < step for reference, step in zip(trained["reference"], trained["steps"], strict=True))

    def fail(*args, **kwargs):
        raise AssertionError("it was run again")

    monkeypatch.setattr(training_runs, "_launch", fail)
    runner.tokens()
    make_pairs(runner.data, 11)
    with pytest.raises(AssertionError):  # the same file, but other pairs
        runner.tokens()


@pytest.mark.slow
@pytest.mark.skipif(not TRL.is_file(), reason="make trl-env")
@pytest.mark.parametrize("system", ["trl", "trl_narrow"])
def test_trl_trains_what_llamafactory_does(runner, system, tmp_path):
    # Saved in float32, because LLaMA-Factory leaves a reference in the precision that it was saved in.
    runner = replace(runner, model=make_model(tmp_path / "model", seed=1, dtype="float32"))
    theirs, stock = (
        runner.seconds(Case(each, "sigmoid", size), turn=0, global_batch=4, steps=1)
        for each, size in ((system, 1), ("stock", 2))
    )
    assert theirs["pairs"] == stock["pairs"]
    assert theirs["losses"] == pytest.approx(stock["losses"], abs=1e-5)
    # A pair at a time: two rows as long as the longer.
    assert theirs["positions"] == sum(2 * max(chosen, rejected) for chosen, rejected, _ in theirs["pairs"])


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "nowhere"], "there is no model in nowhere: run `make model`"),
        (["--data", "nowhere.jsonl"], "llamafactory-ext data corrupt train.jsonl --output nowhere.jsonl"),
        (["--micro-batch", "3"], "--global-batch 16 is no multiple of --micro-batch 3"),
        (["--clock", "sun"], "--clock sun is none of wall, cpu"),
        (["--system", "verl"], "--system verl is none of stock, trl, trl_narrow, ours"),
        (["--system", "stock"], "--system ours is compared with another one: name both"),
        (["--mix", "short"], "--mix short is none of differ_late, share_prompt, long_prompt"),
        (["--trl", "nowhere/bin/python"], "nowhere/bin/python has no TRL: run `make trl-env`"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(model, data, tmp_path, words, sentence):
    named = ["--model", str(model), "--data", str(data / "pairs.jsonl"), "--output", str(tmp_path)]
    result = CliRunner().invoke(systems.app, [*named, *words])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
