"""What the loop starts from at its smallest: problems of the demo, and a model that solves some of them."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from llamafactory_ext.data.corruption import Problem
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "demo"), str(HERE.parent / "reproduce")]

from problems import generate  # noqa: E402
from start import make_model, write_rows  # noqa: E402

SIZES = {"sft": 12_000, "train": 256, "test": 400}  # problems; none is in two sets

__all__ = ["make_data", "make_model"]


def make_data(folder: Path) -> None:
    """Worked solutions for SFT, and problems in GSM8K's layout: some to sample and train on, others to score on."""
    stream = generate(seed=0)
    sets = {name: list(itertools.islice(stream, size)) for name, size in SIZES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    solved = ({"instruction": p.question, "input": "", "output": p.solution} for p in sets["sft"])
    write_rows(folder / "sft.jsonl", solved)
    for name in ("train", "test"):
        write_rows(folder / f"{name}.jsonl", map(gsm8k_row, sets[name]))
    write_whole(folder / "dataset_info.json", json.dumps({"sft": {"file_name": "sft.jsonl"}}))


def gsm8k_row(problem: Problem) -> dict[str, str]:
    return {"question": problem.question, "answer": f"{problem.steps}\n#### {problem.answer}"}
