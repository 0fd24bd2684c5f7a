"""What the loop starts from at its smallest: sums in GSM8K's layout, and a model that solves some of them."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from llamafactory_ext.data.corruption import Problem
from llamafactory_ext.whole_files import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproduce"))

from start import make_model, write_rows

SIZES = {"sft": 3_600, "train": 256, "test": 400}  # problems; none is in two sets

__all__ = ["make_data", "make_model"]


def generate(seed: int) -> Iterator[Problem]:
    """An endless stream of sums of three numbers, never the same twice; the same seed gives the same stream."""
    rng = random.Random(seed)
    seen: set[tuple[int, int, int]] = set()
    while True:
        first, more, less = rng.randint(4, 40), rng.randint(2, 12), rng.randint(2, 12)
        total = first + more
        if less < total and (first, more, less) not in seen:
            seen.add((first, more, less))
            steps = f"{first} + {more} = {total}.\n{total} - {less} = {total - less}."
            yield Problem(f"What is {first} + {more} - {less}?", steps, str(total - less))


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
