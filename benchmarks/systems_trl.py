"""One run of TRL's DPO trainer for `benchmarks/systems.py`, in an environment of its own (`make trl-env`).

    .venv-trl/bin/python benchmarks/systems_trl.py result.json < job.json

A job is `{"model": …, "tokens": file, "pairs": count, "arguments": of DPOConfig, "responses_only": bool, "watch": …,
"clock": …}`, the last two as in training_worker.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import training_watch
from datasets import Dataset
from training_watch import CLOCKS, WATCHES
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

from llamafactory_ext.whole_files import write_whole


class TokensTrainer(DPOTrainer):
    """TRL's trainer on tokens: its own preparation takes text only."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


def score_responses_only() -> None:
    """Let TRL's head run on the responses' tokens, as on GPUs.

    TRL decides by the device: without Triton its head runs on every token, to keep shapes that a compiler knows. On a
    CPU nothing is compiled. The name is looked up for this decision only; the kernels have one of their own.
    """
    utils._use_triton = lambda device: True


def main() -> None:
    job = json.load(sys.stdin)
    if job["responses_only"]:
        score_responses_only()
    rows = json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))["rows"][: job["pairs"]]
    training_watch.clock = CLOCKS[job["clock"]]
    watch = WATCHES[job["watch"]]()
    with tempfile.TemporaryDirectory() as output:
        trainer = TokensTrainer(
            job["model"],
            args=DPOConfig(output_dir=output, **job["arguments"]),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[watch],
        )
        trainer.train()
    write_whole(Path(sys.argv[1]), json.dumps(watch.result()))


if __name__ == "__main__":
    main()
