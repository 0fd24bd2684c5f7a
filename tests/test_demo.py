"""The demo: its problems, what it refuses, and all of it with a tiny model."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import record_run, write_problems
from rich.console import Console
from tiny import make_model
from typer.testing import CliRunner

from llamafactory_ext.evaluation import gsm8k

DEMO = Path(__file__).parents[1] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import demo  # noqa: E402
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


def test_the_table_of_a_recorded_demo_by_hand(tmp_path, capsys, monkeypatch):
    """Four problems, whose numbers are the right answers.

    base: `So the answer is: 0` right; `The answer is 1` right, not as asked; `I get 2` right by its last number only;
          3 is answered with 7, as asked. strict 2 of 4, flexible 3 of 4, as asked 2 of 4.
    DPO:  all as asked, the last one wrong: strict 3 of 4, flexible 3 of 4, as asked 4 of 4; rewards are those of the
          last step that logged some: 0.5, -1.25, 1.75.
    """
    data = write_problems(tmp_path / "held_out.jsonl", 4)
    answers = {
        "base": ["So the answer is: 0", "The answer is 1", "I get 2", "So the answer is: 7"],
        "DPO": [f"So the answer is: {n}" for n in (0, 1, 2, 9)],
    }
    scores = {}
    for name, texts in answers.items():
        record_run(tmp_path / name / "base", data, dict(enumerate(texts)))
        words = ["--score-only", "--data", str(data), "--output", str(tmp_path / name)]
        assert CliRunner().invoke(gsm8k.app, words).exit_code == 0
        scores[name] = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["base"]
    keys = [f"normalized_rewards/{curve}" for curve in ("chosen", "rejected", "margins")]
    logs = [dict(zip(keys, values, strict=True)) for values in ((0.0, 0.0, 0.0), (0.5, -1.25, 1.75))]
    state = {"log_history": [*logs, {"train_loss": 0.5}]}
    (tmp_path / "DPO" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")

    monkeypatch.setattr(demo, "console", Console(width=200))
    demo.print_table(scores, {"DPO": demo.log_history(tmp_path / "DPO")})
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", "50%", "75%", "50%"] in rows
    assert ["DPO", "75%", "75%", "100%", "+0.50", "-1.25", "+1.75"] in rows


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
    for name in ("DPO", "DPOP", "MinorDPO"):
        history = json.loads((folder / name / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        margins = [log["normalized_rewards/margins"] for log in history if "normalized_rewards/margins" in log]
        assert margins[0] == 0.0
        assert margins[-1] != 0.0
    for name in ("base", "DPO", "DPOP", "MinorDPO"):
        result = json.loads((folder / f"score_{name}" / "results.json").read_text(encoding="utf-8"))["base"]
        assert result["problems"] == 2
        assert name in run.stdout
    assert (folder / "normalized_rewards.png").stat().st_size > 10_000
