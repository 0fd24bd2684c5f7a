"""One run of `benchmarks/training.py` or `systems.py`, in a process of its own: a recipe through `run_exp`.

    python benchmarks/training_worker.py result.json < job.json

A job is `{"recipe": …, "watch": "seconds", "peak", "trial" or "tokens", "clock": "wall" or "cpu", "naive_sr_prompt":
null or text}`.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training_watch
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer, loader
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train import tuner
from llamafactory.train.dpo import trainer, workflow
from training_watch import CLOCKS, WATCHES, Seconds, time_reference

from llamafactory_ext.training.refinement import AugmentingCollator, AugmentingProcessor, split_batch
from llamafactory_ext.whole_files import write_whole

SR_LAMBDA = 0.3


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


def tokens(recipe: dict[str, Any]) -> dict[str, Any]:
    """The pairs as LLaMA-Factory tokenizes them for this recipe, under TRL's names. Nothing is trained."""
    model_args, data_args, training_args, *_ = get_train_args(recipe)
    tools = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tools["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage="rm", **tools)["train_dataset"]
    return {"rows": [split_prompt(row) for row in rows]}


def split_prompt(row: dict[str, list[int]]) -> dict[str, list[int]]:
    prompt = row["chosen_labels"].count(IGNORE_INDEX)  # all of it, and nothing else, is left out of the loss
    return {
        "prompt_ids": row["chosen_input_ids"][:prompt],
        "chosen_ids": row["chosen_input_ids"][prompt:],
        "rejected_ids": row["rejected_input_ids"][prompt:],
    }


def train(job: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    if job["naive_sr_prompt"] is not None:
        for module, name, value in naive_sr(job["naive_sr_prompt"]):
            setattr(module, name, value)
    training_watch.clock = CLOCKS[job["clock"]]
    watch = WATCHES[job["watch"]]()
    if isinstance(watch, Seconds):
        time_reference(trainer.CustomDPOTrainer, watch)
    tuner.run_exp(recipe, callbacks=[watch])
    return watch.result()


def main() -> None:
    job = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as output:
        recipe = job["recipe"] | {"output_dir": output}
        result = tokens(recipe) if job["watch"] == "tokens" else train(job, recipe)
    write_whole(Path(sys.argv[1]), json.dumps(result))


if __name__ == "__main__":
    main()
