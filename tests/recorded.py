"""Recorded runs of gsm8k.py, as its engines leave them on disk."""

from __future__ import annotations

import json
from pathlib import Path

from llamafactory_ext.evaluation.generations import Generation, Run
from llamafactory_ext.evaluation.questions import load_questions


def write_problems(path: Path, count: int, gold: int = 0) -> Path:
    """Problems 0 to count - 1, whose answers are their numbers plus `gold`."""
    rows = [{"question": f"Question {n}?", "answer": f"so\n#### {n + gold}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def record_run(folder: Path, data: Path, answers: dict[int, str], limit: int | None = None) -> Path:
    """A run with these texts as answers, by problem."""
    questions, digest = load_questions(str(data), limit=limit)
    with Run(folder) as run:
        run.open({"data": {"source": str(data), "sha256": digest, "problems": len(questions)}})
        for index, text in answers.items():
            run.append(Generation(index, text, None, "stop"))
    return folder
