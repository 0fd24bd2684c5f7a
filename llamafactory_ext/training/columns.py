"""Numbers that the data gives each pair, from its columns to the batch: a weight, and the gap of two scores.

LLaMA-Factory drops the columns that it does not know. So its converter, processor and collator are wrapped: each does
what it did, and the numbers travel beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..recipe.keys import split
from ..recipe.loss_args import is_number, shown

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, SCORE_GAP = "pair_weight", "score_gap"  # columns of the tokenized data, and keys of a batch
KEYS = (WEIGHT, SCORE_GAP)


@dataclass(frozen=True)
class Columns:
    """The columns that a recipe names.

    Args:
        weight: of a pair's weight (`pref_weight_column`).
        scores: of the chosen and the rejected response's score, or of their difference (`pref_margin_column`).
    """

    weight: str | None = None
    scores: tuple[str, ...] = ()

    @classmethod
    def of_recipe(cls, finetuning_args: Any) -> Columns:
        scores = finetuning_args.pref_margin_column
        return cls(finetuning_args.pref_weight_column, tuple(split(scores)) if scores is not None else ())

    def numbers(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A row's numbers, by their keys in a batch.

        Raises:
            ValueError: if a column is missing or holds no number, a weight is negative, or the chosen response's score
                is not the higher one.
        """
        numbers = {}
        if self.weight is not None:
            numbers[WEIGHT] = _number(row, "pref_weight_column", self.weight)
            if numbers[WEIGHT] < 0:
                raise ValueError(f"the weight in {_place(self.weight, row)} is negative: write a number of at least 0.")
        if self.scores:
            scores = [_number(row, "pref_margin_column", name) for name in self.scores]
            numbers[SCORE_GAP] = scores[0] - scores[1] if len(scores) == 2 else scores[0]
            if not 0 < numbers[SCORE_GAP] < math.inf:
                raise ValueError(
                    f"by {_place(self.scores[0], row)}, the chosen response does not score higher than the rejected "
                    "one, and ODPO takes the logarithm of the difference: remove such pairs."
                )
        return numbers

    def check(self, dataset: Any) -> None:
        """Refuse tokenized data (`tokenized_path`) without the numbers.

        Raises:
            ValueError: with what to do instead.
        """
        row: dict[str, Any] = next(iter(dataset), {})
        for key, name in ((WEIGHT, self.weight), (SCORE_GAP, ", ".join(self.scores))):
            if row and name and key not in row:
                raise ValueError(
                    f"the data in `tokenized_path` was tokenized without the column {name!r}: name a new folder, and "
                    "the data will be tokenized again."
                )


def _number(row: Mapping[str, Any], key: str, name: str) -> float:
    if name not in row:
        columns = ", ".join(map(repr, row))
        raise ValueError(f"`{key}` names {name!r}, but the data has the columns {columns}: write one of them.")
    if not is_number(row[name]) or not math.isfinite(row[name]):
        raise ValueError(f"{_place(name, row)} is no number: correct it, or remove the row.")
    return float(row[name])


def _place(name: str, row: Mapping[str, Any]) -> str:
    first = next((value for value in row.values() if value), "")
    return f"column {name!r} (value {shown(row[name])}) of the row that begins with {shown(first)}"


# --- the way through LLaMA-Factory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarryingConverter:
    """A converter of LLaMA-Factory's whose rows keep the numbers."""

    converter: Callable[[dict[str, Any]], dict[str, Any]]
    columns: Columns

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**self.converter(row), **self.columns.numbers(row)}


class CarryingProcessor:
    """A processor of pairs whose rows keep the numbers. LLaMA-Factory's drops rows, so it gets one at a time."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.print_data_example = processor.print_data_example

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        carried = [key for key in KEYS if key in examples]
        for at in range(len(examples["_prompt"])):
            inputs = self.processor.preprocess_dataset({name: values[at : at + 1] for name, values in examples.items()})
            rows = max(map(len, inputs.values()), default=0)  # 0 if the pair was dropped
            for name, values in {**inputs, **{key: [examples[key][at]] * rows for key in carried}}.items():
                found.setdefault(name, []).extend(values)
        return found


def carrying_collator(base: type) -> type:
    """A subclass of a collator of pairs whose batches have the numbers, shape `(batch,)`, float32."""

    class CarryingCollator(base):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
            numbers = {key: torch.tensor([pair[key] for pair in features]) for key in KEYS if key in features[0]}
            return {**super().__call__(features), **numbers}

    return CarryingCollator


def take_columns(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Remove the numbers from a batch, and return them."""
    return {key: batch.pop(key) for key in KEYS if key in batch}
