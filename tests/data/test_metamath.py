"""Few-shot to zero-shot by joining: every trap is resolved as specified."""

from __future__ import annotations

import json
from collections import Counter

import few_shot_data
import pytest

from llamafactory_ext.data.metamath import Template, index_queries, learn_template, zero_shot_pair
from llamafactory_ext.errors import UserError
from llamafactory_ext.rows import BadRow, Row

TEMPLATE = Template("Q: ", "\nA:")


def pair(prompt, *queries, template=TEMPLATE, response="r"):
    index = {response: list(queries)}
    return zero_shot_pair({"prompt": prompt, "chosen": "r", "rejected": "w"}, index, template)


def made(how, question):
    return how, {"instruction": question, "chosen": "r", "rejected": "w"}


SHOTS = "Q: old one\nA: r\n\n"


@pytest.mark.parametrize(
    ("prompt", "queries", "expected"),
    [
        (SHOTS + "Q: new\nA:", ["new"], made("matched", "new")),
        (SHOTS + "Q: new\nA: ", ["new"], made("matched", "new")),
        ("Q: new\nA:", ["new"], made("matched", "new")),
        # The same query in the examples and at the end.
        (SHOTS + "Q: old one\nA:", ["old one"], made("matched", "old one")),
        # Beginnings of one another, whichever is asked.
        (SHOTS + "Q: old\nA:", ["old one", "old"], made("matched", "old")),
        ("Q: old\nA: r\n\nQ: old one\nA:", ["old", "old one"], made("matched", "old one")),
        # Ends of one another: the longer.
        (SHOTS + "Q: a new\nA:", ["new", "a new"], made("matched", "a new")),
        # The end of a question that is not known: not the question.
        (SHOTS + "Q: a new\nA:", ["new"], made("fallback", "a new")),
        # Known only from the examples.
        (SHOTS + "Q: new\nA:", ["old one"], made("fallback", "new")),
        (SHOTS + "Q: new\nA:", [], made("fallback", "new")),
        # The delimiters inside of a question.
        (SHOTS + "Q: is\nQ: a\nA: b\n\nc\nA:", ["is\nQ: a\nA: b\n\nc"], made("matched", "is\nQ: a\nA: b\n\nc")),
    ],
)
def test_the_question(prompt, queries, expected):
    assert pair(prompt, *queries) == expected


def test_without_a_lead_a_question_begins_a_line():
    template = Template("", "\n\nAnswer:")
    shots = "old one\n\nAnswer: r\n\n"
    assert pair(shots + "new one\n\nAnswer:", "new one", template=template) == made("matched", "new one")
    assert pair(shots + "new one\n\nAnswer:", "one", template=template) == made("fallback", "new one")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("Q: new\nB:", "does not end in"), ("new\nA:", "has no 'Q: '"), ("Q: old\nA: r\n\nQ: \nA:", "without a question")],
)
def test_prompts_of_another_shape(prompt, message):
    with pytest.raises(BadRow, match=message):
        pair(prompt)


def test_a_prompt_is_put_in_front():
    _, made = zero_shot_pair({"prompt": "Q: new\nA:", "chosen": "r", "rejected": "w"}, {}, TEMPLATE, "Think.\n")
    assert made["instruction"] == "Think.\nnew"


def test_index():
    rows = [Row(1, {"query": " a ", "response": "r\n"}), Row(2, {"query": "b", "response": "r"})]
    bad = [Row(3, BadRow("not valid JSON")), Row(4, {"query": "c"})]
    index, unusable = index_queries([*rows, *bad])
    assert index == {"r": ["a", "b"]}
    assert unusable == {"not valid JSON": 1, "no text in the column 'response'": 1}
    with pytest.raises(UserError, match="no rows with `query` and `response`"):
        index_queries(bad)


def test_template_is_learned_from_most_prompts():
    sample = [{"prompt": f"{SHOTS}Q: new {i}\nA:", "chosen": f"r{i}"} for i in range(5)]
    index = {f"r{i}": [f"new {i}"] for i in range(5)}
    index["r0"] = ["old one"]  # in the examples only: another place than the others
    assert learn_template(sample, index) == TEMPLATE
    with pytest.raises(UserError, match="only 2 of the first 5 prompts"):
        learn_template(sample, {"r1": ["new 1"], "r2": ["new 2"]})
    with pytest.raises(UserError, match="only 0 of the first 0"):
        learn_template([], index)


def test_synthetic_data_with_every_trap():
    """The generator that measures the time of 395,000 rows, and knows what must become of each."""
    examples = list(few_shot_data.examples(1200, share_of_traps=0.05))
    rows = [Row(i, row) for i, row in enumerate(q for example in examples for q in example.questions)]
    index, _ = index_queries(rows)
    plain = [json.loads(example.line) for example in examples[:200] if example.how != "not valid JSON"]
    template = learn_template(plain, index)
    assert template == Template("Question: ", few_shot_data.SUFFIX)

    became = Counter()
    for example in examples:
        if example.how == "not valid JSON":
            continue
        try:
            how, made = zero_shot_pair(json.loads(example.line), index, template)
        except BadRow as reason:
            how = str(reason)
        else:
            assert made["instruction"] == example.question
            if made["chosen"] == made["rejected"]:
                how = "chosen and rejected are identical"
        assert how.startswith(example.how)
        became[example.how] += 1
    assert set(became.values()) - {became["matched"]} == {5, 10}  # of 60 traps, 11 kinds in turn
    assert became["fallback"] == 10
