"""What is watched of a training, whoever trains: seconds, losses and tokens of its steps, or the memory of one.

Also imported where TRL is and LLaMA-Factory is not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from training_tokens import common_prefix
from transformers import TrainerCallback

# Seconds on the wall, or of the CPU in this process: what else the machine does hardly changes these.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter


class Seconds(TrainerCallback):
    """How long each optimizer step takes, from the end of the one before to its own, and what it worked on."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []
        self.positions = 0
        self.in_reference = 0.0  # seconds since training began
        self.reference_marks = [0.0]

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ready = now()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.pairs = [pair_tokens(*sequences(row)) for row in kwargs["train_dataloader"].dataset]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.marks:
            self.marks.append(now())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(now())
        self.reference_marks.append(self.in_reference)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # not what is only scored: the reference, and Sr's augmented pairs
            self.positions += kwargs["input_ids"].numel()

    def result(self) -> dict[str, Any]:
        """As JSON: seconds from the trainer being built to the first step, then of each step, the first included, and
        what a reference model took of it, where `time_reference` watches one; `positions` is what the policy's forward
        passes with gradient ran over, padding included."""
        config = self.model.config.get_text_config()
        return {
            "setup": self.marks[0] - self.ready,
            "steps": [end - start for start, end in pairwise(self.marks)],
            "reference": [end - start for start, end in pairwise(self.reference_marks)],
            "losses": self.losses,
            "pairs": self.pairs,
            "positions": self.positions,
            "parameters": parameters(self.model, trained=False),
            "trained": parameters(self.model, trained=True),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocabulary": config.vocab_size,
        }


class Peak(TrainerCallback):
    """The most bytes that live tensors hold at once in a step's forward and backward passes, beyond what lasts.

    Gradients are there from the start, as in all but the first micro-batch of an accumulation, so that weights,
    gradients and optimizer states are left out.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiled.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profiled.stop()
        recorded: Any = self.profiled.profiler
        held = self.bytes = 0
        for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":  # the CPU allocator's: bytes taken, or given back
                held += event.nbytes()
                self.bytes = max(self.bytes, held)

    def result(self) -> dict[str, Any]:
        return {"bytes": self.bytes}


class Trial(TrainerCallback):
    """Steps of one micro-batch: how long each takes without the optimizer, and the peak of the last one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = Peak()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps - 1:
            self.peak.on_step_begin(args, state, control, **kwargs)
        self.start = now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps - 1:
            self.peak.on_pre_optimizer_step(args, state, control, **kwargs)
        else:
            self.seconds.append(now() - self.start)

    def result(self) -> dict[str, Any]:
        return self.peak.result() | {"seconds": self.seconds}


WATCHES: dict[str, Callable[[], Seconds | Peak | Trial]] = {"seconds": Seconds, "peak": Peak, "trial": Trial}


def time_reference(trainer: Any, watch: Seconds) -> None:
    """Tell the watch how long a trainer class spends in its reference model."""
    original = trainer.compute_reference_log_probs

    @functools.wraps(original)
    def timed(*args: Any) -> Any:
        start = now()
        found = original(*args)
        watch.in_reference += now() - start
        return found

    trainer.compute_reference_log_probs = timed


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def sequences(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Both responses with their prompts, from a row of LLaMA-Factory's or of TRL's."""
    if "prompt_ids" in row:
        return row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]
    return row["chosen_input_ids"], row["rejected_input_ids"]


def pair_tokens(chosen: list[int], rejected: list[int]) -> tuple[int, int, int]:
    """Tokens of the two answers with their prompts, and how many both begin with."""
    return len(chosen), len(rejected), common_prefix(chosen, rejected)


def parameters(model: Any, trained: bool) -> int:
    """Parameters that tokens are multiplied with: all but an embedding that is only looked up."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    counted = [p for p in model.parameters() if p is not embedding or embedding is head]
    return sum(p.numel() for p in counted if p.requires_grad or not trained)
