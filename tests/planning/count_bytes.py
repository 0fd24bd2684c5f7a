"""Trainings that count the bytes of their tensors: what the planner says of a recipe is held against it.

A test imports it to train in its own process; torchrun runs it on every rank, to train each recipe of a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from llamafactory.train.tuner import run_exp
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from llamafactory_ext.training import trainer

PreferenceTrainer = trainer.PreferenceTrainer
T = TypeVar("T")


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors, memory that several of them share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))


def peak_of(run: Callable[[], T]) -> tuple[T, int]:
    """What the call returns, and the most bytes that it holds at once beyond what was there, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    held = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def held(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of parameters on this rank: its part of those that ZeRO-3 has cut up."""
    return storage_bytes(getattr(parameter, "ds_tensor", parameter) for parameter in parameters)


def float32_copies(zero: Any) -> list[torch.Tensor]:
    """This rank's part of the weights' float32 copy, which DeepSpeed's optimizer steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


class CountingTrainer(PreferenceTrainer):
    """Counts before and in the first two steps and writes bytes.json into the output folder (on rank 0)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.counts = {"loaded reference": 0, "reference pass": 0}
        super().__init__(*args, **kwargs)

    def compute_reference_logps(self) -> None:
        if self.ref_model is not None:
            self.counts["loaded reference"] = held(self.ref_model.parameters())
        if self.is_deepspeed_enabled:
            zero = self.model_wrapped.optimizer
            self.counts["early optimizer states"] = storage_bytes(float32_copies(zero)) + state_bytes(zero.optimizer)
        _, self.counts["reference pass"] = peak_of(super().compute_reference_logps)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.finetuning_args.refinement_prompt is None:
            return super().get_batch_samples(*args, **kwargs)
        result, peak = peak_of(lambda: super(CountingTrainer, self).get_batch_samples(*args, **kwargs))
        self.counts["augmented pass"] = max(peak, self.counts.get("augmented pass", 0))
        return result

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "weights" not in self.counts:
            self.counts["weights"] = held(self.model.parameters())
            self.counts["reference model"] = 0 if self.ref_model is None else held(self.ref_model.parameters())
            if self.is_deepspeed_enabled:
                self._count_in_step_of(self.model_wrapped.optimizer)
        if self.is_deepspeed_enabled:
            return super().training_step(model, inputs, *args, **kwargs)

        def step() -> torch.Tensor:
            return super(CountingTrainer, self).training_step(model, inputs, *args, **kwargs)

        gradients = any(parameter.grad is not None for parameter in self.model.parameters())
        if self.state.global_step == 1 and gradients:  # all that lasts is in place
            self.counts["optimizer states"] = state_bytes(self.optimizer)
            loss, self.counts["peak"] = peak_of(step)
        else:
            loss = step()
        self.counts["gradients"] = storage_bytes(p.grad for p in self.model.parameters() if p.grad is not None)
        self._write()
        return loss

    def _count_in_step_of(self, zero: Any) -> None:
        step = zero.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.args.hf_deepspeed_config.is_zero3():
                self.counts["gradients"] = zero.grad_partitions_flat_buffer.nbytes
            else:
                # Of the gradient that two ranks share, this rank's part; its memory holds the whole for a moment.
                self.counts["gradients"] = sum(g.nbytes for group in zero.averaged_gradients.values() for g in group)
            result = step(*args, **kwargs)
            self.counts["optimizer states"] = storage_bytes(float32_copies(zero)) + state_bytes(zero.optimizer)
            self._write()
            return result

        zero.step = counted

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        if self.is_deepspeed_enabled or self.state.global_step:
            return super().get_batch_loss_metrics(model, batch, train_eval)
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = super().get_batch_loss_metrics(model, batch, train_eval)
        scored = int((batch["labels"] != -100).sum())
        self.counts["answer tokens"] = scored // len(batch["labels"])
        # The log-softmax, too, waits for the backward pass.
        logits = (scored, self.model.config.vocab_size)
        self.counts["kept"] = storage_bytes(t for t in kept if t.shape[-2:] != logits)
        return result

    def _write(self) -> None:
        if self.args.process_index == 0:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "bytes.json").write_text(json.dumps(self.counts), encoding="utf-8")


def counts(output: str | Path) -> dict[str, int]:
    return json.loads((Path(output) / "bytes.json").read_text(encoding="utf-8"))


def train_on_this_rank(recipes: list[dict[str, Any]]) -> None:
    import torch.distributed as dist
    from transformers import training_args
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    trainer.PreferenceTrainer = CountingTrainer
    # bf16 asks for a GPU, or for use_cpu, which would turn DeepSpeed off without a word; yet the CPU computes it.
    training_args.is_torch_bf16_gpu_available = lambda: True
    # LLaMA-Factory takes the process group down after a run; the next run of the list still needs it.
    end_process_group, dist.destroy_process_group = dist.destroy_process_group, lambda *args: None
    environment = dict(os.environ)
    for settings in recipes:
        run_exp(settings)
        os.environ.clear()
        os.environ.update(environment)
        unset_hf_deepspeed_config()
    end_process_group()


if __name__ == "__main__":
    train_on_this_rank(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
