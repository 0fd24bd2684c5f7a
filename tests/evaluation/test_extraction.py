"""Reading answers: every rule with its counter-example."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from extraction import TIERS, extract_answer, read_answer
from hypothesis import given, settings
from hypothesis import strategies as st

SO = "So the answer is: "

# What follows `So the answer is: `, and what it says; None: no answer.
ANSWERS = [
    ("18", "18"),
    ("18.", "18"),
    ("18.00", "18"),
    ("17.6", "17.6"),  # never rounded to 18
    (".5", "0.5"),
    ("0.50 dollars", "0.5"),
    ("-7", "-7"),
    ("\u22127", "-7"),  # minus sign
    ("+7", "7"),
    ("$18", "18"),
    ("-$18", "-18"),
    ("$-18", "-18"),
    ("€1,250.50", "1250.5"),
    ("US$18", "18"),
    ("70,000", "70000"),  # not 000
    ("1,234,567", "1234567"),
    ("7,00", None),  # no way to write a thousand
    ("1,2", None),
    ("**18**", "18"),
    ("`18`", "18"),
    (r"\boxed{18}", "18"),
    (r"$\boxed{1{,}800}$", "1800"),
    (r"\(18\)", "18"),
    (r"18 \text{ eggs}", "18"),
    (r"\text{USD } 18", "18"),
    (r"\$18", "18"),
    ("18 eggs per day", "18"),
    ("18 eggs. She sells 3 of them.", "18"),  # the next sentence explains
    ("18km", "18"),
    ("18 m^2", "18"),
    ("50%", "50"),  # never rescaled
    (r"50\%", "50"),
    ("x = 18", "18"),
    ("9 * 2 = 18", "18"),
    ("20 - 2 = 18 eggs", "18"),
    ("3 + 4 = 7 and 2 * 9 = 18", "18"),  # the last `=`
    ("9 * 2", None),
    ("20 - 2", None),
    ("3/4", "0.75"),
    (r"\frac{3}{4}", "0.75"),
    ("1/3", None),  # not a finite decimal
    ("2/3", None),  # nor where 28 rounded digits times 3 would round back to 2
    ("5/6", None),
    ("1/1024", "0.0009765625"),
    ("5/0", None),
    ("-1234567890123456789012345678901234", "-1234567890123456789012345678901234"),  # beyond 28 digits
    ("1234567890123456789012345678901234 × 10^2", "123456789012345678901234567890123400"),
    ("1234567890123456789012345678901 1/2", "1234567890123456789012345678901.5"),
    ("2 1/2", "2.5"),
    ("2 3/2", None),
    ("1.8e3", "1800"),
    ("1.8 × 10^3", "1800"),
    (r"1.8 \times 10^{3}", "1800"),
    ("2^3", None),
    ("3 hours 30 minutes", None),
    ("8:30", None),
    ("10-12", None),
    ("10 to 12", None),
    ("5 apples and 3 pears", None),
    ("18 (18.00)", "18"),  # twice the same
    ("3.5.2", None),
    ("x18", None),
    ("18 thousand", None),
    ("1.5 million", None),
    ("$18k", None),
    ("2 dozen", None),
    ("minus 18", None),
    ("negative 18", None),
    ("- 18", None),
    ("not 18", None),
    ("eighteen", None),
    ("", None),
    ("1800", "1800"),  # and not the 18 in it
    ("0018", "18"),
    ("\u0661\u0668", None),  # digits of another script are not read wrongly
]


@pytest.mark.parametrize(("written", "value"), ANSWERS)
def test_what_follows_the_marker(written, value):
    expected = None if value is None else Decimal(value)
    for tier in ("strict_prompt", "strict"):
        assert extract_answer(f"9 * 3 = 27.\n{SO}{written}\n", tier) == expected


@pytest.mark.parametrize(
    ("text", "strict_prompt", "strict", "flexible"),
    [
        ("The answer is 5.", None, 5, 5),
        ("the final answer is: 5", None, 5, 5),
        ("So, the answer is 5", None, 5, 5),
        ("so the answer is: 5", None, 5, 5),  # the prompt's words are literal
        ("work\n#### 5", None, 5, 5),
        ("#### $1,200", None, 1200, 1200),
        ("#### 5 eggs", None, 5, 5),
        ("#### 2. Next step", None, None, 2),  # a heading
        ("#### Step 2", None, None, 2),
        ("a #### 5", None, None, 5),
        (f"{SO}5", 5, 5, 5),
        (f"{SO}\n5", 5, 5, 5),
        (f"{SO}\n\n**$5**\nBye 9", 5, 5, 9),
        (f"{SO}\nThere are 5 of 9.", None, None, 9),
        (f"{SO}5\nThe answer is 6.", 5, 6, 6),  # the last marker counts
        (f"{SO}5\n{SO}unknown", 5, 5, 5),  # without a number it is skipped
        (f"{SO}5, no wait. {SO}6", 6, 6, 6),
        ("I counted 5 and then 7 eggs", None, None, 7),
        ("He has -3", None, None, -3),
        ("20-18", None, None, 18),
        ("", None, None, None),
        ("no numbers", None, None, None),
        ("The unanswerable question is 5", None, None, 5),
        ("**So the answer is:** 5", 5, 5, 5),
        ("5 is right. The answer is not 5.", None, None, 5),
    ],
)
def test_tiers(text, strict_prompt, strict, flexible):
    found = [extract_answer(text, tier) for tier in TIERS]
    assert found == [None if value is None else Decimal(value) for value in (strict_prompt, strict, flexible)]


@pytest.mark.parametrize(
    ("text", "conflict"),
    [(f"{SO}5\n{SO}6", True), (f"{SO}5\n{SO}5.0", False), (f"{SO}what?\n{SO}5", False), ("nothing", False)],
)
def test_conflict_of_first_and_last(text, conflict):
    assert read_answer(text, "strict").conflict is conflict


def test_the_gold_number_appearing_somewhere_is_no_answer():
    assert extract_answer("She has 18 eggs, 3 ducks and 9 hens.", "strict") is None
    assert extract_answer("So the answer is: 17 and not 18", "strict") is None


def test_unknown_tier_is_named():
    with pytest.raises(ValueError, match="write one of strict_prompt, strict, flexible"):
        extract_answer("5", "lenient")


PIECES = [*"0123456789.,:/eE-+*=^ \n$%#\\{}()[]×x", SO, "the answer is", "\\frac{1}{2}", "\\boxed{", "####"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters()).map("".join)


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_no_text_raises(text):
    for tier in TIERS:
        reading = read_answer(text, tier)
        assert reading.answer is None or isinstance(reading.answer, Decimal)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
def test_every_plain_number_is_read_exactly(value):
    for written in (f"{value}", f"{value:,}"):
        for tier in TIERS:
            assert extract_answer(f"{SO}{written}.", tier) == value


UNITS = [
    *("1", "1,", "1.", "1:", "1/", "1 1/2 ", "1 × 10^", "e9", "9e9", "5. ", "x^2", "=", "1 = ", "-", "$", "*", "1.1.1"),
    *("the answer is ", SO, f"{SO}\n", f"{SO}1 ", "so ", "#### ", "#### 1", "#### 1\n", "\\frac{", "\\boxed{", " \n"),
]


def test_megabytes_are_read_in_linear_time():
    """Megabytes made to trip a backtracking reader: all together take seconds, or hours where a step is quadratic.

    No time is asserted; the limit only ends a test that would hang.
    """
    code = (
        "import sys; from extraction import TIERS, extract_answer\n"
        "for unit in sys.argv[1:]:\n"
        "    for tier in TIERS: extract_answer(unit * (1_000_000 // len(unit)), tier)\n"
    )
    evaluation = Path(__file__).parents[2] / "evaluation"
    subprocess.run([sys.executable, "-c", code, *UNITS], cwd=evaluation, check=True, timeout=300)
