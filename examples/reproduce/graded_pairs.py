"""Pairs of answers whose gap in quality is known, and a data set that teaches what a rating means.

An answer's quality is the number of its wrong results, from 0 to 3; a pair's gap is by how many the rejected answer has
more. Chosen answers have wrong results, too, so that the gap is not the same as how bad the rejected answer is. The two
answers to a problem share their wrong results, up to the gap, and are worded differently. Raters like one wording: it
is the chosen answer's in three quarters of the pairs, whatever the gap. So a margin has something to learn that is no
quality, also where the gap is 0.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from start import RATED, write_rows
from stories import Kind, stories

from llamafactory_ext.data.corruption import Problem
from llamafactory_ext.whole_files import write_whole

# Four steps: three intermediate results that can be wrong, and the final one. Sums and differences with one digit,
# which a model from scratch learns soon: how well it adds is not what is asked here.
KIND = Kind(steps=(4, 4), signs="+-", largest_change=9)

# Problems are dealt from one stream, so that none is in two sets.
SIZES = {"sft": 40_000, "pairs": 1_024, "pilot": 1_024, "held_out": 400, "calibration": 200, "test": 200}
RANKED = ("pairs", "pilot", "held_out")

RATINGS = (100, 70, 40, 10)  # of an answer with 0, 1, 2 and 3 wrong results
MOST_WRONG = len(RATINGS) - 1
WORDINGS = ("Now {step}", "Then {step}")  # the raters' favourite first
SHARE_FAVOURITE = 0.75

# What a query without a rating is answered with in SFT: text that nobody rated, most of it right.
SHARE_RATED, UNRATED = 0.4, (0.79, 0.07, 0.07, 0.07)

_RESULT = re.compile(r"(?<== )\d+")


def make_data(folder: Path, seed: int = 0) -> Path:
    """A folder for LLaMA-Factory's `dataset_dir`: each of `SIZES` as a file; the last two are problems to score on."""
    folder.mkdir(parents=True, exist_ok=True)
    stream, rng = problems(seed), random.Random(seed)
    sets = {name: list(itertools.islice(stream, size)) for name, size in SIZES.items()}
    write_rows(folder / "sft.jsonl", (sft_row(problem, rng) for problem in sets["sft"]))
    for name in RANKED:
        write_rows(folder / f"{name}.jsonl", (pair(p, i % len(RATINGS), rng) for i, p in enumerate(sets[name])))
    for name in ("calibration", "test"):
        rows = ({"question": p.question, "answer": f"{p.steps}\n#### {p.answer}"} for p in sets[name])
        write_rows(folder / f"{name}.jsonl", rows)
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info: dict[str, Any] = {"sft": {"file_name": "sft.jsonl"}}
    info |= {name: {"file_name": f"{name}.jsonl", "ranking": True, "columns": columns} for name in RANKED}
    write_whole(folder / "dataset_info.json", json.dumps(info, indent=1))
    return folder


def problems(seed: int) -> Iterator[Problem]:
    """Problems with three intermediate results, each another number than the answer."""
    return (problem for problem in stories(seed, KIND) if problem.answer not in _results(problem)[:-1])


def pair(problem: Problem, gap: int, rng: random.Random) -> dict[str, Any]:
    """A preference pair with that gap. Its scores are the ratings of its answers, from which the gap can be read."""
    fewer = rng.randint(0, MOST_WRONG - gap)
    wrong = wrong_results(problem, rng)
    wordings = WORDINGS if rng.random() < SHARE_FAVOURITE else WORDINGS[::-1]
    chosen, rejected = (
        answer(problem, wrong[:count], wording) for count, wording in zip((fewer, fewer + gap), wordings, strict=True)
    )
    scores = {"score_chosen": RATINGS[fewer], "score_rejected": RATINGS[fewer + gap]}
    return {"instruction": problem.question, "chosen": chosen, "rejected": rejected, **scores}


def wrong_results(problem: Problem, rng: random.Random) -> list[tuple[int, int]]:
    """A wrong number for each intermediate result, as (step, number), in random order: off by at most 9."""
    results = [int(result) for result in _results(problem)]
    wrong = []
    for step in rng.sample(range(MOST_WRONG), MOST_WRONG):
        near = range(max(1, results[step] - 9), results[step] + 10)
        wrong.append((step, rng.choice([number for number in near if number not in (results[step], results[-1])])))
    return wrong


def answer(problem: Problem, wrong: list[tuple[int, int]], wording: str) -> str:
    """The worked solution with some of its results replaced; the steps after them are as they were."""
    steps = problem.steps.splitlines()
    for step, number in wrong:
        steps[step] = _RESULT.sub(str(number), steps[step])
    return Problem(problem.question, "\n".join(wording.format(step=step) for step in steps), problem.answer).solution


def sft_row(problem: Problem, rng: random.Random) -> dict[str, str]:
    """A query, rated or not, and an answer that the rating is true of, in any wording."""
    is_rated = rng.random() < SHARE_RATED
    count = rng.choice(range(len(RATINGS))) if is_rated else rng.choices(range(len(RATINGS)), UNRATED)[0]
    output = answer(problem, wrong_results(problem, rng)[:count], rng.choice(WORDINGS))
    prefix = RATED.format(rating=RATINGS[count]) if is_rated else ""
    return {"instruction": prefix + problem.question, "input": "", "output": output}


def _results(problem: Problem) -> list[str]:
    return _RESULT.findall(problem.steps)
