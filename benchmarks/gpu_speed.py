"""Pairs a second and memory of LLaMA-Factory's DPO stage and of the plugin's, for one shape of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from accelerate.utils.memory import should_reduce_batch_size
from gpu_runs import DEVICE, Lengths, Trainings, make_pairs
from training_tokens import flops, peak_flops
from training_watch import Seconds
from transformers import Trainer, TrainerCallback

from llamafactory_ext.planning.plan import make_plan

GIB = 2**30
PAIRS = 16  # of an optimizer step
FASTER = "times stock's pairs/s, above 1 is faster"
STEPS = 2  # that are measured, after one to warm up


def trainings(folder: Path, model: Path, lengths: Lengths, pairs: int, settings: dict[str, Any]) -> Trainings:
    """Trainings with as many pairs as the steps of a run take, a data set and folder of their own."""
    data = make_pairs(folder / f"pairs{lengths.prompt}", lengths, pairs * (1 + STEPS))
    return Trainings(model, data, folder / f"runs-{model.name}-{lengths.prompt}", settings)


class Memory(TrainerCallback):
    """Bytes of the GPU: what lasts (weights, optimizer states, a reference model), and the most that was held."""

    lasting = allocated = reserved = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if DEVICE == "cuda":
            self.lasting = torch.cuda.memory_allocated()
            if state.global_step == 0:
                torch.cuda.empty_cache()  # what loading and the reference's pass took
                torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if DEVICE == "cuda":
            self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


@dataclass
class Measured:
    """A training: seconds from the trainer's making to the first step, and of a step; its memory in bytes."""

    setup: float
    step: float
    lasting: int
    allocated: int
    reserved: int
    operations: float  # of a step
    tokens: list[tuple[int, int, int]]  # of each pair: both rows, and what both begin with

    @property
    def above(self) -> int:
        return self.allocated - self.lasting


@dataclass(frozen=True)
class Comparison:
    """Stock and ours on one model and one length of pairs.

    Args:
        record: the stage's.
        name: of the model, tuning and pairs, for the results.
        train: the trainings, with the keys that both sides share.
        pairs: of an optimizer step.
    """

    record: Any
    name: str
    train: Trainings
    pairs: int

    def run(self, stock: bool, size: int, **changes: Any) -> Measured:
        seconds, memory = Seconds(), Memory()
        keys = {"gradient_accumulation_steps": self.pairs // size, "max_steps": 1 + STEPS}
        keys |= {} if stock else {"precompute_ref_log_probs": True}
        keys |= changes
        with mock.patch.object(Trainer, "save_model"):  # 15 GB a run, of weights that are nobody's
            self.train(stock, (seconds, memory), per_device_train_batch_size=size, **keys)
        result = seconds.result()
        step = median(result["steps"][1:] or result["steps"])
        shares = not stock
        per_pair = [flops(pair, shares, result) for pair in result["pairs"]]
        operations = self.pairs * sum(per_pair) / len(per_pair)
        return Measured(
            result["setup"], step, memory.lasting, memory.allocated, memory.reserved, operations, result["pairs"]
        )

    def runs(self, stock: bool, sizes: tuple[int, ...], **changes: Any) -> dict[int, Measured]:
        """A run per micro-batch, each recorded; those after the first that does not fit are not tried."""
        found: dict[int, Measured] = {}
        loss = changes.get("pref_loss", "sigmoid")
        for size in sizes:
            what = f"{self.name}, {'stock' if stock else 'ours'}, {loss}, micro-batch of {size}"
            try:
                found[size] = measured = self.run(stock, size, **changes)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.record(what, "out of memory")
                break
            self.record(f"{what}: speed", self.pairs / measured.step, "pairs/s")
            if DEVICE == "cuda":
                self.record(f"{what}: peak", measured.allocated / GIB, "GiB")
                self.record(f"{what}: peak above what lasts", measured.above / GIB, "GiB")
                if (peak := peak_flops(torch.cuda.get_device_name())) is not None:
                    share = measured.operations / measured.step / peak
                    self.record(f"{what}: operations (MFU)", share, "of the card's peak")
        return found

    def __call__(self, sizes: tuple[int, ...], goals: bool, refined: bool = False) -> dict[int, Measured]:
        """Both at their best micro-batches, ours with a cache that it finds and one that it builds; then Sr-DPO.

        Args:
            goals: whether the ratios are those that the project aims at.

        Returns:
            our runs by micro-batch.
        """

        def step(measured: Measured) -> float:
            return measured.step

        smallest = min(sizes)
        stock_runs = self.runs(True, sizes)
        self.run(False, smallest, precompute_ref_log_probs=False, max_steps=1)  # loads the kernels
        cold = self.run(False, smallest)
        runs = self.runs(False, sizes)
        if not stock_runs or not runs:
            return runs
        stock, ours = min(stock_runs.values(), key=step), min(runs.values(), key=step)
        at_least = 2.0 if goals else None
        self.record(f"{self.name}: ours over stock, warm cache", stock.step / ours.step, FASTER, at_least=at_least)
        building = max(cold.setup - runs[smallest].setup, 0.0) / (1 + STEPS)  # for as many pairs as a step has
        ratio = stock.step / (ours.step + building)
        at_least = 1.5 if goals else None
        self.record(f"{self.name}: ours over stock, cache built in the run", ratio, FASTER, at_least=at_least)
        if DEVICE == "cuda":
            ratio = runs[smallest].above / stock_runs[smallest].above
            what = f"{self.name}: ours beside stock, micro-batch of {smallest}, peak above what lasts"
            self.record(what, ratio, "of stock's, below 1 is less", at_most=0.5 if goals else None)
        if refined and (refined_runs := self.runs(False, sizes[:1], pref_loss="sr_dpo")):
            ratio = refined_runs[sizes[0]].step / stock.step
            at_most = 0.75 if goals else None
            self.record(f"{self.name}: our Sr-DPO beside stock DPO", ratio, "of its time", at_most=at_most)
        return runs

    def plan(self, size: int, measured: Measured, **changes: Any) -> None:
        """What `llamafactory-ext plan` says of the same recipe, beside what was held."""
        longest = max(max(pair) for pair in measured.tokens)
        keys = {"gradient_accumulation_steps": self.pairs // size, "precompute_ref_log_probs": True}
        keys |= {"cutoff_len": 8 * math.ceil(longest / 8), **changes}
        settings = self.train.recipe(per_device_train_batch_size=size, **keys)
        has_gpu = DEVICE == "cuda"
        planned = make_plan(settings, 1, torch.cuda.get_device_properties(0).total_memory / GIB if has_gpu else 80)
        self.record(f"{self.name}: planned memory", planned.total / GIB, "GiB")
        if has_gpu:
            self.record(f"{self.name}: planned beside allocated memory", planned.total / measured.allocated, "of it")
            off = abs(planned.total / measured.reserved - 1)
            self.record(f"{self.name}: share by which planned memory is off reserved memory", off, at_most=0.1)
