"""One run of `benchmarks/training.py`, in a process of its own: a whole recipe through LLaMA-Factory's `run_exp`.

    python benchmarks/training_worker.py result.json < job.json

A job is `{"recipe": …, "watch": "seconds" or "peak", "naive_sr_prompt": null or text}`.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llamafactory.data import loader
from llamafactory.train import tuner
from llamafactory.train.dpo import trainer, workflow
from torch.profiler import ProfilerActivity, profile
from training_report import common_prefix
from transformers import TrainerCallback

from llamafactory_ext.training.refinement import AugmentingCollator, AugmentingProcessor, split_batch
from llamafactory_ext.whole_files import write_whole

SR_LAMBDA = 0.3


class Seconds(TrainerCallback):
    """How long each optimizer step takes, from the end of the one before to its own, and what it worked on."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []
        self.positions = 0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ready = now()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        rows = kwargs["train_dataloader"].dataset
        self.pairs = [pair_tokens(row["chosen_input_ids"], row["rejected_input_ids"]) for row in rows]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.marks:
            self.marks.append(now())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(now())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # not what is only scored: the reference, and Sr's augmented pairs
            self.positions += kwargs["input_ids"].numel()

    def result(self) -> dict[str, Any]:
        """As JSON: seconds from the trainer being built to the first step, then of each step, the first included;
        `positions` is what the policy's forward passes with gradient ran over, padding included."""
        config = self.model.config.get_text_config()
        return {
            "setup": self.marks[0] - self.ready,
            "steps": [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)],
            "losses": self.losses,
            "pairs": self.pairs,
            "positions": self.positions,
            "parameters": parameters(self.model, trained=False),
            "trained": parameters(self.model, trained=True),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
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


class NaiveSrTrainer(trainer.CustomDPOTrainer):
    """Sr-DPO as a user of LLaMA-Factory would add it: two more of its own forward passes, on the augmented pairs.

    A fair stand-in for an Sr-DPO on the stock path: layout, log-probabilities and reference are LLaMA-Factory's own,
    the passes are as many as the Sr paper's algorithm has, and those of the term keep no activations.
    """

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        batch, augmented = split_batch(batch)
        with torch.no_grad():
            policy = self.concatenated_forward(model, augmented)
        chosen, rejected = self.compute_reference_log_probs(model, augmented)
        self.delta = self.beta * ((policy["chosen_logps"] - chosen) - (policy["rejected_logps"] - rejected))
        return super().get_batch_loss_metrics(model, batch, train_eval)

    def compute_preference_loss(self, *logps: torch.Tensor) -> Any:
        """-log sigma(beta (D_w - D_l) - lambda Delta) (arXiv 2405.21040, Eq. 13), shape `(batch,)`, and the rewards."""
        policy_chosen, policy_rejected, chosen, rejected = logps
        margin = (policy_chosen - chosen) - (policy_rejected - rejected)
        _, *rewards = super().compute_preference_loss(*logps)
        return -F.logsigmoid(self.beta * margin - SR_LAMBDA * self.delta), *rewards


def naive_sr(sr_prompt: str) -> list[tuple[Any, str, Any]]:
    """What LLaMA-Factory must find in place of its own: (module, name, value). The data are those that ours takes."""
    return [
        (loader, "PairwiseDatasetProcessor", functools.partial(AugmentingProcessor, sr_prompt=sr_prompt)),
        (workflow, "PairwiseDataCollatorWithPadding", AugmentingCollator),
        (trainer, "CustomDPOTrainer", NaiveSrTrainer),
    ]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pair_tokens(chosen: list[int], rejected: list[int]) -> tuple[int, int, int]:
    """Tokens of the two answers with their prompts, and how many both begin with."""
    return len(chosen), len(rejected), common_prefix(chosen, rejected)


def parameters(model: Any, trained: bool) -> int:
    """Parameters that tokens are multiplied with: all but an embedding that is only looked up."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    counted = [p for p in model.parameters() if p is not embedding or embedding is head]
    return sum(p.numel() for p in counted if p.requires_grad or not trained)


def main() -> None:
    job = json.load(sys.stdin)
    if job["naive_sr_prompt"] is not None:
        for module, name, value in naive_sr(job["naive_sr_prompt"]):
            setattr(module, name, value)
    watch: Seconds | Peak = Seconds() if job["watch"] == "seconds" else Peak()
    with tempfile.TemporaryDirectory() as output:
        tuner.run_exp(job["recipe"] | {"output_dir": output}, callbacks=[watch])
    write_whole(Path(sys.argv[1]), json.dumps(watch.result()))


if __name__ == "__main__":
    main()
