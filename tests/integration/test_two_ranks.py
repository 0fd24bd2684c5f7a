"""Two processes on gloo, plain DDP: every loss, metrics reduced over ranks, resume, and a loss file under torchrun."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml
from llamafactory.train.tuner import run_exp
from tiny import recipe
from tiny_answers import make_answers
from two_ranks import (
    ALL_LOSSES,
    ENDS_AT_ONCE,
    PATH,
    TWO_PAIRS_IN_MICRO_BATCHES_OF_ONE,
    assert_same_training,
    logs,
    models,
    train_on_two_ranks,
)

pytestmark = [pytest.mark.slow, pytest.mark.leg]


RANKED = ["sigmoid", "pl_dpo"]


def ranked(recipe_for, data, output, name, **changes):
    settings = recipe_for(name, "full", output, dataset_dir=str(data), dataset="four,turns,pairs", cutoff_len=200)
    return settings | {"eval_dataset": "four,pairs", "eval_strategy": "steps", "eval_steps": 2, **changes}


@pytest.fixture(scope="module")
def trained(model, data, recipe_for, tmp_path_factory):
    """Every loss, full and LoRA, on two ranks of one pair each; one run interrupted and resumed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    recipes = [
        recipe_for(name, tuning, folder / f"{name}-{tuning}") for name in ALL_LOSSES for tuning in ("full", "lora")
    ]
    # SGD, because transformers 5.6 cannot load an optimizer's tensors on several CPU ranks (device "cpu:0").
    resume = {"pref_loss": "minor_dpo", "pref_bco_weight": 0.5, "per_device_train_batch_size": 1, "optim": "sgd"}
    recipes.append(recipe(model, data, folder / "whole", save_strategy="steps", save_steps=2, **resume))
    checkpoint = {"resume_from_checkpoint": str(folder / "whole" / "checkpoint-2")}
    recipes.append(recipe(model, data, folder / "resumed", **resume, **checkpoint))
    recipes += [ranked(recipe_for, make_answers(folder, data), folder / f"{name}-ranked", name) for name in RANKED]
    degenerate = {"pref_loss": "sigmoid", "optim": "adamw_torch", "learning_rate": 0.3, "max_steps": 20}
    degenerate |= {"pref_stop_on_degeneration": True, "per_device_train_batch_size": 1}
    recipes.append(recipe(model, data, folder / "degenerate", **degenerate))
    # Unless told, accelerate 1.15 lets each rank train alone where there is no GPU.
    train_on_two_ranks(recipes, folder, ACCELERATE_USE_CPU="true")
    return folder


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_two_ranks_train_and_log_what_one_process_does(name, tuning, trained, one_process):
    output = trained / f"{name}-{tuning}"
    assert all(held["policy"]["class"] == "DistributedDataParallel" for held in models(output))
    assert_same_training(one_process(name, tuning), logs(output))


@pytest.mark.parametrize("name", RANKED)
def test_rows_of_several_answers_on_two_ranks(name, trained, recipe_for, tmp_path):
    """Of more answers on one rank than on the other, in training and in evaluation."""
    run_exp(ranked(recipe_for, trained, tmp_path / "one", name, **TWO_PAIRS_IN_MICRO_BATCHES_OF_ONE))
    one, two = (logs(folder) for folder in (tmp_path / "one", trained / f"{name}-ranked"))
    assert [log["loss"] for log in two] == pytest.approx([log["loss"] for log in one], rel=1e-4, abs=1e-5)


def test_resume_on_two_ranks(trained):
    whole, resumed = logs(trained / "whole"), logs(trained / "resumed")
    assert [log["loss"] for log in resumed] == pytest.approx([log["loss"] for log in whole], abs=1e-5)


def test_a_run_that_degenerates_ends_on_all_ranks(trained):
    last = json.loads((trained / "degenerate" / "trainer_state.json").read_text())["global_step"]
    assert last < 20
    assert (trained / "degenerate" / f"checkpoint-{last}").is_dir()


def test_command_line_under_torchrun_with_a_loss_file(model, data, tmp_path):
    """`FORCE_TORCHRUN=1 llamafactory-cli train`, the loss file given relative to the working directory."""
    (tmp_path / "my_loss.py").write_text(
        f"{ENDS_AT_ONCE}from llamafactory_ext import register_loss\n"
        '@register_loss("squared")\n'
        "def squared(pairs, *, beta: float, target: float = 1.0):\n"
        "    return (beta * pairs.margin - target) ** 2\n",
        encoding="utf-8",
    )
    settings = recipe(model, data, tmp_path / "out", pref_loss="squared", pref_loss_file="my_loss.py")
    settings |= {"pref_loss_args": {"target": 2.0}, "max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    environment = os.environ | {
        "FORCE_TORCHRUN": "1",
        "NPROC_PER_NODE": "2",
        "PATH": PATH,
        "ACCELERATE_USE_CPU": "true",
    }
    command = ["llamafactory-cli", "train", "recipe.yaml"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    printed = run.stdout + run.stderr
    assert f"distributed & accumulation) = {2 * settings['per_device_train_batch_size']}" in printed  # of two ranks
    assert printed.count("is active and trains squared(beta=0.1, target=2.0)") == 1  # rank 0 only
    assert logs(tmp_path / "out")[0]["loss"] == pytest.approx(4.0)  # the margin starts at 0
