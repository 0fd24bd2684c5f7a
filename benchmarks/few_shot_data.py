"""MetaMath's few-shot pairs and MetaMathQA in miniature or at full size, with traps whose right answers are known.

Built from the data sets' cards: the pairs have `prompt`, `chosen` and `rejected`, and a prompt holds worked examples
and then the question; MetaMathQA has `query`, `response`, `original_question` and `type`. All text is made up here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAPS = (
    "repeated in the examples",
    "prefix of another",
    "longer than another",
    "end of another",
    "holds the delimiters",
    "missing from the questions",
    "missing, its answer known",
    "identical sides",
    "no suffix",
    "not JSON",
    "no chosen",
)
SUFFIX = "\nAnswer:"


@dataclass(frozen=True)
class Example:
    """A line of the few-shot file, the rows of MetaMathQA that belong to it, and what must become of it."""

    line: str
    questions: list[dict[str, str]]
    how: str  # matched, fallback, or the beginning of the reason for which it is dropped
    question: str


def examples(count: int, seed: int = 0, share_of_traps: float = 0.02) -> Iterator[Example]:
    """Pairs of which most are plain and some are traps, in turn."""
    rng = random.Random(seed)
    solved = [_problem(rng, -1 - i) for i in range(200)]
    traps = 0
    for number in range(count):
        if number % round(1 / share_of_traps) == 7:
            yield _trap(TRAPS[traps % len(TRAPS)], rng, number, solved)
            traps += 1
        else:
            query, response = _problem(rng, number)
            yield _example(rng, query, response, solved)


def write(folder: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """The few-shot file and MetaMathQA, as jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, questions = folder / "few_shot.jsonl", folder / "metamath_qa.jsonl"
    with pairs.open("w", encoding="utf-8") as pair_file, questions.open("w", encoding="utf-8") as question_file:
        for example in examples(count, seed):
            pair_file.write(example.line + "\n")
            for row in example.questions:
                question_file.write(json.dumps(row) + "\n")
    return pairs, questions


def _problem(rng: random.Random, number: int) -> tuple[str, str]:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    query = (
        f"In shop {number} there are {a} shelves with {b} jars each, and a delivery brings {c} crates of {b} jars. "
        "Nothing is sold before the evening, and no jar breaks. How many jars does the shop have in the evening?"
    )
    steps = [
        f"The {a} shelves hold {a} * {b} = {a * b} jars.",
        f"The {c} crates hold {c} * {b} = {c * b} jars.",
        f"Together this makes {a * b} + {c * b} = {a * b + c * b} jars in shop {number}.",
    ]
    filler = [f"Nothing was sold on day {day}, so the number stays the same." for day in range(rng.randint(2, 8))]
    total = a * b + c * b
    return query, "\n".join([*steps, *filler, f"#### {total}", f"The answer is: {total}"])


def _example(
    rng: random.Random,
    query: str,
    response: str,
    solved: list[tuple[str, str]],
    shots: tuple[tuple[str, str], ...] = (),
    known: tuple[str, ...] | None = None,
    how: str = "matched",
    suffix: str = SUFFIX,
    **changes: Any,
) -> Example:
    examples = [*shots, *rng.sample(solved, 4 - len(shots))]
    rng.shuffle(examples)
    prompt = "".join(f"Question: {asked}{SUFFIX} {answer}\n\n" for asked, answer in examples)
    row = {"prompt": f"{prompt}Question: {query}{suffix}", "chosen": response, "rejected": _corrupted(response)}
    asked = (query,) if known is None else known
    questions = [{"query": q, "response": response, "original_question": q, "type": "made up"} for q in asked]
    return Example(json.dumps({**row, **changes}), questions, how, query)


def _corrupted(response: str) -> str:
    first, _, rest = response.partition("\n")
    return f"{first.rpartition('=')[0]}= 1 jars.\n{rest}"


def _trap(kind: str, rng: random.Random, number: int, solved: list[tuple[str, str]]) -> Example:
    query, response = _problem(rng, number)
    longer, other = f"{query} Give the number of jars.", f"Somebody asks this. {query}"
    match kind:
        case "repeated in the examples":
            return _example(rng, query, response, solved, shots=((query, response),))
        case "prefix of another":  # the longer one is in the examples only
            return _example(rng, query, response, solved, shots=((longer, response),), known=(longer, query))
        case "longer than another":
            return _example(rng, longer, response, solved, known=(query, longer))
        case "end of another":
            return _example(rng, other, response, solved, known=(query, other))
        case "holds the delimiters":
            asked = f"Read this. Question: what for?{SUFFIX} none.\n\n{query}"
            return _example(rng, asked, response, solved)
        case "missing from the questions":
            return _example(rng, query, response, solved, known=(), how="fallback")
        case "missing, its answer known":  # by a question that stands in the examples
            return _example(rng, query, response, solved, ((longer, response),), known=(longer,), how="fallback")
        case "identical sides":
            return _example(rng, query, response, solved, how="chosen and rejected", rejected=response)
        case "no suffix":
            return _example(rng, query, response, solved, how="the prompt does not end", suffix="\nThoughts?")
        case "not JSON":
            whole = _example(rng, query, response, solved, how="not valid JSON")
            return Example(whole.line[:-9], whole.questions, whole.how, query)
        case _:
            return _example(rng, query, response, solved, how="the column 'chosen' is empty", chosen=" ")
