"""Numbers that the data gives each pair, from its columns to the batch: a weight, and the gap of two scores.

LLaMA-Factory drops the columns that it does not know. So its converter, processor and collator are wrapped: each does
what it did, and the numbers travel beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..recipe.keys import split
from ..recipe.loss_args import is_number, shown

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, SCORE_GAP = "pair_weight", "score_gap"  # columns of the tokenized data, and keys of a batch
NUMBERS = (WEIGHT, SCORE_GAP)
MADE_OF = "numbers_made_of"  # column of the tokenized data: the names of the columns that the numbers come from
FLOAT32 = torch.finfo(torch.float32)


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
        weight, scores = finetuning_args.pref_weight_column, finetuning_args.pref_margin_column
        return cls(split(weight)[0] if weight else None, tuple(split(scores)) if scores else ())

    def __str__(self) -> str:
        named = {"pref_weight_column": self.weight, "pref_margin_column": ", ".join(self.scores)}
        return " and ".join(f"`{key}: {name}`" for key, name in named.items() if name)

    def numbers(self, row: Mapping[str, Any], ranked_by: str | None = None) -> dict[str, float]:
        """A row's numbers, by their keys in a batch.

        Args:
            row: of the data.
            ranked_by: the column with the scores of its answers, where there may be more than two (`answers.py`).

        Raises:
            ValueError: if a column is missing or holds no number of float32, a weight is negative, or the chosen
                response's score is not the higher one.
        """
        numbers = {}
        if self.weight is not None:
            numbers[WEIGHT] = _number(row, "pref_weight_column", self.weight)
            if numbers[WEIGHT] < 0:
                raise ValueError(f"the weight in {_place(self.weight, row)} is negative: write a number of at least 0.")
        if self.scores and ranked_by is not None:
            if self.scores != (ranked_by,):
                raise ValueError(
                    f"its answers are ordered by {ranked_by!r} (dataset_info.json), but `pref_margin_column` names "
                    f"{', '.join(map(repr, self.scores))}: write `pref_margin_column: {ranked_by}`."
                )
            numbers[SCORE_GAP] = _spread(row, ranked_by)  # `ranking.py` makes each pair's of it
        elif self.scores:
            scores = [_number(row, "pref_margin_column", name) for name in self.scores]
            numbers[SCORE_GAP] = scores[0] - scores[1] if len(scores) == 2 else scores[0]
            if not FLOAT32.tiny <= numbers[SCORE_GAP] <= FLOAT32.max:
                found = " and ".join(f"{name!r} ({shown(row[name])})" for name in self.scores)
                raise ValueError(
                    f"by {found}, the chosen response of {_row(row)} does not score higher than the rejected one, and "
                    "ODPO takes the logarithm of the difference: remove such pairs, or swap the columns if all are so."
                )
        return numbers

    def check(self, dataset: Any) -> None:
        """Refuse tokenized data (`tokenized_path`) without the numbers.

        Raises:
            ValueError: with what to do instead.
        """
        row: dict[str, Any] = next(iter(dataset), {})
        if row and row.get(MADE_OF) != str(self):
            made = row.get(MADE_OF, "neither of the two")
            raise ValueError(
                f"the data in `tokenized_path` was tokenized with {made}, not with {self}: name a new folder, and the "
                "data will be tokenized again."
            )


def _number(row: Mapping[str, Any], key: str, name: str) -> float:
    if name not in row:
        columns = ", ".join(map(repr, row))
        raise ValueError(f"`{key}` names {name!r}, but the data has the columns {columns}: write one of them.")
    if not is_number(row[name]) or not abs(row[name]) <= FLOAT32.max:  # which a NaN is not, either
        raise ValueError(f"{_place(name, row)} is no number: correct it, or remove the row.")
    return float(row[name])


def _spread(row: Mapping[str, Any], name: str) -> float:
    """The difference of the highest and the lowest score in a list; 0 for what is no list of numbers."""
    scores = row.get(name)
    if not isinstance(scores, list) or not scores or not all(map(is_number, scores)):
        return 0.0  # the row is refused or skipped for it (`answers.py`)
    return float(max(scores) - min(scores))


def _place(name: str, row: Mapping[str, Any]) -> str:
    return f"column {name!r} (value {shown(row[name])}) of {_row(row)}"


def _row(row: Mapping[str, Any]) -> str:
    return f"the row that begins with {shown(next((value for value in row.values() if value), ''))}"


# --- the way through LLaMA-Factory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarryingConverter:
    """A converter of LLaMA-Factory's whose rows keep the numbers."""

    converter: Callable[[dict[str, Any]], dict[str, Any]]
    columns: Columns
    dataset: str  # its name, for errors
    ranked_by: str | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            numbers = self.columns.numbers(row, self.ranked_by)
        except ValueError as error:
            raise ValueError(f"data set {self.dataset}: {error}") from error
        return {**self.converter(row), **numbers, MADE_OF: str(self.columns)}


class CarryingProcessor:
    """A processor of pairs whose rows keep the numbers. LLaMA-Factory's drops rows, so it gets one at a time."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.print_data_example = processor.print_data_example

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        carried = [key for key in (*NUMBERS, MADE_OF) if key in examples]
        for at in range(len(examples["_prompt"])):
            inputs = self.processor.preprocess_dataset({name: values[at : at + 1] for name, values in examples.items()})
            rows = max(map(len, inputs.values()), default=0)  # 0 if the pair was dropped
            for name, values in {**inputs, **{key: [examples[key][at]] * rows for key in carried}}.items():
                found.setdefault(name, []).extend(values)
        return found


def carrying_collator(base: type, columns: Columns) -> type:
    """A subclass of a collator of pairs whose batches have the numbers of these columns, shape `(batch,)`.

    They stand there as the bits of float32, int32, because DeepSpeed casts the floats of a batch to half precision.
    """
    keys = [key for key, name in ((WEIGHT, columns.weight), (SCORE_GAP, columns.scores)) if name]

    class CarryingCollator(base):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
            numbers = {key: torch.tensor([float(pair[key]) for pair in features]).view(torch.int32) for key in keys}
            return {**super().__call__(features), **numbers}

    return CarryingCollator


def take_columns(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Remove the numbers from a batch, and return them: float32, shape `(batch,)`."""
    return {key: batch.pop(key).view(torch.float32) for key in NUMBERS if key in batch}
