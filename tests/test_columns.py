"""Weights and scores of the data: read, checked, and with their pair through shuffling and dropped rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ext.training.columns import (
    MADE_OF,
    SCORE_GAP,
    WEIGHT,
    CarryingConverter,
    CarryingProcessor,
    Columns,
    carrying_collator,
    take_columns,
)

ROW = {"instruction": "What is 1 + 1?", "weight": 2, "good": 5.5, "bad": 3, "text": "3", "none": None}
ROW |= {"nan": math.nan, "huge": 1e39, "small": 1e-50}


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [
        (Columns(), {}),
        (Columns(weight="weight"), {WEIGHT: 2.0}),
        (Columns(scores=("good",)), {SCORE_GAP: 5.5}),
        (Columns(weight="bad", scores=("good", "bad")), {WEIGHT: 3.0, SCORE_GAP: 2.5}),
    ],
)
def test_numbers_of_a_row(columns, numbers):
    assert columns.numbers(ROW) == numbers


def test_scores_of_several_answers_are_their_data_sets_own():
    row = {"marks": [0.5, 3.0, 1.0], "gap": 7.0, "other": [1.0, 2.0]}
    assert Columns(scores=("marks",)).numbers(row, ranked_by="marks") == {SCORE_GAP: 2.5}
    for named in (("gap",), ("other",), ("marks", "gap")):
        with pytest.raises(ValueError, match=r"ordered by 'marks' .*: write `pref_margin_column: marks`"):
            Columns(scores=named).numbers(row, ranked_by="marks")
    with pytest.raises(ValueError, match=r"column 'marks' .* is no number"):
        Columns(scores=("marks",)).numbers(row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            Columns(weight="wight"),
            "`pref_weight_column` names 'wight', but the data has the columns 'instruction', 'weigh",
        ),
        (Columns(scores=("good", "evil")), "`pref_margin_column` names 'evil'"),
        (Columns(weight="text"), "column 'text' .value '3'. of the row that begins with 'What is 1 . 1.' is no number"),
        (Columns(weight="none"), "column 'none' .value None.*is no number"),
        (Columns(weight="nan"), "is no number"),
        (Columns(weight="huge"), "is no number"),
        (Columns(scores=("small",)), "does not score higher"),
        (
            Columns(scores=("bad", "good")),
            "by 'bad' .3. and 'good' .5.5., .* does not score higher",
        ),
        (Columns(scores=("good", "good")), "remove such pairs"),
    ],
)
def test_refused_rows(columns, message):
    with pytest.raises(ValueError, match=message):
        columns.numbers(ROW)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="is negative: write a number of at least 0"):
        Columns(weight="weight").numbers({**ROW, "weight": -0.1})


def test_tokenized_data_of_other_columns_is_refused():
    columns = Columns(weight="weight", scores=("good", "bad"))
    row = CarryingConverter(dict, columns, "pairs")(ROW)
    columns.check([row])
    columns.check([])
    for other in (Columns(weight="bad", scores=("good", "bad")), Columns(weight="weight"), Columns(scores=("good",))):
        with pytest.raises(
            ValueError, match="`pref_weight_column: weight` and `pref_margin_column: good, bad`, not with"
        ):
            other.check([row])
    with pytest.raises(ValueError, match=r"tokenized with neither of the two, not with .*: name a new folder"):
        columns.check([{"_prompt": []}])


def test_errors_name_the_data_set():
    with pytest.raises(ValueError, match="data set pairs_eval: `pref_weight_column` names 'wight'"):
        CarryingConverter(dict, Columns(weight="wight"), "pairs_eval")(ROW)


class Dropping:
    """A processor that drops pairs as LLaMA-Factory's does, and makes two columns of the others."""

    def preprocess_dataset(self, examples):
        kept = [prompt for prompt, is_kept in zip(examples["_prompt"], examples["_kept"], strict=True) if is_kept]
        return {"a": kept, "b": [len(prompt) for prompt in kept]} if kept else {}

    def print_data_example(self, example):
        pass


@given(st.lists(st.tuples(st.text(), st.booleans(), st.floats(0, 9))))
def test_numbers_stay_with_their_pair_where_others_are_dropped(rows):
    prompts, kept, weights = ([row[at] for row in rows] for at in range(3))
    found = CarryingProcessor(Dropping()).preprocess_dataset(
        {"_prompt": prompts, "_kept": kept, WEIGHT: weights, MADE_OF: [""] * len(rows)}
    )
    expected = [(prompt, weight) for prompt, is_kept, weight in rows if is_kept]
    assert list(zip(found.get("a", []), found.get(WEIGHT, []), strict=True)) == expected
    assert len(found.get("b", [])) == len(expected)


def test_numbers_keep_their_precision_where_the_floats_of_a_batch_are_cast():
    """As transformers casts them for DeepSpeed, to the precision of its configuration."""

    class Base:
        def __call__(self, features):
            return {"input_ids": torch.zeros(len(features), 2, dtype=torch.int64), "pixels": torch.ones(1)}

    collator = carrying_collator(Base, Columns(weight="weight", scores=("gap",)))()
    batch = collator([{WEIGHT: 0.3, SCORE_GAP: 1.2345678}, {WEIGHT: 1e30, SCORE_GAP: 1e-30}])
    cast = {name: values.bfloat16() if values.is_floating_point() else values for name, values in batch.items()}
    numbers = take_columns(cast)
    assert numbers[WEIGHT].tolist() == torch.tensor([0.3, 1e30]).tolist()
    assert numbers[SCORE_GAP].tolist() == torch.tensor([1.2345678, 1e-30]).tolist()
    assert set(cast) == {"input_ids", "pixels"}
