"""The demo's parts: problems, and the command line up to the point where models are needed."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

from problems import generate  # noqa: E402


def test_generated_problems_are_solved_right():
    problems = list(itertools.islice(generate(seed=5), 300))
    assert len({problem.question for problem in problems}) == 300
    for problem in problems:
        results = []
        for line in problem.steps.splitlines():
            words = line.replace(".", "").split()
            at = words.index("=")
            expression = " ".join(words[at - 3 : at])
            tree = ast.parse(expression, mode="eval")
            value = eval(compile(tree, "step", "eval"))
            assert value == int(words[at + 1]), line
            results.append(words[at + 1])
        assert results[-1] == problem.answer


def test_generation_is_repeatable():
    first, second = (list(itertools.islice(generate(seed=1), 20)) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_wrong_arguments_stop_at_once(tmp_path):
    gsm8k = tmp_path / "few.jsonl"
    gsm8k.write_text(json.dumps({"question": "Q?", "answer": "1+1 = 2\n#### 3"}) + "\n", encoding="utf-8")
    for words, message in (
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--pairs", "0"], "must be at least 1"),
        (["--data", str(gsm8k)], "too few problems"),
    ):
        command = [sys.executable, str(DEMO / "demo.py"), *words]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode != 0
        assert message in run.stderr
