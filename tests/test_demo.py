"""The demo: its problems, what it refuses, and all of it with a tiny model."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model

MARGINS = "normalized_rewards/margins"
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


@pytest.mark.slow
@pytest.mark.leg
def test_the_whole_pipeline_at_its_smallest(tmp_path):
    """Pairs, three trainings, four scores, curves and table."""
    # Room for a problem and its solution, every byte of which is a token.
    model = make_model(tmp_path / "model", max_position_embeddings=2048)
    # Three steps of four pairs: warm-up leaves the model as it was in the first, whose margin is exactly zero.
    words = ["--model", str(model), "--pairs", "12", "--problems", "2", "--output", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, str(DEMO / "demo.py"), *words], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    (folder,) = (tmp_path / "out").iterdir()
    cells = folder / "sweep" / "cells"
    for name in ("sigmoid", "dpop", "minor_dpo"):
        state = json.loads((cells / name / "model" / "trainer_state.json").read_text(encoding="utf-8"))
        margins = [log[MARGINS] for log in state["log_history"] if MARGINS in log]
        assert margins[0] == 0.0
        assert margins[-1] != 0.0
    for scored in (folder / "sweep" / "base", *cells.iterdir()):
        result = json.loads((scored / "scores" / "results.json").read_text(encoding="utf-8"))["base"]
        assert result["problems"] == 2
        assert scored.name in run.stdout
    assert (folder / "sweep" / "report" / "index.html").is_file()
    assert (folder / "normalized_rewards.png").stat().st_size > 10_000
