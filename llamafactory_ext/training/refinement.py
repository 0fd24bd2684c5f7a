"""Sr (arXiv 2405.21040): the same responses under a prompt that asks for quality, from tokenizing to the batch.

Delta = beta (D_w' - D_l') (Eq. 12), where the primed logratios are taken under the augmented prompt p + x. p goes in
front of the conversation's first user message before the template is applied, so that everything else stays where it
was. The responses are the very tokens of the unaugmented pair, truncated as LLaMA-Factory does; from the end of the
augmented prompt as many tokens are cut as from that of the prompt, so that it may exceed `cutoff_len` by p alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from llamafactory.data import PairwiseDataCollatorWithPadding
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.extras.constants import IGNORE_INDEX

from ..recipe.reading import UNCUT

if TYPE_CHECKING:
    from torch import Tensor

    from ..losses.pairs import PairLogps

PROMPT_IDS = "augmented_prompt_ids"  # column: the augmented prompt, without response
MADE_WITH = "augmented_with"  # column: which text it was augmented with
BATCH_PREFIX = "augmented_"
AUGMENTED = "augmented"  # of a batch: what is known of its augmented pairs
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}


# --- tokenizing ------------------------------------------------------------------------------------------------------


@dataclass
class AugmentingProcessor(PairwiseDatasetProcessor):
    """LLaMA-Factory's tokenization of pairs, with two columns more: the augmented prompt, and what augmented it.

    Args:
        sr_prompt: p; a part of what `datasets` recognises cached results by.
        context: the most tokens that the model takes, or None if it is not known.
    """

    sr_prompt: str = ""
    context: int | None = None

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokenize a batch of pairs.

        Raises:
            ValueError: if a pair with its augmented prompt exceeds the model's context.
        """
        whole = PairwiseDatasetProcessor(
            self.template, self.tokenizer, self.processor, replace(self.data_args, cutoff_len=UNCUT)
        )
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
    """The most tokens that the model takes; unknown where the recipe stretches it."""
    from llamafactory.model import load_config

    if model_args.rope_scaling is not None:
        return None
    return getattr(load_config(model_args).get_text_config(), "max_position_embeddings", None)


def augment(messages: Sequence[dict[str, str]], sr_prompt: str) -> list[dict[str, str]]:
    """The conversation with p in front of its first message, which is the user's."""
    if not messages:
        return []
    first, *others = messages
    return [first | {"content": sr_prompt + first["content"]}, *others]


def digest(sr_prompt: str) -> str:
    """What the text of p is recognised by in a saved data set."""
    return hashlib.sha256(sr_prompt.encode()).hexdigest()[:16]


def check_augmented(dataset: Any, sr_prompt: str) -> None:
    """Refuse a data set that was tokenized without p, or with another one (`tokenized_path`).

    Raises:
        ValueError: with a sentence that says what to do.
    """
    row: dict[str, Any] = next(iter(dataset), {})
    if row and row.get(MADE_WITH) != digest(sr_prompt):
        raise ValueError(
            "the data of `tokenized_path` was tokenized without this `sr_prompt`, which the refinement term needs: "
            "name a new folder, and the data will be tokenized again."
        )


def _prompts(inputs: dict[str, list[Any]]) -> list[list[int]]:
    """The prompt of each tokenized pair: what has no label."""
    rows = zip(inputs.get("chosen_input_ids", []), inputs.get("chosen_labels", []), strict=True)
    return [ids[: sum(label == IGNORE_INDEX for label in labels)] for ids, labels in rows]


# --- batches ---------------------------------------------------------------------------------------------------------


class AugmentingCollator(PairwiseDataCollatorWithPadding):
    """LLaMA-Factory's batch of pairs, and under names that begin with `augmented_` the same with the other prompt."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        augmented = super().__call__([augmented_pair(pair) for pair in features])
        return {**batch, **{f"{BATCH_PREFIX}{name}": values for name, values in augmented.items()}}


def augmented_pair(pair: dict[str, Any]) -> dict[str, Any]:
    """The same responses under the augmented prompt, as lists like those of the pair."""
    prompt = np.asarray(pair[PROMPT_IDS]).tolist()
    changed = {}
    for side in ("chosen", "rejected"):
        labels = np.asarray(pair[f"{side}_labels"])
        response = labels[labels != IGNORE_INDEX].tolist()
        changed[f"{side}_input_ids"] = prompt + response
        changed[f"{side}_labels"] = [IGNORE_INDEX] * len(prompt) + response
        changed[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
    return pair | changed


def is_joinable(batch: Mapping[str, Any], per_pair: Collection[str]) -> bool:
    """Whether `joined` knows what the rows of every column are.

    It does for text. What a collator adds for a picture has a row per picture or per patch, and positions may have
    several axes. LLaMA-Factory adds the same columns to all batches of a run (those without a picture get a blank one),
    so the ranks of a run agree.

    Args:
        per_pair: the columns with a row per pair.
    """
    return set(batch) <= {*PADDING, *per_pair}


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of pairs as one: the chosen answers of all of them, then the rejected ones, padded to one length.

    Args:
        batches: of LLaMA-Factory's pairwise collator, each `is_joinable`.
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
    """The pairs, and the augmented pairs under the same names (empty if there are none)."""
    augmented = {name.removeprefix(BATCH_PREFIX): v for name, v in batch.items() if name.startswith(BATCH_PREFIX)}
    return {name: values for name, values in batch.items() if not name.startswith(BATCH_PREFIX)}, augmented


# --- the term --------------------------------------------------------------------------------------------------------


def refinement(augmented: PairLogps, hyperparameters: Mapping[str, Any], beta: float) -> Tensor:
    """Delta = beta (D_w' - D_l') (arXiv 2405.21040, Eq. 12), shape `(batch,)`, on the loss's scale: sums or means.

    Args:
        augmented: the responses under the augmented prompts.
        hyperparameters: the loss's; `length_normalize` says whether it works on means per token.
        beta: `pref_beta`.
    """
    return beta * (augmented.per_token() if hyperparameters.get("length_normalize", False) else augmented).margin


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the time of a with block, but for linear layers.

    Those have no dropout, and bitsandbytes' would repack their weights for good in evaluation mode on a CPU.
    """
    switched = [module for module in model.modules() if module.training and not isinstance(module, torch.nn.Linear)]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True
