"""Pairs from worked solutions: one intermediate result changed, nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ext.data.corruption import PROMPT, Problem, corrupt_row, corrupt_steps, make_pair, parse_solution
from llamafactory_ext.evaluation import extraction
from llamafactory_ext.rows import BadRow

GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[3] / "shared" / "data" / "gsm8k"))


def differing_words(a: str, b: str) -> list[tuple[str, str]]:
    return [(x, y) for x, y in zip(a.split(), b.split(), strict=True) if x != y]


def common_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_one_intermediate_result_is_changed():
    steps = "There are 3 * 4 = 12 pens.\nThen 12 - 5 = 7 are left."
    for seed in range(20):
        ((was, now),) = differing_words(steps, corrupt_steps(steps, "7", random.Random(seed)))
        assert was == "12"
        assert now != "12"
        assert 0 < int(now) <= 21


@pytest.mark.parametrize(
    ("steps", "answer", "changed"),
    [
        ("a = $1,250 now, so b = 4", "4", r"a = \$\d?,?\d{3} now, so b = 4"),
        ("x = 0.50. y = 3", "3", r"x = \d+\.\d\d\. y = 3"),
        ("half: 2 / 5 = .4, so y = 400", "400", r"half: 2 / 5 = 1?\.\d+, so y = 400"),
        ("<<2/5=.4>>.4 and <<1000*.4=400>>400", "400", r"<<2/5=\.4>>1?\.\d+ and <<1000\*\.4=400>>400"),
        ("2 + 2 = 4, 4 + 1 = 5", "5", r"2 \+ 2 = \d+, 4 \+ 1 = 5"),
        ("cost = 3 * 4 = 12 dollars, total = 20", "20", r"cost = 3 \* 4 = \d+ dollars, total = 20"),
    ],
)
def test_number_formats(steps, answer, changed):
    corrupted = corrupt_steps(steps, answer, random.Random(3))
    assert re.fullmatch(changed, corrupted)
    assert corrupted != steps


@pytest.mark.parametrize("steps", ["", "No sums here.", "Only 3 + 4 = 7.", "7 = 7.0"])
def test_nothing_to_corrupt(steps):
    assert corrupt_steps(steps, "7", random.Random(0)) is None


@pytest.mark.parametrize("steps", ["It is <<2:15+2:38=4:53>>.", "a <<3+4=12:07 h>> b", "<<1=2>>"])
def test_what_is_written_in_an_annotation_is_no_result(steps):
    """A change there would be stripped from both sides, and leave them identical."""
    assert corrupt_steps(steps, "7", random.Random(0)) is None
    both = f"2 * 3 = 6, so {steps}"
    assert {corrupt_steps(both, "7", random.Random(seed)).partition(", so ")[2] for seed in range(20)} == {steps}


@pytest.mark.parametrize(
    ("answer", "last"),
    [
        ("24 dollars", "24"),
        (r"\$32", "$32"),
        ("$7$", "7"),
        (r"\boxed{7}", "7"),
        ("$1,204.00.", "1,204"),
        (r"\frac{3}{5}", "0.6"),
        ("x = 5", "5"),
        ("4:53", "4:53"),  # not one number: neither part of it is changed
        ("(3, 8)", "3 and b = 8"),
        ("yes", "9"),
        ("9\nI hope this helps, 100%!", "9"),
    ],
)
def test_the_final_result_stays_however_the_answer_is_written(answer, last):
    solution = f"2 * 10 = 20.\nThen b = {last}.\nThe answer is: {answer}"
    for seed in range(20):
        pair = corrupt_row({"question": "Q", "answer": solution}, seed)
        changed = differing_words(pair["chosen"], pair["rejected"])
        assert [was for was, _ in changed] == ["20."], pair["rejected"]


@pytest.mark.parametrize(
    "steps", [r"a = 3 \cdot 4", r"a = 3 \times 4", "a = 3^2", "a = 3 x 4", "a = 3 = b", r"a = 12 \div 4 = x"]
)
def test_parts_of_the_next_sum_are_no_results(steps):
    assert corrupt_steps(steps, "7", random.Random(0)) is None


@pytest.mark.parametrize("number", ["1" * 40, "9" * 5000, "0.000000001", "1,234.50", "0", "0" * 30 + "1"])
def test_numbers_of_any_length_stay_numbers(number):
    corrupted = corrupt_steps(f"a = {number}", "7", random.Random(1)).removeprefix("a = ")
    assert re.fullmatch(r"[\d,]+(\.\d+)?", corrupted)
    assert corrupted != number
    assert len(corrupted.partition(".")[2]) == len(number.partition(".")[2])


TEXT = st.text(st.sampled_from("0123456789.,:/-+*x=<>$#\\ \nabc²٣\ud83c") | st.characters(), max_size=30)
FRAGMENTS = st.sampled_from(
    ["<<3*4=12>>12", "= 7", "\n#### 12", "The answer is: ", "= $1,200", "<<a=4:53>>", ">>5", "= 0.50"]
)


@given(solution=st.lists(TEXT | FRAGMENTS, max_size=8).map("".join), ending=TEXT, seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_any_solution_gives_a_pair_or_a_reason(solution, ending, seed):
    """And where it gives a pair, one number of the steps differs, which the evaluation does not read as the answer."""
    try:
        pair = corrupt_row({"question": "Q", "answer": f"{solution}\n#### {ending}"}, seed)
    except BadRow:
        return
    chosen, rejected = pair["chosen"], pair["rejected"]
    assert chosen != rejected
    start = common_start(chosen, rejected)
    end = common_start(chosen[:start:-1], rejected[:start:-1])
    assert re.fullmatch(r"[\d,.]*", rejected[start : len(rejected) - end]), (chosen, rejected)
    if extraction.extract_answer(chosen.rpartition("\n")[2]) is not None:
        assert extraction.extract_answer(chosen) == extraction.extract_answer(rejected)


@given(
    results=st.lists(st.integers(0, 99999), min_size=1, max_size=5),
    answer=st.integers(0, 99999),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_corruption_is_a_single_other_number_and_repeatable(results, answer, seed):
    steps = "\n".join(f"so step {i} gives = {result} things" for i, result in enumerate(results))
    corrupted = corrupt_steps(steps, str(answer), random.Random(seed))
    if all(result == answer for result in results):
        assert corrupted is None
        return
    ((was, now),) = differing_words(steps, corrupted)
    assert int(was) != answer
    assert int(now) not in (answer, int(was))
    assert corrupted == corrupt_steps(steps, str(answer), random.Random(seed))


def test_pair_layout():
    problem = Problem("How many?", "2 * 3 = 6.\n6 + 1 = 7.", "7")
    pair = make_pair(problem, random.Random(0))
    assert pair["instruction"] == PROMPT + "How many?"
    assert pair["chosen"] == "2 * 3 = 6.\n6 + 1 = 7.\nSo the answer is: 7"
    assert pair["rejected"].endswith("\n6 + 1 = 7.\nSo the answer is: 7")
    assert pair["rejected"] != pair["chosen"]
    assert make_pair(Problem("How many?", "Seven.", "7"), random.Random(0)) is None


def test_annotations_mark_results_that_no_equals_sign_does():
    steps = "She sold 4 * 6 = <<4*6=24>>24 clips and had <<24+8=32>>32 in all, or $<<32*2=64>>64/day."
    seen = set()
    for seed in range(40):
        corrupted = corrupt_steps(steps, "7", random.Random(seed))
        assert re.findall("<<.*?>>", corrupted) == re.findall("<<.*?>>", steps)
        ((was, now),) = differing_words(re.sub("<<.*?>>", "", steps), re.sub("<<.*?>>", "", corrupted))
        assert was != now
        seen.add(was)
    assert seen == {"24", "32", "$64/day."}


@pytest.mark.parametrize(
    ("solution", "steps", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 24", "48/2 = <<48/2=24>>24 clips.", "24"),
        ("a = 4.\n\n#### 1,204 \n", "a = 4.", "1,204"),
        # MetaMathQA ends in both.
        ("a = 4.\n#### 7\nThe answer is: 7", "a = 4.", "7"),
        ("a = 4.\nThe answer is: 7.", "a = 4.", "7"),
        ("We solve $x=3$, so $y=5$.\nThe answer is: \\frac{3}{5}", "We solve $x=3$, so $y=5$.", "\\frac{3}{5}"),
        # An ending that says something else belongs to the steps.
        ("First #### 3.\nThe answer is: 7", "First #### 3.", "7"),
        ("Guess: the answer is 3? No, a = 4. The answer is: 7", "Guess: the answer is 3? No, a = 4.", "7"),
        ("a = 4. So the answer is: 7", "a = 4.", "7"),
    ],
)
def test_endings_of_solutions(solution, steps, answer):
    assert parse_solution(" Clips? ", solution) == Problem("Clips?", steps, answer)


@pytest.mark.parametrize("solution", ["72", "So it is 72.", "a = 72\n####", "a = 72. The answer is: "])
def test_solutions_without_an_answer(solution):
    with pytest.raises(BadRow, match="`The answer is`"):
        parse_solution("Clips?", solution)


def test_rows_of_every_layout():
    solution = "2 * 3 = 6.\n6 + 1 = 7.\nThe answer is: 7"
    rows = [{"question": "Q", "answer": solution}, {"query": "Q", "response": solution, "type": "x"}]
    pairs = [corrupt_row(row, seed=5, prompt="") for row in rows]
    assert pairs[0] == pairs[1]
    assert pairs[0]["instruction"] == "Q"
    assert pairs[0]["chosen"].endswith("6 + 1 = 7.\nSo the answer is: 7")
    assert any(corrupt_row(rows[0], seed) != corrupt_row(rows[0], 5) for seed in range(5))
    for row, message in [
        ({"text": "a"}, "has none of these pairs of columns"),
        ({"question": "Q", "answer": " "}, "is empty"),
    ]:
        with pytest.raises(BadRow, match=message):
            corrupt_row(row, 0)
    with pytest.raises(BadRow, match="nothing to change"):
        corrupt_row({"question": "Q", "answer": "Seven.\n#### 7"}, 0)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="set GSM8K_DIR to a folder with GSM8K's train.jsonl")
def test_pairs_from_the_real_gsm8k():
    lines = (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = []
    for line in lines:
        with contextlib.suppress(BadRow):
            pairs.append(corrupt_row(json.loads(line), seed=0))
    assert (len(lines), len(pairs)) == (7473, 7413)
    for pair in pairs:
        assert len(differing_words(pair["chosen"], pair["rejected"])) == 1
        assert pair["chosen"].splitlines()[-1] == pair["rejected"].splitlines()[-1]
        assert "<<" not in pair["chosen"] + pair["rejected"]
