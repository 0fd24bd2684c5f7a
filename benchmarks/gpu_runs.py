"""What the stages of `benchmarks/gpu.py` share: models and pairs made on the spot, and trainings in this process."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llamafactory.train import tuner
from training_runs import QWEN_7B
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
WORDS = 1000

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 128, "vocab_size": 1100, "max_position_embeddings": 2048, "tie_word_embeddings": True}
# Shapes as their config.json says; the weights are random.
QWEN_05B = QWEN_7B | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN_05B |= {"intermediate_size": 4864, "tie_word_embeddings": True}
QWEN_15B = QWEN_7B | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
QWEN_15B |= {"intermediate_size": 8960, "tie_word_embeddings": True}


def make_model(
    folder: Path,
    shape: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A Qwen2 model of random weights, made where that is fast; its tokenizer knows words w0, w1 ... unless another."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="2GB")  # which are read and hashed side by side
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def make_tokenizer(letters: str = "") -> PreTrainedTokenizerFast:
    """A token per word w0, w1 ..., or per letter if there are any."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    known = letters or [f"w{n}" for n in range(WORDS)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    each = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.pre_tokenizer = each if letters else pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["<|im_start|>"],
        **special,
        chat_template="{{ messages }}",
    )


@dataclass(frozen=True)
class Lengths:
    """Of a pair, in tokens: the prompt, each answer, and how much of it both answers begin with."""

    prompt: int
    answer: int
    common: int


# GSM8K's pairs, as `llamafactory-ext data corrupt` makes them, have 227 tokens a row and 166 in common on average.
GSM8K = Lengths(110, 117, 56)
LONG = Lengths(512, 512, 100)
SHORT = Lengths(12, 10, 3)


def make_pairs(folder: Path, lengths: Lengths, count: int, seed: int = 0) -> Path:
    """A data folder for `dataset_dir` with the data set `pairs`, and of other pairs `pairs_eval`."""
    draw = random.Random(seed)

    def words(number: int) -> str:
        """About as many, because equal lengths would hide what each new one costs."""
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(round(number * draw.uniform(0.7, 1.3))))

    folder.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {}
    for name, rows in (("pairs", count), ("pairs_eval", min(count, 8))):
        lines = []
        for _ in range(rows):
            common = words(lengths.common)
            answers = {side: f"{common} {words(lengths.answer - lengths.common)}" for side in ("chosen", "rejected")}
            lines.append(json.dumps({"instruction": words(lengths.prompt), "input": "", **answers}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        info[name] = {"file_name": f"{name}.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Trainings:
    """Runs recipes in this process: the plugin's stage, or LLaMA-Factory's own.

    Args:
        model, data: as they were made.
        folder: runs write into folders of their own in it.
        settings: keys that all recipes share.
    """

    model: Path
    data: Path
    folder: Path
    settings: dict[str, Any]

    def __call__(self, stock: bool = False, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any) -> list[Any]:
        """Train and return what was logged, a dict per step and evaluation."""
        recipe = self.recipe(stock, **changes)
        output = Path(recipe["output_dir"])
        shutil.rmtree(output, ignore_errors=True)
        with alone(), own_stage(stock):
            tuner.run_exp(recipe, callbacks=[*callbacks])
        return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]

    def recipe(self, stock: bool = False, output: str = "run", **changes: Any) -> dict[str, Any]:
        """What `llamafactory-cli train` would take; None drops a key."""
        references = {} if stock else {"ref_log_probs_cache_dir": str(self.folder / "references")}
        recipe = {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(self.model),
            "template": "qwen",
            "dataset_dir": str(self.data),
            "dataset": "pairs",
            "finetuning_type": "full",
            "cutoff_len": 2048,
            "logging_nan_inf_filter": False,  # which logs a loss that is not a number as 0
            "learning_rate": 1.0e-5,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 1,
            "disable_shuffling": True,
            "use_cpu": DEVICE == "cpu",
            "output_dir": str(self.folder / output),
            **references,
            **self.settings,
            **changes,
        }
        return {key: value for key, value in recipe.items() if value is not None}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A training leaves its precision in the environment and in accelerate's state, and its memory to the collector."""
    from accelerate.state import AcceleratorState, GradientState

    gc.collect()  # also what an error's frames held, of a run that did not fit
    torch.cuda.empty_cache()
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def own_stage(stock: bool) -> contextlib.AbstractContextManager[Any]:
    """LLaMA-Factory's own workflow, from which the plugin's wrapper is taken for the time of a with block."""
    return mock.patch.object(tuner, "run_dpo", tuner.run_dpo.__wrapped__) if stock else contextlib.nullcontext()


def losses(logs: list[dict[str, Any]]) -> list[float]:
    return [log["loss"] for log in logs if "loss" in log]


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest between the losses of two runs, step by step; infinite if one has fewer, or a loss is no number."""
    differences = [abs(a - b) for a, b in zip(losses(one), losses(other), strict=False)]
    is_whole = differences and len(losses(one)) == len(losses(other)) and all(map(math.isfinite, differences))
    return max(differences) if is_whole else math.inf
