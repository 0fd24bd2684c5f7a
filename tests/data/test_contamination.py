"""Test questions in training questions: whole, or thirteen words of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ext.data.contamination import CHARACTERS, NGRAM, TestSet, read_test_set, words
from llamafactory_ext.errors import UserError
from llamafactory_ext.rows import BadRow, Row

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


CHINESE = "小明有24个苹果，他给了小红一半，又买了3个新的苹果。现在小明一共有多少个苹果？"
JAPANESE = "太郎君は毎日リンゴを２個ずつ食べます。１週間でリンゴを全部で何個食べることになりますか。"
THAI = "สมชายมีแอปเปิ้ลสามผล เขาซื้อเพิ่มอีกห้าผล ตอนนี้เขามีแอปเปิ้ลทั้งหมดกี่ผล"


@pytest.mark.parametrize("question", [CHINESE, JAPANESE, THAI])
def test_scripts_without_spaces(question):
    test_set = TestSet([question])
    asked = "".join(words(question))
    assert len(words(question)) > CHARACTERS
    assert test_set.overlap(question) == "same"
    assert test_set.overlap(f"请回答：{question.replace('，', '')}谢谢") == "same"  # within a longer clause
    near = asked[: CHARACTERS + 8] + "別の質問"  # Thai has marks, which are no characters of their own
    assert test_set.overlap(near) == "similar"
    assert test_set.overlap(asked[:8] + "別" + asked[9:16]) == ""
    assert test_set.overlap("小红有5支铅笔。") == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("５つのリンゴ", "5つのリンゴ"),  # full width
        ("ﾘﾝｺﾞ", "リンゴ"),
        ("naïve", "nai\u0308ve"),
        ("STRASSE", "straße"),
        ("ques\u00adtion", "question"),  # a soft hyphen
        ("zero\u200bwidth", "zerowidth"),
        ("a_b, c!", "a_b c"),
    ],
)
def test_what_looks_alike_is_alike(one, other):
    assert words(one) == words(other) != ()


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_read_as_any_script_is(question):
    assert (*words(question), "é") == words(f"{question} é")


def test_words_are_whole_in_any_script():
    assert words("हिन्दी में कितने") == ("हिन्दी", "में", "कितने")
    assert words("사과가 몇 개 있나요?") == ("사과가", "몇", "개", "있나요")
    assert words("小明 has 3苹果") == ("小", "明", "has", "3", "苹", "果")


@given(st.text(), st.text())
def test_any_question_is_found_in_itself(question, around):
    assert TestSet([question]).overlap(question) == ("same" if words(question) else "")
    assert TestSet([question]).overlap(f"{around} {question} {around}") == ("same" if words(question) else "")


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
    for fields in ({"text": "a"}, BadRow("not valid JSON")):
        with pytest.raises(UserError, match=r"line 3 of the test set: .*column question, query"):
            read_test_set([*rows, Row(3, fields)])
