"""`torch_compile: true`: the losses of the same run without it, and no graph for every length of a batch."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from llamafactory.extras import logging
from llamafactory.train import tuner
from torch._dynamo.utils import counters
from transformers import TrainerCallback

STEPS = 16
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}  # finds graphs, and compiles nothing


class Graphs(TrainerCallback):
    """How many graphs there are after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, *args, **kwargs):
        self.counts.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_data(folder):
    """Pairs that are all of other lengths, by 8, to which LLaMA-Factory pads."""
    data = tiny.make_data(folder, train=2 * STEPS)
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["chosen"] += " So" * (number * 7 % len(rows))
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture
def train(model, tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    said = []
    monkeypatch.setattr(logging.get_logger(), "info_rank0", lambda message: said.append(str(message)))

    def run(name, **changes):
        graphs = Graphs()
        about = {"max_steps": STEPS, "bf16": False, "per_device_train_batch_size": 2}
        recipe = tiny.recipe(model, data, tmp_path / name, **about | changes)
        tuner.run_exp(recipe, callbacks=[graphs])
        logs = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [log["loss"] for log in logs if "loss" in log], graphs.counts, said

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile_backend": "aot_eager"},
        {"share_prefix": False},
        {"finetuning_type": "full", "disable_gradient_checkpointing": True},
        {"finetuning_type": "full", "pref_loss": "sr_dpo", "sr_prompt": "Rate: ", "precompute_ref_log_probs": False},
    ],
)
def test_a_compiled_model_has_the_same_losses_and_few_graphs(train, changes):
    expected, none, _ = train("plain", **{name: each for name, each in changes.items() if "compile" not in name})
    losses, graphs, said = train("compiled", **COMPILED | changes)
    assert losses == pytest.approx(expected, abs=2e-5)
    assert none[-1] == 0 < graphs[-1]
    # A first length, then any length; and Sr's prompts and the reference are passes of other modes.
    assert graphs[-1] == graphs[STEPS // 2]
    is_on = any(line.startswith("Prefix sharing is on") for line in said)
    assert is_on is (changes.get("share_prefix") is not False)
