"""Test questions in training questions: whole, or thirteen words of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ext.errors import UserError
from llamafactory_ext.pairs.contamination import NGRAM, TestSet, read_test_set
from llamafactory_ext.pairs.rows import BadRow, Row

WORDS = [f"w{i}" for i in range(40)]
LONG = " ".join(WORDS[:20])


@pytest.mark.parametrize(
    ("question", "overlap"),
    [
        (LONG, "same"),
        (f"Answer this: {LONG.upper()}?!", "same"),
        ("Is 2 + 2 four?", "same"),  # shorter than an n-gram: only whole
        ("Is 2 + 2 five?", ""),
        (" ".join(WORDS[3 : 3 + NGRAM]) + " and more", "similar"),
        (" ".join(WORDS[3 : 2 + NGRAM]) + " and more", ""),
        ("", ""),
    ],
)
def test_overlap(question, overlap):
    assert TestSet([LONG, "Is 2 + 2 four?", "..."]).overlap(question) == overlap


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.lists(st.sampled_from("abc"), max_size=40))
def test_against_plain_search(test, asked):
    test_set = TestSet([" ".join(test)])
    whole = f" {' '.join(test)} " in f" {' '.join(asked)} "
    size = min(NGRAM, len(test))
    grams = [" ".join(test[i : i + size]) for i in range(len(test) - size + 1)]
    similar = any(f" {gram} " in f" {' '.join(asked)} " for gram in grams)
    assert test_set.overlap(" ".join(asked)) == ("same" if whole else "similar" if similar else "")


def test_reading():
    rows = [Row(1, {"question": "A b", "answer": "c"}), Row(2, {"query": "D e", "response": "f"})]
    assert len(read_test_set(rows)) == 2
    for fields in ({"text": "a"}, BadRow("not a line of JSON")):
        with pytest.raises(UserError, match=r"line 3 of the test set: .*column question, query"):
            read_test_set([*rows, Row(3, fields)])
