"""The refinement term of Sr-DPO and Sr-IPO (arXiv 2405.21040), from tokenization to the batch.

Delta = beta (D_w' - D_l') (Eq. 12): the primed log-ratios are those of the same responses under the augmented prompt
p + x. p is put before the conversation's first user message, before the template is applied. The responses keep exactly
the tokens of the unaugmented pair, as LLaMA-Factory truncates it. The augmented prompt loses as many tokens at its end
as the prompt does, so it exceeds `cutoff_len` by at most the length of p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from llamafactory.extras.constants import IGNORE_INDEX

from ..recipe.reading import UNCUT
from .answers import AnswersProcessor
from .ranking import LENGTHS, RankedCollator, between_columns, responses_of

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_IDS = "augmented_prompt_ids"  # column: token ids of the augmented prompt, without response
MADE_WITH = "augmented_with"  # column: fingerprint of the text p
BATCH_PREFIX = "augmented_"
AUGMENTED = "augmented"  # key of a batch: the `PairLogps` of its augmented pairs
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}


# --- tokenizing ------------------------------------------------------------------------------------------------------


@dataclass
class AugmentingProcessor(AnswersProcessor):
    """The tokenization of pairs with two more columns: the augmented prompt, and the fingerprint of p.

    Args:
        sr_prompt: p; part of the fingerprint by which `datasets` finds cached results.
        context: the model's context length in tokens, or None if unknown.
    """

    sr_prompt: str = ""
    context: int | None = None

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokenize a batch of pairs.

        Raises:
            ValueError: if a response with its augmented prompt exceeds the model's context.
        """
        about = (self.template, self.tokenizer, self.processor)
        whole = AnswersProcessor(*about, replace(self.data_args, cutoff_len=UNCUT))
        augmented = examples | {"_prompt": [augment(messages, self.sr_prompt) for messages in examples["_prompt"]]}
        inputs: dict[str, list[Any]] = super().preprocess_dataset(examples)
        uncut, uncut_augmented = whole.preprocess_dataset(examples), whole.preprocess_dataset(augmented)

        kept = _prompts(inputs)
        inputs[PROMPT_IDS] = [
            self._cut(*prompts) for prompts in zip(kept, _prompts(uncut), _prompts(uncut_augmented), strict=True)
        ]
        inputs[MADE_WITH] = [digest(self.sr_prompt)] * len(inputs[PROMPT_IDS])
        for side in ("chosen", "rejected"):
            for prompt, augmented_prompt, row in zip(
                kept, inputs[PROMPT_IDS], inputs.get(f"{side}_input_ids", []), strict=True
            ):
                self._check_length(len(row) - len(prompt) + len(augmented_prompt))
        for prompt, augmented_prompt, lengths in zip(kept, inputs[PROMPT_IDS], inputs.get(LENGTHS, []), strict=False):
            self._check_length(max(lengths, default=0) - len(prompt) + len(augmented_prompt))
        return inputs

    @staticmethod
    def _cut(prompt: list[int], uncut: list[int], augmented: list[int]) -> list[int]:
        return augmented[: len(augmented) - (len(uncut) - len(prompt))]

    def _check_length(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise ValueError(
                f"with `sr_prompt` in front, a pair has {length} tokens, more than the {self.context} that the model "
                f"takes: write a smaller `cutoff_len` (now {self.data_args.cutoff_len}) or a shorter `sr_prompt`."
            )


def model_context(model_args: Any) -> int | None:
    """The model's context length in tokens; None if unknown, as under `rope_scaling`."""
    from llamafactory.model import load_config

    if model_args.rope_scaling is not None:
        return None
    return getattr(load_config(model_args).get_text_config(), "max_position_embeddings", None)


def augment(messages: Sequence[dict[str, str]], sr_prompt: str) -> list[dict[str, str]]:
    """The conversation with p before its first message, which is the user's."""
    if not messages:
        return []
    first, *others = messages
    return [first | {"content": sr_prompt + first["content"]}, *others]


def digest(sr_prompt: str) -> str:
    """The fingerprint of p in a saved data set: 16 hex digits."""
    return hashlib.sha256(sr_prompt.encode()).hexdigest()[:16]


def check_augmented(dataset: Any, sr_prompt: str) -> None:
    """Refuse a data set (`tokenized_path`) that was tokenized without p or with another p.

    Raises:
        ValueError: with what to do instead.
    """
    row: dict[str, Any] = next(iter(dataset), {})
    if row and row.get(MADE_WITH) != digest(sr_prompt):
        raise ValueError(
            "the data in `tokenized_path` was tokenized without this `sr_prompt`, which the refinement term needs: "
            "name a new folder, and the data will be tokenized again."
        )


def _prompts(inputs: dict[str, list[Any]]) -> list[list[int]]:
    """The prompt of each tokenized pair."""
    rows = zip(inputs.get("chosen_input_ids", []), inputs.get("chosen_labels", []), strict=True)
    return [ids[: prompt_length(labels)] for ids, labels in rows]


def prompt_length(labels: Sequence[int]) -> int:
    """The tokens before the first one with a label."""
    return next((at for at, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


# --- batches ---------------------------------------------------------------------------------------------------------


class AugmentingCollator(RankedCollator):
    """The batch of pairs, and the augmented pairs under the same names with the prefix `augmented_`."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(features)
        augmented = super().__call__([augmented_pair(pair) for pair in features])
        return {**batch, **{f"{BATCH_PREFIX}{name}": values for name, values in augmented.items()}}


def augmented_pair(pair: dict[str, Any]) -> dict[str, Any]:
    """The same responses under the augmented prompt, in the columns of the pair."""
    prompt = np.asarray(pair[PROMPT_IDS]).tolist()
    changed: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        ids, labels = _after(prompt, pair[f"{side}_input_ids"], pair[f"{side}_labels"])
        changed |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": [1] * len(ids)}
    if LENGTHS in pair:
        changed |= between_columns([_after(prompt, *response) for response in responses_of(pair)[1:-1]])
    return pair | changed


def _after(prompt: list[int], ids: Any, labels: Any) -> tuple[list[int], list[int]]:
    """A response's ids and labels after another prompt."""
    ids, labels = np.asarray(ids).tolist(), np.asarray(labels).tolist()
    start = prompt_length(labels)
    return prompt + ids[start:], [IGNORE_INDEX] * len(prompt) + labels[start:]


def is_joinable(batch: Mapping[str, Any], per_pair: Collection[str]) -> bool:
    """Whether `joined` can join batches with these columns: text and `per_pair` only.

    Columns for images have a row per image or patch, and positions may have several axes. LLaMA-Factory adds the same
    columns to all batches of a run (a blank image where there is none), so all ranks agree.

    Args:
        per_pair: the names of other columns with a row per pair.
    """
    return set(batch) <= {*PADDING, *per_pair}


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join batches of pairs: all chosen responses, then all rejected ones, padded to one length.

    Args:
        batches: from LLaMA-Factory's pairwise collator, each `is_joinable`.
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)
    columns = {}
    for name in batches[0]:
        rows = [batch[name] for batch in batches]
        if name in PADDING:
            rows = [F.pad(row, (0, length - row.shape[1]), value=PADDING[name]) for row in rows]
            rows = [half for side in zip(*(row.chunk(2) for row in rows), strict=True) for half in side]
        columns[name] = torch.cat(rows)
    return columns


def split_batch(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a batch into the pairs and the augmented pairs, under the same names (empty if there are none)."""
    augmented = {name.removeprefix(BATCH_PREFIX): v for name, v in batch.items() if name.startswith(BATCH_PREFIX)}
    return {name: values for name, values in batch.items() if not name.startswith(BATCH_PREFIX)}, augmented
