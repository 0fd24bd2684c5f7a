"""HH-RLHF and UltraFeedback rows as multi-turn pairs."""

from __future__ import annotations

import pytest

from llamafactory_ext.data.dialogues import hh_rlhf_pair, kind_by_scores, ultrafeedback_pair
from llamafactory_ext.rows import BadRow

HEAD = "\n\nHuman: Hi\n\nAssistant: Hello.\nHow are you?\n\nHuman: Well: a question.\n\nMore?\n\nAssistant:"


def test_hh_rlhf():
    assert hh_rlhf_pair({"chosen": HEAD + " Good.", "rejected": HEAD + " Bad.\n\nWorse. "}) == {
        "instruction": "Well: a question.\n\nMore?",
        "history": [["Hi", "Hello.\nHow are you?"]],
        "chosen": "Good.",
        "rejected": "Bad.\n\nWorse.",
    }


def test_one_turn_has_no_history():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"}
    assert hh_rlhf_pair(row) == {"instruction": "Hi", "history": [], "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        ({}, "pairs"),
        ({"score_chosen": 2.0, "score_rejected": 2.0}, "pairs"),
        ({"score_chosen": 2.0}, "pairs"),
        ({"score_chosen": 1.0, "score_rejected": 2.0}, "pairs whose rejected response has the higher score"),
        ({"score_chosen": "8", "score_rejected": 2.0}, "pairs whose scores are not numbers"),
    ],
)
def test_scores_that_say_something_else_are_counted(scores, kind):
    row = {"chosen": messages("c", "good"), "rejected": messages("c", "bad")} | scores
    assert kind_by_scores(ultrafeedback_pair(row)) == kind


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (HEAD + " A", "\n\nHuman: Hi\n\nAssistant: B", "differ before the last response"),
        (HEAD + " A", HEAD.replace("Well", "Ill") + " B", "differ before the last response"),
        (HEAD + " A", HEAD, "a turn is empty"),
        ("\n\nHuman: a\n\nHuman: b", "\n\nHuman: a\n\nHuman: c", "do not alternate"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "do not alternate"),
        ("Good.", "Bad.", "does not begin with `Human:`"),
        ("", "Bad.", "column 'chosen' is empty"),
    ],
)
def test_hh_rlhf_rows_that_give_no_pair(chosen, rejected, message):
    with pytest.raises(BadRow, match=message):
        hh_rlhf_pair({"chosen": chosen, "rejected": rejected})


def messages(*turns, system=None):
    roles = ("user", "assistant") * len(turns)
    said = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def test_ultrafeedback():
    row = {"chosen": messages("a", "b", "c", "good"), "rejected": messages("a", "b", "c", "bad"), "score_chosen": 8.0}
    pair = {"instruction": "c", "history": [["a", "b"]], "chosen": "good", "rejected": "bad"}
    assert ultrafeedback_pair(row) == {"system": "", **pair, "score_chosen": 8.0}

    row = {"chosen": messages("c", "good", system="s"), "rejected": messages("c", "bad", system="s")}
    assert ultrafeedback_pair(row) == {"system": "s", **pair, "history": []}


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (messages("a", "b", system="s"), messages("a", "c", system="t"), "differ before the last response"),
        (messages("a", "b", "c"), messages("a", "b", "d"), "do not alternate"),
        (messages("a", ""), messages("a", "b"), "a turn is empty"),
        ([], [], "do not alternate"),
        ("a", "b", "no list of messages"),
        ([{"role": "user"}], messages("a", "b"), "no list of messages with role and content in the column 'chosen'"),
    ],
)
def test_ultrafeedback_rows_that_give_no_pair(chosen, rejected, message):
    with pytest.raises(BadRow, match=message):
        ultrafeedback_pair({"chosen": chosen, "rejected": rejected})
