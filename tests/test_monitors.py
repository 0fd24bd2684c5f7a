"""Whether a run degenerates, and what is done about it."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
from llamafactory.train import tuner
from tiny import recipe
from transformers import TrainerControl

from llamafactory_ext.plots import reward_figure
from llamafactory_ext.training.monitors import (
    DEGENERATING,
    FALL,
    IN_A_ROW,
    PER_TOKEN,
    STOPPED,
    DegenerationMonitor,
    describe,
    problem,
    read_trainer_log,
    stopped_at,
)


def log(chosen: float, rejected: float, **others: float) -> dict[str, float]:
    return {
        "loss": 0.5,
        "logps/chosen": -50.0,
        "logps/rejected": -60.0,
        "normalized_rewards/chosen_per_token": chosen,
        "normalized_rewards/rejected_per_token": rejected,
        **others,
    }


SUNK, DPO_AS_USUAL, WELL = log(-2 * FALL, -3 * FALL), log(-FALL / 2, -3 * FALL), log(0.1, -0.1)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], None),
        ([WELL] * 5, None),
        ([DPO_AS_USUAL] * 5, None),  # rejected responses alone are meant to fall
        ([log(-2 * FALL, 0.0)] * 5, None),
        ([SUNK] * (IN_A_ROW - 1), None),
        ([SUNK] * IN_A_ROW, "fallen"),
        ([WELL, *[SUNK] * IN_A_ROW], "fallen"),
        ([SUNK, WELL, *[SUNK] * (IN_A_ROW - 1)], None),
        ([*[SUNK] * IN_A_ROW, WELL], None),  # it has recovered
        ([SUNK, {"eval_loss": 1.0}, *[SUNK] * (IN_A_ROW - 1), {"train_runtime": 9.0}], "fallen"),
        ([log(-FALL, -FALL)] * 5, None),  # on the threshold
        ([WELL, log(math.nan, math.nan, **{"logps/chosen": math.nan})], "not_a_number"),
        ([WELL, log(-math.inf, 0.0, **{"logps/rejected": -math.inf})], "not_a_number"),
        ([{"loss": 1.0, "logps/chosen": -1.0, "logps/rejected": -1.0}] * 5, None),  # a loss without reference
        ([{"loss": 0.0, "logps/chosen": math.nan, "logps/rejected": -1.0}], "not_a_number"),
    ],
)
def test_problem(history, expected):
    assert problem(history) == expected


def test_the_warning_says_how_far_and_what_to_try():
    words = describe("fallen", log(-1.234, -2.0))
    assert "-1.23 and -2.00 nats per token" in words
    for remedy in ("minor_dpo", "dpop", "pref_beta", "learning_rate"):
        assert remedy in words
        assert remedy in describe("not_a_number", {})


def test_a_log_is_read_while_it_is_written_and_after_a_resumed_run(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    assert read_trainer_log(path) == []
    lines = [{"current_steps": step, "loss": loss} for step, loss in ((1, 0.7), (2, 0.6), (3, 0.5), (4, 0.4))]
    lines.insert(1, {"current_steps": 1, "eval_loss": 1.0})
    killed = "".join(json.dumps(line) + "\n" for line in lines) + '{"current_steps": 5, "lo'
    path.write_text(killed)
    steps = [1, 2, 3, 4]
    assert [line["step"] for line in read_trainer_log(path)] == steps
    path.write_text(killed + "\n" + json.dumps({"current_steps": 3, "loss": 0.1}) + "\n")  # from checkpoint-2
    assert [(line["step"], line["loss"]) for line in read_trainer_log(path)] == [(1, 0.7), (2, 0.6), (3, 0.1)]


@pytest.mark.parametrize("value", ["a0", None, [], {}, True, 10**400, -(10**400)])
@pytest.mark.parametrize("key", ["logps/chosen", "logps/rejected", PER_TOKEN[0], "normalized_rewards/chosen", STOPPED])
def test_a_log_that_somebody_else_has_written(key, value, tmp_path):
    """What is no number is left out: nothing stops at it, and nothing is drawn of it."""
    path = tmp_path / "trainer_log.jsonl"
    lines = [{"current_steps": step, **SUNK, "normalized_rewards/chosen": 1.0, key: value} for step in range(1, 5)]
    odd = [{"current_steps": value, "loss": 1.0}, {"current_steps": 9, "loss": value}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *odd]))
    logs = read_trainer_log(path)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert not [log for log in logs if key in log]
    assert problem(logs) in (None, "fallen")
    assert stopped_at(logs) is None
    assert (reward_figure(logs) is None) == (key == "normalized_rewards/chosen")


@pytest.fixture
def said(monkeypatch):
    """What LLaMA-Factory's logger is given, which the console and the board show."""
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    logger = logging.getLogger("llamafactory")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
    return lines


