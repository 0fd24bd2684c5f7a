"""Two processes on gloo: every loss, metrics reduced over ranks, resume, and a loss file under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from llamafactory.extras.misc import find_available_port
from llamafactory.train.tuner import run_exp
from tiny import make_model, recipe

from llamafactory_ext.arguments import STOCK_LOSSES

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LOSSES = [*STOCK_LOSSES, "minor_dpo", "dpop"]
# A loss whose value depends on the rest of the micro-batch cannot be compared between batches of one and of two.
PER_PAIR = [name for name in LOSSES if name != "kto_pair"]


def logs(output: Path) -> list[dict[str, float]]:
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{k: v for k, v in log.items() if k == "loss" or "/" in k} for log in history if "loss" in log]


@pytest.fixture(scope="module")
def changes_for(tmp_path_factory):
    """What the recipes of a loss change. Adam and bf16 would make rounding visible: Adam's first steps are signs."""
    folder = tmp_path_factory.mktemp("float32")
    policy, reference = (str(make_model(folder / str(seed), seed, dtype="float32")) for seed in (1, 0))

    def changes(name, tuning):
        settings = {"pref_loss": name, "finetuning_type": tuning, "model_name_or_path": policy}
        settings |= {"optim": "sgd", "learning_rate": 0.05}
        return settings if name in ("orpo", "simpo") else settings | {"ref_model": reference}

    return changes


@pytest.fixture(scope="module")
def trained(model, data, changes_for, tmp_path_factory):
    """Every loss, full and LoRA, on two ranks of one pair each; one run interrupted and resumed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    recipes = {}
    for name in LOSSES:
        for tuning in ("full", "lora"):
            output = folder / f"{name}-{tuning}"
            recipes[output.name] = recipe(
                model, data, output, **changes_for(name, tuning), per_device_train_batch_size=1
            )
    # SGD, because transformers 5.6 cannot load an optimizer's tensors on several CPU ranks (device "cpu:0").
    resume = {"pref_loss": "minor_dpo", "pref_bco_weight": 0.5, "per_device_train_batch_size": 1, "optim": "sgd"}
    recipes["whole"] = recipe(model, data, folder / "whole", save_strategy="steps", save_steps=2, **resume)
    checkpoint = {"resume_from_checkpoint": str(folder / "whole" / "checkpoint-2")}
    recipes["resumed"] = recipe(model, data, folder / "resumed", **resume, **checkpoint)

    file = folder / "recipes.json"
    file.write_text(json.dumps(list(recipes.values())), encoding="utf-8")
    port = f"--master_port={find_available_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port]
    command = [*torchrun, str(HERE / "two_ranks.py"), str(file)]
    # Python's own view of the environment: the board's runner, tested in this process, leaves more in the C library's.
    run = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", PER_PAIR)
def test_two_ranks_train_and_log_what_one_process_does(name, tuning, trained, model, data, changes_for, tmp_path):
    run_exp(recipe(model, data, tmp_path, **changes_for(name, tuning)))
    one_process, two_ranks = logs(tmp_path), logs(trained / f"{name}-{tuning}")
    assert one_process[0]["loss"] != one_process[-1]["loss"]
    for one, two in zip(one_process, two_ranks, strict=True):
        assert set(one) == set(two)
        for key in one:
            if not key.startswith("logits/"):  # means over the padding too, which a pair alone does not have
                assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_kto_pair_on_two_ranks(tuning, trained):
    assert len(logs(trained / f"kto_pair-{tuning}")) == 4


def test_resume_on_two_ranks(trained):
    whole, resumed = logs(trained / "whole"), logs(trained / "resumed")
    assert [log["loss"] for log in resumed] == pytest.approx([log["loss"] for log in whole], abs=1e-5)


def test_command_line_under_torchrun_with_a_loss_file(model, data, tmp_path):
    """`FORCE_TORCHRUN=1 llamafactory-cli train`, the loss file given relative to the working directory."""
    (tmp_path / "my_loss.py").write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("squared")\n'
        "def squared(pairs, *, beta: float, target: float = 1.0):\n"
        "    return (beta * pairs.margin - target) ** 2\n",
        encoding="utf-8",
    )
    settings = recipe(model, data, tmp_path / "out", pref_loss="squared", pref_loss_file="my_loss.py")
    settings |= {"pref_loss_args": {"target": 2.0}, "max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": path}
    command = ["llamafactory-cli", "train", "recipe.yaml"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert (run.stdout + run.stderr).count("is active and trains squared(beta=0.1, target=2.0)") == 1  # rank 0 only
    assert logs(tmp_path / "out")[0]["loss"] == pytest.approx(4.0)  # the margin starts at 0
