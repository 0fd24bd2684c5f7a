"""Pairs from worked solutions: one intermediate result changed, nothing else."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ext.pairs import PROMPT, Problem, corrupt_steps, make_pair, parse_gsm8k

GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))


def differing_words(a: str, b: str) -> list[tuple[str, str]]:
    return [(x, y) for x, y in zip(a.split(), b.split(), strict=True) if x != y]


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


def test_gsm8k_row():
    problem = parse_gsm8k(" Clips? ", "She sold 48/2 = <<48/2=24>>24 clips.\nTotal 48+24 = <<48+24=72>>72.\n#### 72")
    assert problem == Problem("Clips?", "She sold 48/2 = 24 clips.\nTotal 48+24 = 72.", "72")
    with pytest.raises(ValueError, match="no line `#### N`"):
        parse_gsm8k("Clips?", "72")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="set GSM8K_DIR to a folder with GSM8K's train.jsonl")
def test_pairs_from_the_real_gsm8k():
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    pairs = [make_pair(parse_gsm8k(row["question"], row["answer"]), rng) for row in rows]
    made = [pair for pair in pairs if pair is not None]
    assert len(rows) == 7473
    assert len(made) > 6500
    for pair in made:
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"].splitlines()[-1] == pair["rejected"].splitlines()[-1]
        assert "<<" not in pair["chosen"]