def test_it_is_said_once_and_again_after_a_recovery(said):
    monitor, history = DegenerationMonitor(), []
    for entry in [*[SUNK] * (IN_A_ROW + 2), WELL, *[SUNK] * IN_A_ROW]:
        history.append({**entry, DEGENERATING: 0.0})
        monitor.on_log(None, SimpleNamespace(log_history=history), TrainerControl())
    assert len(said) == 2
    assert all("The run is degenerating" in line for line in said)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], None),
        ([{"step": 1, "loss": 0.1}], None),
        ([{"step": 1, STOPPED: 0.0}, {"step": 2, STOPPED: 1.0}, {"step": 2, "train_runtime": 1.0}], 2),
        ([{"step": 2, STOPPED: 1.0}, {"step": 3, STOPPED: 0.0}], None),  # resumed, and well again
    ],
)
def test_where_a_run_was_stopped(history, expected):
    assert stopped_at(history) == expected


# --- real runs -------------------------------------------------------------------------------------------------------


def run(model, data, output, **changes):
    settings = {"max_steps": 20, "learning_rate": 0.3, "optim": "adamw_torch", **changes}
    tuner.run_exp(recipe(model, data, output, **settings))
    return json.loads((output / "trainer_state.json").read_text())


def test_a_run_that_degenerates_is_told_and_goes_on(model, data, tmp_path, said):
    state = run(model, data, tmp_path / "run")
    assert any("The run is degenerating" in line for line in said)
    assert not any("Training stops" in line for line in said)
    flags = [entry[DEGENERATING] for entry in state["log_history"] if DEGENERATING in entry]
    assert len(flags) == state["global_step"] == 20
    assert flags[0] == 0.0
    assert flags[-1] == 1.0
    assert flags == [float(problem(state["log_history"][: step + 1]) is not None) for step in range(20)]


def test_and_ends_after_a_checkpoint_if_that_is_wanted(model, data, tmp_path, said):
    state = run(model, data, tmp_path / "run", pref_stop_on_degeneration=True)
    last = state["global_step"]
    assert IN_A_ROW <= last < 20
    flags = [entry[DEGENERATING] for entry in state["log_history"] if DEGENERATING in entry]
    assert flags == [0.0] * (last - 1) + [1.0]
    assert any(f"Training stops after a checkpoint at step {last} of 20" in line for line in said)
    assert stopped_at(state["log_history"]) == last
    lines = read_trainer_log(tmp_path / "run" / "trainer_log.jsonl")
    assert (stopped_at(lines), lines[-1]["total_steps"]) == (last, 20)
    assert (tmp_path / "run" / f"checkpoint-{last}" / "model.safetensors").is_file()


def test_its_last_step_ends_a_run_by_itself(model, data, tmp_path, said):
    changes = {"pref_stop_on_degeneration": True, "lr_scheduler_type": "constant"}
    last = run(model, data, tmp_path / "first", **changes)["global_step"]
    said.clear()
    state = run(model, data, tmp_path / "second", **changes, max_steps=last)
    assert state["global_step"] == last
    assert [entry[DEGENERATING] for entry in state["log_history"] if DEGENERATING in entry][-1] == 1.0
    assert stopped_at(state["log_history"]) is None
    assert not any("Training stops" in line for line in said)


def test_a_healthy_run_is_left_alone(model, data, tmp_path):
    state = run(model, data, tmp_path / "run", pref_stop_on_degeneration=True, learning_rate=1e-4, max_steps=6)
    assert state["global_step"] == 6
    assert all(entry[DEGENERATING] == 0.0 for entry in state["log_history"] if DEGENERATING in entry)
    assert stopped_at(state["log_history"]) is None
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_per_token_rewards_are_means_over_each_answers_tokens(model, other_model, data, tmp_path):
    """Pairs one by one: the sum over a response is its length times the mean."""
    changes = {"ref_model": str(other_model), "per_device_train_batch_size": 1, "max_steps": 3, "learning_rate": 1e-4}
    state = run(model, data, tmp_path / "run", disable_shuffling=True, **changes)
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for row, entry in zip(rows, state["log_history"], strict=False):
        if "loss" not in entry:
            continue
        for side in ("chosen", "rejected"):
            length = len(row[side]) + 2  # tokens are bytes; <|im_end|> and a line break follow
            total = entry[f"normalized_rewards/{side}"]
            assert entry[f"normalized_rewards/{side}_per_token"] == pytest.approx(total / length, rel=1e-3)
