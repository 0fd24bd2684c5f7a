"""Training on two ranks: a list of recipes in one launch, because a launch costs more than most trainings.

A test imports it to launch; torchrun runs it on every rank, to train each recipe through LLaMA-Factory's `run_exp`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamafactory_ext.losses import STOCK_LOSSES
from llamafactory_ext.losses.lookup import loss_names

LOSSES = [*STOCK_LOSSES, "minor_dpo", "dpop", "sr_dpo", "sr_ipo"]
ALL_LOSSES = loss_names()
# What two ranks with one pair each do in one step.
TWO_PAIRS_IN_MICRO_BATCHES_OF_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
# Console scripts of this environment (torchrun, ninja), whether it is activated or not.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def end_rank() -> None:
    """End a rank whose work is all written: gloo's threads have been seen to abort a process that ends as usual."""
    sys.stdout.flush()
    os._exit(0)


# For the loss file of a run of the real command on two ranks: the same, once `run_exp` has left the process group. A
# rank that failed is still in it, and ends with its error.
ENDS_AT_ONCE = """
import atexit, os, sys
import torch.distributed

@atexit.register
def end_rank():
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
"""


def torchrun(script: Path, *words: str, **settings: str) -> None:
    from llamafactory.extras.misc import find_available_port

    port = f"--master_port={find_available_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port, str(script), *words]
    # Python's own view of the environment: the board's runner, tested in this process, leaves more in the C library's.
    environment = {**os.environ, "PATH": PATH, "PYTHONFAULTHANDLER": "1", **settings}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    crash = run.stderr.find("Fatal Python error")
    assert run.returncode == 0, run.stderr[crash:][:6000] if crash >= 0 else run.stderr[-4000:]


def train_on_two_ranks(recipes: list[dict[str, Any]], folder: Path, **settings: str) -> None:
    file = folder / "recipes.json"
    file.write_text(json.dumps(recipes), encoding="utf-8")
    torchrun(Path(__file__), str(file), **settings)


def logs(output: Path) -> list[dict[str, float]]:
    """Loss, gradient norm and metrics of every step."""
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [
        {key: value for key, value in log.items() if key in ("loss", "grad_norm") or "/" in key}
        for log in history
        if "loss" in log
    ]


def models(output: Path) -> list[dict[str, Any]]:
    """How each of the two ranks held its models before the first step: see `train` below."""
    return [json.loads((output / f"models-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def assert_same_training(one_process: list[dict[str, float]], two_ranks: list[dict[str, float]]) -> None:
    assert one_process[0]["loss"] != one_process[-1]["loss"]
    for one, two in zip(one_process, two_ranks, strict=True):
        assert set(one) == set(two)
        for key in one:
            # A logratio near 0 is the difference of two large sums, whose rounding stays absolute.
            near = {"rel": 1e-4} if key in ("loss", "grad_norm") else {"rel": 1e-3, "abs": 1e-3}
            assert two[key] == pytest.approx(one[key], **near), key


def train(recipes: list[dict[str, Any]]) -> None:
    """On each rank: train the recipes, and write down how the rank holds policy and reference before the first step."""
    import fsdp_on_cpu
    import torch
    import torch.distributed as dist
    from llamafactory.train.tuner import run_exp
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers import training_args

    from llamafactory_ext.training import logps, trainer

    logps.CHUNK = 4096  # a handful of tokens at a time, which one process takes all at once

    def describe(model: torch.nn.Module) -> dict[str, Any]:
        parameters = list(model.parameters())
        # Elements that ZeRO-3 or FSDP cut up, and this rank's part of them.
        parts = [(each.ds_numel, each.ds_tensor.numel()) for each in parameters if hasattr(each, "ds_id")]
        parts += [(each.numel(), each.to_local().numel()) for each in parameters if isinstance(each, DTensor)]
        return {
            "class": type(model).__name__,
            "zero_stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
            "dtypes": sorted({str(parameter.dtype) for parameter in parameters}),
            "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "whole": sum(each.numel() for each in parameters if not isinstance(each, DTensor)),  # held outright
            "partitioned": sum(whole for whole, _ in parts),
            "part": sum(part for _, part in parts),
            "fsdp_modules": sum(isinstance(module, FSDPModule) for module in model.modules()),
        }

    class Witness(trainer.PreferenceTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            file = Path(self.args.output_dir) / f"models-{self.args.process_index}.json"
            if not file.exists():
                models = {"policy": self.model_wrapped, "reference": self.ref_model}
                held = {name: describe(model) for name, model in models.items() if model is not None}
                stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
                held["policy"]["stepped"] = sum(parameter.numel() for parameter in stepped)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(held), encoding="utf-8")
            return super().training_step(*args, **kwargs)

    trainer.PreferenceTrainer = Witness
    # bf16 asks for a GPU or for use_cpu; but these runs are to go the way that runs on GPUs go.
    training_args.is_torch_bf16_gpu_available = lambda: True
    # LLaMA-Factory takes the process group down after a run; the next run of the list still needs it.
    end_process_group, dist.destroy_process_group = dist.destroy_process_group, lambda *args: None

    fsdp_on_cpu.turn_on()
    before = dict(os.environ)

    gc.freeze()  # what was imported, so that the collection at the end of each training need not go through it
    for settings in recipes:
        run_exp(settings)
        if settings.get("fsdp"):  # of which accelerate leaves its settings behind, for the next run to find
            os.environ.clear()
            os.environ.update(before)
    end_process_group()


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    end_rank()
