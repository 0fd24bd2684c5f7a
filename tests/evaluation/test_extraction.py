"""Reading answers: every rule with its counter-example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llamafactory_ext.evaluation.extraction import TIERS, extract_answer, read_answer

SO = "So the answer is: "
GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[3] / "shared" / "data" / "gsm8k"))

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
    ("3 + 4 = 7 and 2 * 9 = 18", None),  # two equations with two results
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


# A calculation beside its result, and a number that is said again.
RESTATED = [
    ("5 boxes (5 x 8 = 40 pens).", None),
    ("5 boxes: 5 × 8 = 40", None),
    ("5 boxes, 5 x 8 = 40", None),
    ("5 boxes. 5 x 8 = 40 pens", None),
    ("5 boxes - 5 x 8 = 40 pens", None),
    ("5 boxes – 5 boxes x 8 pens = 40 pens", None),
    ("5 - 5 x 8 = 40", None),
    ("5 boxes, which makes 5 x 8 = 40 pens", None),
    ("5 boxes = 40 pens", None),
    ("40 pens (= 5 boxes)", None),
    ("40 pens (5 x 8 = 40 pens).", "40"),
    ("40, because 5 x 8 = 40", "40"),
    ("40: 5 x 8 = 40", "40"),
    ("5 x 8 = 40, so he has 40", "40"),
    ("5 x 8 = 40 = 40.0", "40"),
    ("40 = 5 x 8", "40"),
    ("5 boxes x 8 pens/box = 40 pens", "40"),
    ("5 * $8 = $40", "40"),
    ("(3 + 4) * 2 = 14", "14"),
    ("2(3 + 4) = 14", "14"),
    ("20 apples - 2 apples = 18 apples", "18"),
    ("20 – 2 = 18", "18"),
    ("100 - 40 - 20 = 40", "40"),
    ("5 x (-8) = -40", "-40"),
    ("20% of $200 = $40", "40"),
    ("1800*.01=$18", "18"),
    ("40/3 ≈ 13", "13"),
    ("40/3 = 13.33 ≈ 13", None),
    ("5 times 8 equals 40", "40"),
    ("5*8=<<5*8=40>>40", "40"),
    ("x + 3 = 8", None),
    ("3x = 15", None),
    ("2y + 3 = 9", None),
    ("x = 5, y = 3", None),
    ("x != 5", None),
    ("4! = 24", None),
    ("5 + 3 = 8, 8 x 5 = 40", None),
    ("40 pens in 5 boxes", None),
    ("40 (8 per box)", None),
    ("40 (40 pens)", "40"),
    ("40, 45", None),
    ("40; 45", None),
    ("40 and 45", None),
    ("40 (not 45)", None),
    ("40, not counting the dog", "40"),
    ("Not 40", None),
    ("it isn't 40", None),
    ("(40)", None),  # -40 in a ledger
    ("Net: ($40)", None),
    ("(40 eggs)", "40"),
    ("5 by 5", None),
    ("1 to 1", None),
    ("5 out of 5", None),
    ("40, 40", None),
    ("5. 3 apples", None),
    ("80 sq. ft. of 240", None),
    ("80 sq. ft.", "80"),
    ("Dr. Lee pays $40.", "40"),
]
# Words and letters that count.
WORDS = [
    ("5 boxes of eight", None),
    ("5 dollars and ten cents", None),
    ("half a dozen", None),
    ("5 and a half", None),
    ("5 and a quarter", None),
    ("twice 20", None),
    ("a third of 40", None),
    ("2 thirds", None),
    ("5 hundredths", None),
    ("5 tens", None),
    ("forty-two", None),
    ("3 feet one inch", None),
    ("40 for all three children", "40"),
    ("40 in one week", "40"),
    ("$40 per dozen", "40"),
    ("40, which is twice as many", "40"),
    ("5 hundred", None),
    ("5 lakh", None),
    ("5-million", None),
    ("2 1/2 million", None),
    (r"5\text{k}", None),
    ("$5m", None),
    ("5m", "5"),  # meters
    ("5 ml", "5"),
    ("5万", None),
    ("5 per cent", "5"),
    ("5 pairs of shoes", "5"),
    ("3rd", "3"),
    ("5-year-old", "5"),
    ("2x", None),
    ("4O", None),
    ("5π", None),
    ("5 squared", None),
    ("0xFF", None),
    ("18C", "18"),
    ("40/day", "40"),
    ("9.8 m/s^2", "9.8"),
    ("Rs. 40", "40"),
    ("about 40", "40"),
    ("~40", "40"),
    ("≈ 40", "40"),
    ("at least 40", "40"),
    ("≥ 40", "40"),
    ("no more than 40", "40"),
    ("more than 40", None),
    ("over 40", None),
    ("< 40", None),
    ("40+", None),
    ("± 5", None),
    ("the square root of 40", None),
    ("40 plus tax", None),
]
# Characters, scripts, separators, dashes and LaTeX.
CHARACTERS = [
    ("½", "0.5"),
    ("-½", "-0.5"),
    ("3½", "3.5"),
    ("1⁄2", "0.5"),
    ("⅓", None),
    ("½½", None),
    ("3-1/2", None),
    ("½ dozen", None),
    ("10²", None),  # not 102
    ("10⁶", None),
    ("40¹", None),  # a footnote
    ("5 × 10³", "5000"),
    ("5 x 10⁻³", "0.005"),
    ("18 m²", "18"),
    ("18cm³", "18"),
    (r"18 \text{ m}^{2}", "18"),
    ("40 g of H₂O", None),
    ("４０", "40"),
    ("𝟒𝟎", "40"),
    ("4\ufe0f\u20e30\ufe0f\u20e3", "40"),  # keycaps
    ("４½", "4.5"),
    ("४०", None),
    ("40 (٤٠)", None),
    ("四十", None),
    ("40①", None),
    ("Ⅳ", None),
    ("4\u0336", None),  # struck out
    ("10–12", None),
    ("10~12", None),
    ("10 – 10", None),
    ("–5", None),
    ("—5", None),
    ("\u20115", None),
    ("A-5", None),
    ("Route-66", None),
    ("--5", None),
    ("-$ 5", "-5"),
    ("- $5", None),
    ("|-5|", None),
    ("Total – 40", None),
    ("2024-05-01", None),
    ("May 5, 1990", None),
    ("8h30", None),
    ("5'10\"", None),
    ("5/6/2024", None),
    ("1.2.3", None),
    ("1.234,56", None),
    ("1 234", None),
    ("1 001", None),
    ("1'001", None),
    ("1\u2009001", None),
    ("0,500", None),
    ("1,00,000", None),
    (r"5,\!000", "5000"),
    ("0.333...", None),
    ("40...", "40"),
    (r"\frac12", "0.5"),
    (r"-\dfrac{1}{2}", "-0.5"),
    (r"2\frac{1}{2}", "2.5"),
    (r"\frac{x}{2}", None),
    (r"\frac{2}{x}", None),
    (r"\(\frac{120 \text{ miles}}{2 \text{ hours}} = 60\)", "60"),
    (r"\sqrt{4}", None),
    ("√4", None),
    (r"2^{3}", None),
    (r"5\pi", None),
    (r"\pm 5", None),
    (r"\approx 40", "40"),
    (r"90^{\circ}", "90"),
    (r"\boxed{\$40}", "40"),
    (r"\boxed{5}\boxed{0}", None),
    (r"$5 \times 8 = \boxed{40}$", "40"),
    (r"\displaystyle 40", "40"),
    (r"0.\overline{3}", None),
    ("_40_", "40"),
    ("<b>40</b>", "40"),
    ("40<|im_end|>", "40"),
    ("40\r", "40"),
    ("1e9999", None),
    ("inf", None),
    ("∞", None),
]
ANSWERS += RESTATED + WORDS + CHARACTERS


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
        (f"{SO}\r\n5\r\n", 5, 5, 5),
        (f"{SO}\n- 5", None, None, None),
        (f"{SO}5 boxes (5 x 8 = 40 pens).", None, None, 40),
        ("#### 5 hundred", None, None, None),
        ("#### 40 (8 per box)", None, None, 8),
        ("#### ½", None, Decimal("0.5"), Decimal("0.5")),
        (f"{SO}\n\n**$5**\nBye 9", 5, 5, 9),
        (f"{SO}\nThere are 5 of 9.", None, None, 9),
        (f"{SO}5\nThe answer is 6.", 5, 6, 6),  # the last marker counts
        (f"{SO}5\n{SO}unknown", 5, 5, 5),  # without a number it is skipped
        (f"{SO}5, no wait. {SO}6", 6, 6, 6),
        ("I counted 5 and then 7 eggs", None, None, 7),
        ("He has -3", None, None, -3),
        ("20 - 2 = 18", None, None, 18),
        ("He works from 7 to 9", None, None, 9),
        # The last number cannot be read, and the one before it is not the last.
        *((f"He wakes at 7 and leaves at {token}", None, None, None) for token in ("8:30", "10-12", "20 - 18", "3,5")),
        *(
            (f"I have 7 and then {token}", None, None, None)
            for token in ("5 million", "10²", "A-5", "1/3", "٤٥", "- 5")
        ),
        ("First 7, then 2 1/2", None, None, Decimal("2.5")),
        ("First 7, then 3½", None, None, Decimal("3.5")),
        ("It covers 18 m²", None, None, 18),
        ("40 pens\n104 square feet\n", None, None, 104),
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


MARKUP = ["\\frac{1}{2}", "\\frac12", "\\boxed{", "\\text{", "\\sqrt", "\\times", "^{", "**", "<b>", "<<", "$$", "\\,"]
PIECES = [*"0123456789.,:/eE-+*=^ \n$%#\\{}()[]×x½²⁻٣四①①̶–≈°", SO, "the answer is", "####", "two ", "because ", *MARKUP]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters()).map("".join)


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_no_text_raises(text):
    for tier in TIERS:
        for written in (text, SO + text):
            reading = read_answer(written, tier)
            assert reading.answer is None or isinstance(reading.answer, Decimal)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
def test_every_plain_number_is_read_exactly(value):
    for written in (f"{value}", f"{value:,}"):
        for tier in TIERS:
            assert extract_answer(f"{SO}{written}.", tier) == value


NUMBERS = st.integers(-(10**7), 10**7) | st.decimals(-9999, 9999, places=2)
WRAPPED = ["{}", "**{}**", "`{}`", r"\boxed{{{}}}", r"$\boxed{{{}}}$", r"\({}\)", r"$${}$$", "__{}__", r"\text{{{}}}"]
BEFORE = ["", "", "x = ", "Total: ", "He has ", "about ", "at least ", "5 x 8 = ", "(3 + 4) * 2 = ", r"$5 \times 8$ = "]
BEHIND = [
    "",
    "%",
    " dollars",
    " eggs per day",
    " km/h",
    " m^2",
    " cm³",
    " sq. ft.",
    " each",
    " for all three days",
    "°C",
]
ENDS = [
    "",
    ".",
    "!",
    "\n",
    ". She sells 3 of them.",
    " in total.",
    ", which is twice as many.",
    "\n\nI checked 5 x 8 = 40.",
]


@given(NUMBERS, *map(st.sampled_from, (["{}", "{:,}"], WRAPPED, BEFORE, BEHIND, ENDS)))
@settings(max_examples=500, deadline=None)
def test_a_clear_number_is_read_whatever_surrounds_it(value, form, wrapped, before, behind, end):
    assume(not (wrapped.startswith("__") and behind in ("%", "°C")))  # `__5__%` is no emphasis in Markdown
    written = before + wrapped.format(form.format(value)) + behind + end
    assert extract_answer(SO + written) == extract_answer(SO + written, "strict_prompt") == value, written


# What may stand between two numbers without making one of them: all but `=`, and single characters as in `1,234`.
GAPS = st.lists(
    st.sampled_from([*" abcdfghz()[],;:-–—/×+*'\"%$~&|°²", " and ", " x ", " of ", " to "]), min_size=1
).map("".join)


@given(st.integers(0, 9999), st.integers(0, 9999), GAPS, st.sampled_from(["", ".", " pens", "%", ")", "\n"]))
@settings(max_examples=500, deadline=None)
def test_two_numbers_are_no_answer(first, second, gap, end):
    assume(first != second and gap not in (",", "/"))
    for tier in ("strict_prompt", "strict"):
        assert extract_answer(f"{SO}{first}{gap}{second}{end}", tier) is None


CHANGED_BEHIND = [
    ":30",
    " million",
    "k",
    " dozen",
    "²",
    "^3",
    "+",
    "x",
    "-12",
    " - 12",
    "–12",
    "/0",
    ",5",
    " hundredths",
    "π",
]
CHANGED_BEFORE = ["- ", "–", "—", "A-", "± ", "minus ", "more than ", "> ", "√", r"\pm ", "3 x ", "8:", "7-", "x"]


@given(
    st.integers(0, 999),
    st.sampled_from([("", behind) for behind in CHANGED_BEHIND] + [(before, "") for before in CHANGED_BEFORE]),
    st.sampled_from([".", "", "\n"]),
)
def test_a_number_that_its_surroundings_change_is_no_answer_in_any_tier(value, changed, end):
    before, behind = changed
    for tier in TIERS:
        assert extract_answer(f"He has 7.\n{SO}{before}{value}{behind}{end}", tier) is None


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K data (GSM8K_DIR)")
def test_every_gold_answer_of_gsm8k_is_read():
    count = 0
    for file in ("train.jsonl", "test.jsonl"):
        for line in (GSM8K / file).read_text(encoding="utf-8").splitlines():
            solution = json.loads(line)["answer"]
            steps, _, written = solution.rpartition("####")
            gold = Decimal(written.strip().replace(",", ""))
            assert extract_answer(solution) == extract_answer(solution, "flexible") == gold
            assert extract_answer(f"{steps}{SO}{written}", "strict_prompt") == gold
            count += 1
    assert count == 8792


UNITS = [
    *("1", "1,", "1.", "1:", "1/", "1 1/2 ", "1 × 10^", "e9", "9e9", "5. ", "x^2", "=", "1 = ", "-", "$", "*", "1.1.1"),
    *("the answer is ", SO, f"{SO}\n", f"{SO}1 ", "so ", "#### ", "#### 1", "#### 1\n", "\\frac{", "\\boxed{", " \n"),
    *(
        "½",
        "٣",
        "\u0301\u0323",
        "1 (",
        "(1=",
        "<<",
        "<a",
        "^{",
        "\\text{a",
        "\\frac{1}{",
        ". ",
        "1. ",
        "two ",
        "the two ",
    ),
    *("1 = 1 x 1, ", "1 pen - ", "so 1 = 1 ", "_a", "a * ", "…", "not ", "Dr. "),
]


def count_calls(function) -> int:
    """How many functions are called, those of the standard library in C too."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("start", ["", SO, f"{SO}1 "])
def test_calls_grow_no_faster_than_the_text(start):
    for unit in UNITS:
        for tier in TIERS:
            short, long = (count_calls(partial(extract_answer, start + unit * size, tier)) for size in (50, 500))
            assert long <= 11 * short, (unit, tier)


@pytest.mark.slow
def test_long_texts_are_read_in_linear_time():
    """Texts made to trip a backtracking expression: each takes a second, or an hour where a step is quadratic.

    No time is asserted; the limit only ends a test that would hang.
    """
    code = (
        "import sys; from llamafactory_ext.evaluation.extraction import TIERS, extract_answer\n"
        "for unit in sys.argv[1:]:\n"
        "    for tier in TIERS: extract_answer(unit * (300_000 // len(unit)), tier)\n"
    )
    subprocess.run([sys.executable, "-c", code, *UNITS], check=True, timeout=300)
