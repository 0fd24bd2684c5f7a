"""The length of a training: pairs, steps and tokens, counted as LLaMA-Factory and transformers count them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import UserError
from ..recipe.reading import Settings, check_numbers, data_sets

WARMUP = ("warmup_steps", "warmup_ratio")
PAD_TO = 8  # LLaMA-Factory's collator pads to a multiple of this many tokens


@dataclass(frozen=True)
class Schedule:
    """The length of a training. Values that depend on an unknown number of pairs are None.

    Args:
        pairs: rows of the training set.
        global_batch: pairs per step on all GPUs.
        steps_per_epoch, steps, warmup_steps: optimizer steps.
        tokens_per_step: token positions of one step, with padding: two sequences per pair, each with its prompt, and
            two more for the augmented pair of a refinement term.
    """

    pairs: int | None
    global_batch: int
    steps_per_epoch: int | None
    steps: int | None
    warmup_steps: int | None
    tokens_per_step: int

    @property
    def tokens(self) -> int | None:
        """Token positions of all steps."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def ends_early(self) -> bool:
        """Whether it ends before it has seen every pair; False if that is unknown."""
        return self.pairs is not None and self.steps is not None and self.steps * self.global_batch < self.pairs


def padded(tokens: int) -> int:
    """The length of a sequence after padding, in tokens."""
    return math.ceil(tokens / PAD_TO) * PAD_TO


def training_args_of(settings: Settings) -> SimpleNamespace:
    """The recipe's training arguments with their defaults, without the set-up that `TrainingArguments` starts.

    Raises:
        UserError: if a number that decides on the schedule is wrong.
    """
    from llamafactory.hparams import TrainingArguments

    defaults = {field.name: field.default for field in fields(TrainingArguments) if field.default is not MISSING}
    check_numbers(settings, {"max_steps": int, "num_train_epochs": float} | dict.fromkeys(WARMUP, float | None))
    check_numbers(settings, {"learning_rate": float})
    args = SimpleNamespace(**{**defaults, **settings, "do_train": True})
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs is {args.num_train_epochs}: write a number above 0, or set max_steps.")
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        value = getattr(args, key)
        if type(value) is not int or value < 1:
            raise UserError(f"{key} is {value!r}: write a whole number of at least 1.")
    return args


def make_schedule(
    training_args: Any, pairs: int | None, gpus: int, tokens: int, augmented: int | None = None
) -> Schedule:
    """The schedule of a training.

    Args:
        training_args: transformers' training arguments.
        pairs: rows of the training set, None if unknown.
        gpus: number of GPUs on all nodes.
        tokens: tokens of one sequence, prompt and response.
        augmented: tokens of a sequence with an augmented prompt, None without a refinement term.
    """
    micro, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    per_epoch = None if pairs is None else steps_per_epoch(pairs, micro, accumulation, gpus)
    steps: int | None = None
    if training_args.max_steps > 0:
        steps = training_args.max_steps
    elif per_epoch is not None:
        steps = math.ceil(training_args.num_train_epochs * per_epoch)
    global_batch = micro * accumulation * gpus
    return Schedule(
        pairs=pairs,
        global_batch=global_batch,
        steps_per_epoch=per_epoch,
        steps=steps,
        warmup_steps=None if steps is None else _warmup_steps(training_args, steps),
        tokens_per_step=2 * global_batch * (padded(tokens) + (0 if augmented is None else padded(augmented))),
    )


def steps_per_epoch(pairs: int, micro_batch: int, accumulation: int, gpus: int) -> int:
    """Optimizer steps of an epoch. Incomplete micro-batches, rounds over the GPUs and accumulations count as whole:
    accelerate fills up the last round, and transformers steps after the last micro-batch."""
    micro_batches = math.ceil(math.ceil(pairs / micro_batch) / gpus)
    return max(1, math.ceil(micro_batches / accumulation))


def _warmup_steps(training_args: Any, steps: int) -> int:
    """`warmup_steps` is a number of steps, or, below 1, a share of all; `warmup_ratio` is the older key."""
    if str(training_args.lr_scheduler_type) == "constant":
        return 0
    warmup = training_args.warmup_steps or training_args.warmup_ratio or 0
    return int(warmup) if warmup >= 1 else math.ceil(warmup * steps)


def count_pairs(data_args: Any, notes: list[str]) -> int | None:
    """Rows of the training set, counted in local files, before LLaMA-Factory drops faulty ones; None if unknown.

    Args:
        data_args: LLaMA-Factory's data arguments.
        notes: gets the reason if the number is unknown.

    Raises:
        UserError: as `data_sets` does.
    """
    if data_args.streaming or data_args.mix_strategy != "concat" or data_args.tokenized_path:
        notes.append("The number of pairs is unknown with streaming, mix_strategy or tokenized_path.")
        return None
    if not data_args.dataset:
        notes.append("The number of pairs is unknown: the recipe names no dataset.")
        return None
    total = 0
    for attributes in data_sets(data_args.dataset, data_args.dataset_dir):
        rows = attributes.num_samples
        if rows is None and attributes.load_from == "file":
            rows = _rows_of(Path(data_args.dataset_dir) / attributes.dataset_name)
        if rows is None:
            notes.append(
                f"The number of pairs is unknown: {attributes.dataset_name!r} is not a local file that can be counted. "
                "Make the data first, or set max_steps."
            )
            return None
        total += min(rows, data_args.max_samples or rows)
    held_out = int(data_args.val_size) if data_args.val_size > 1 else math.ceil(data_args.val_size * total)
    if total <= held_out:
        raise UserError(f"{', '.join(data_args.dataset)}: there are no pairs to train on: add rows to the data.")
    return total - held_out


def _rows_of(path: Path) -> int | None:
    """Rows of a file, or of all files in a folder; None if there is no file yet, or no cheap way to count."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if not all(file.is_file() and file.suffix in COUNTERS for file in files):
        return None
    try:
        return sum(COUNTERS[file.suffix](file) for file in files)
    except Exception:  # whatever a damaged file raises: `data check` says where it is damaged
        return None


def _json_rows(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        if file.suffix == ".json" and lines.read(1) == "[":
            lines.seek(0)
            return len(json.load(lines))
        lines.seek(0)
        return sum(1 for line in lines if line.strip())


def _csv_rows(file: Path) -> int:
    with file.open(encoding="utf-8", newline="") as lines:
        return sum(1 for _ in csv.reader(lines)) - 1


def _parquet_rows(file: Path) -> int:
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)


COUNTERS: dict[str, Callable[[Path], int]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
