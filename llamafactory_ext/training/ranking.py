"""Rows with more than two responses, from their tokens to a batch: which response is compared with which.

A row's first response is its `chosen` one, its last is `rejected`, and those between them stand in columns of their
own. Each response is compared with those that score lower. A batch in which every row has two is LLaMA-Factory's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llamafactory.data import PairwiseDataCollatorWithPadding
from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq

from .columns import SCORE_GAP

if TYPE_CHECKING:
    from torch import Tensor

# Columns: the responses between the first and the last, one after the other, and their lengths. Flat, so that rows with
# none have the same type, whatever rows stand beside them.
BETWEEN = ("between_input_ids", "between_labels")
LENGTHS = "between_lengths"
SCORES = "answer_scores"  # column: a score per response, none lower than the next
RANKING = "ranking"  # key of a batch
MEDIA = ("images", "videos", "audios")
LD_ALPHA = (
    "`ld_alpha` weights tokens beyond the shorter response of a pair, but some rows have more than two responses: "
    "remove `ld_alpha`, or write the rows as pairs."
)
# A difference of scores has to be a number of float32, and so has its logarithm.
HIGHEST, LEAST_GAP = 1e30, torch.finfo(torch.float32).tiny

Response = tuple[Sequence[int], Sequence[int]]  # token ids and labels of prompt and response


def responses_of(row: Mapping[str, Any]) -> list[Response]:
    """A tokenized row's responses, from the highest score to the lowest."""
    sides = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")]
    ends = [0, *accumulate(map(int, row.get(LENGTHS, ())))]
    ids, labels = (row.get(name, ()) for name in BETWEEN)
    return [sides[0], *((ids[start:end], labels[start:end]) for start, end in pairwise(ends)), sides[1]]


def between_columns(responses: Sequence[Response]) -> dict[str, Any]:
    """The columns of some responses that stand between the first and the last."""
    flat = [[number for response in responses for number in response[part]] for part in range(2)]
    columns = dict(zip(BETWEEN, flat, strict=True)) | {LENGTHS: [len(ids) for ids, _ in responses]}
    return {name: np.array(values, dtype=np.int64) for name, values in columns.items()}


def has_several(row: Mapping[str, Any]) -> bool:
    """Whether a tokenized row has more than two responses."""
    return len(row.get(LENGTHS, ())) > 0


@dataclass(frozen=True)
class Ranking:
    """Which responses of a batch are compared.

    Args:
        sizes: the number of responses of each data row; in the batch, those of one row follow one another.
        pairs: the places in the batch of the better and the worse response of each pair, a data row's pairs together.
        gaps: by how much their scores differ, above 0, in the data's unit.
    """

    sizes: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    gaps: tuple[float, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Ranking:
        """That of tokenized rows: each response with those that score lower."""
        sizes: list[int] = []
        pairs: list[tuple[int, int]] = []
        gaps: list[float] = []
        for row in rows:
            scores, start = _scores(row), sum(sizes)
            for better, high in enumerate(scores):
                for worse, low in enumerate(scores[better + 1 :], start=better + 1):
                    if high - low >= LEAST_GAP:
                        pairs.append((start + better, start + worse))
                        gaps.append(high - low)
            sizes.append(len(scores))
        return cls(tuple(sizes), tuple(pairs), tuple(gaps))

    @cached_property
    def groups(self) -> list[list[int]]:
        """The places in the batch of each data row's responses."""
        ends = [sum(self.sizes[: number + 1]) for number in range(len(self.sizes))]
        return [list(range(end - size, end)) for size, end in zip(self.sizes, ends, strict=True)]

    @cached_property
    def _group_of_pair(self) -> list[int]:
        of_response = [number for number, group in enumerate(self.groups) for _ in group]
        return [of_response[better] for better, _ in self.pairs]

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the better and of the worse response of each pair, from one per response."""
        better, worse = _on(self.pairs, values.device).unbind(dim=1)
        return values[better], values[worse]

    def comparison(self, device: torch.device) -> dict[str, Tensor]:
        """What a loss may know of the pairs (fields of `PairLogps`), shape `(pairs,)` each."""
        return {
            "winner": _on([better for better, _ in self.pairs], device),
            "group": _on(self._group_of_pair, device),
            "score_gap": torch.tensor(self.gaps).to(device, non_blocking=True),
        }

    def of_pairs(self, values: Tensor) -> Tensor:
        """A value per pair, shape `(pairs,)`, from one per data row."""
        return values[_on(self._group_of_pair, values.device)]

    def shares(self, by_gap: bool, device: torch.device) -> Tensor:
        """The weight of each pair in the batch's mean, shape `(pairs,)`: a data row's add up to one over the rows.

        Args:
            by_gap: whether a row's pairs weigh as much as their scores differ, not all the same.
            device: of the result.
        """
        gaps = self.gaps if by_gap else (1.0,) * len(self.pairs)
        totals = [0.0] * len(self.sizes)
        for group, gap in zip(self._group_of_pair, gaps, strict=True):
            totals[group] += gap
        shares = [gap / totals[group] / len(self.sizes) for group, gap in zip(self._group_of_pair, gaps, strict=True)]
        return torch.tensor(shares).to(device, non_blocking=True)


def _scores(row: Mapping[str, Any]) -> list[float]:
    """A score per response. The first and the last differ by what the recipe's columns say, if it names any."""
    given = row.get(SCORES)
    scores = [1.0, 0.0] if given is None else [float(score) for score in given]
    scale = row[SCORE_GAP] / (scores[0] - scores[-1]) if SCORE_GAP in row else 1.0
    return [scale * score for score in scores]


def _on(numbers: Any, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def check_ranking(finetuning_args: Any, dataset: Any) -> None:
    """Refuse a recipe that weights the tokens of pairs, where a data row has more than two responses.

    Raises:
        ValueError: with what to write instead.
    """
    if finetuning_args.ld_alpha is None or LENGTHS not in (getattr(dataset, "column_names", None) or []):
        return
    if any(map(has_several, dataset.select_columns([LENGTHS]))):
        raise ValueError(LD_ALPHA)


class RankedCollator(PairwiseDataCollatorWithPadding):
    """LLaMA-Factory's collator of pairs. With a row of more than two responses, a batch has them row by row, and a
    `Ranking`."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if not any(map(has_several, features)):
            return dict(super().__call__(features))
        responses = [
            {
                "input_ids": np.asarray(ids).tolist(),
                "attention_mask": [1] * len(ids),
                "labels": np.asarray(labels).tolist(),
                **{name: feature.get(name) for name in MEDIA},
            }
            for feature in features
            for ids, labels in responses_of(feature)
        ]
        batch = MultiModalDataCollatorForSeq2Seq.__call__(self, responses)
        return {**batch, RANKING: Ranking.of_rows(features)}
