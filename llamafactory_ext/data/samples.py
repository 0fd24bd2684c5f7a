"""Pairs of a model's own answers: right samples of `llamafactory-ext eval sample` against wrong ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Any

from ..errors import UserError
from ..rows import BadRow, Fields, Row, check_characters, text
from .files import PairFile

RANKED = ("answers", "scores")  # the columns of a ranked row's responses
# The columns of a sample that `pass_rates` reads, with their types.
VERDICT = {
    "problem": (str,),
    "correct": (bool,),
    "answer": (str, type(None)),
    "degenerate": (bool,),
    "finish_reason": (str, type(None)),
}


class Choice(StrEnum):
    """Which right and wrong answers make a pair."""

    random = "random"
    closest = "closest"
    length = "length"


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One answer to a problem.

    Args:
        row: that it was read from, without token ids.
        index: in its run; samples and problems are taken in this order.
        problem: the fingerprint of the problem.
        prompt: what was asked: `instruction`, and `system` if there was a system turn.
        text: the answer.
        is_right: whether the number that was read from it is the problem's.
        verdict: the columns that `pass_rates` reads.
        flaw: why it cannot be a chosen response, if it cannot.
    """

    row: Row
    index: int
    problem: str
    prompt: Fields
    text: str
    is_right: bool
    verdict: Fields
    flaw: str | None


def read_samples(rows: Iterable[Row], file: PairFile, source: str) -> list[Sample]:
    """The samples in rows, ordered by their index; other rows are dropped.

    Args:
        rows: from `read_rows`.
        file: where dropped rows are kept.
        source: what the rows are read from, for messages.

    Raises:
        UserError: if the samples are of several runs: of several models or settings.
    """
    runs: dict[str, int] = {}
    found: dict[int, Sample] = {}
    for row in rows:
        try:
            run, sample = _sample(row)
        except BadRow as reason:
            file.drop(str(reason), row)
            continue
        runs.setdefault(run, row.number)
        if len(runs) > 1:
            first, second = runs.values()
            raise UserError(
                f"{source!r} mixes samples of several runs (see lines {first} and {second}): name those of one run."
            )
        if sample.index in found:
            file.drop("the sample is in the file again", found[sample.index].row)
        found[sample.index] = sample
    return [found[index] for index in sorted(found)]


def _sample(row: Row) -> tuple[str, Sample]:
    """The fingerprint of a sample's run, and the sample.

    Raises:
        BadRow: if it is not a sample, or the server refused to answer.
    """
    if isinstance(row.fields, BadRow):
        raise row.fields
    fields = {name: value for name, value in row.fields.items() if name != "token_ids"}  # most of a row's memory
    if fields.get("refused") is not None:
        raise BadRow("the server refused the question")
    index, answer = _column(fields, "index", int), _column(fields, "text", str)
    check_characters(answer)
    verdict = {name: _column(fields, name, *kinds) for name, kinds in VERDICT.items()}
    prompt = {"instruction": text(fields, "instruction")}
    if isinstance(fields.get("system"), str):
        prompt["system"] = fields["system"]
    cut_off = "cut off at the token limit" if verdict["finish_reason"] == "length" else None
    flaw = "degenerate" if verdict["degenerate"] else cut_off
    problem, stripped = text(fields, "problem"), Row(row.number, fields)
    sample = Sample(stripped, index, problem, prompt, answer, verdict["correct"], verdict, flaw)
    return text(fields, "run"), sample


def _column(fields: Fields, name: str, *kinds: type) -> Any:
    if name not in fields or type(fields[name]) not in kinds:
        raise BadRow(f"no sample of `llamafactory-ext eval sample`: the column {name!r} is missing, or of another kind")
    return fields[name]


# --- pairs -----------------------------------------------------------------------------------------------------------


def write_sample_pairs(
    samples: Sequence[Sample], file: PairFile, choice: Choice, per_problem: int, seed: int, ranked: bool = False
) -> tuple[int, int]:
    """Write pairs of each problem, its right samples against its wrong ones, or with `ranked` one row of its answers.

    A text counts once. A right sample that is degenerate or cut off is not used; a wrong one may be.

    Args:
        samples: of one run.
        file: where pairs and dropped samples go.
        choice: of the answers that make a pair.
        per_problem: pairs of a problem at most; with `ranked`, right answers at most, and wrong ones.
        seed: decides what `choice` leaves open.
        ranked: whether to write one row per problem, with `answers` and their `scores`, 1.0 for a right one, else 0.0.

    Returns:
        The number of rows written, and of the problems that they are of.
    """
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem, []).append(sample)
    written = problems = 0
    for problem, group in by_problem.items():
        right, wrong = _usable(group, file)
        rng = random.Random(f"{seed} {problem}")
        texts, others = ([sample.text for sample in side] for side in (right, wrong))
        places = choose_pairs(texts, others, per_problem, DISTANCES[choice](), rng)
        pairs = [(right[i], wrong[j]) for i, j in places]
        _count(right, wrong, pairs, file)
        rows = [_ranked(pairs)] if ranked and pairs else [_pair(*pair) for pair in pairs]
        for row in rows:
            file.write(row)
        written += len(rows)
        problems += bool(rows)
    return written, problems


def _usable(group: list[Sample], file: PairFile) -> tuple[list[Sample], list[Sample]]:
    """The right and the wrong samples of a problem that may be in a pair; the others are dropped."""
    seen: set[str] = set()
    right: list[Sample] = []
    wrong: list[Sample] = []
    for sample in group:
        if sample.text in seen:
            file.drop("another sample of the problem has the same text", sample.row)
        elif not sample.text.strip():
            file.drop("the text is empty", sample.row)
        elif sample.is_right and sample.flaw is not None:
            file.drop(f"right, but {sample.flaw}", sample.row)
        else:
            (right if sample.is_right else wrong).append(sample)
        seen.add(sample.text)
    return right, wrong


def choose_pairs(
    right: Sequence[str], wrong: Sequence[str], count: int, distance: Callable[[str, str], float], rng: random.Random
) -> list[tuple[int, int]]:
    """Pairs of right and wrong texts, the closest first, by their places; no pair twice.

    No text is used twice before all of its side have been used once.

    Args:
        right: distinct texts.
        wrong: distinct texts.
        count: pairs at most.
        distance: between two texts.
        rng: decides between pairs at the same distance.
    """
    ours, theirs = (rng.sample(range(len(side)), len(side)) for side in (right, wrong))
    left = sorted(product(ours, theirs), key=lambda pair: distance(right[pair[0]], wrong[pair[1]]))
    used: tuple[Counter[int], Counter[int]] = Counter(), Counter()
    chosen: list[tuple[int, int]] = []
    while left and len(chosen) < count:
        # While a text is unused, each of its pairs is left; so the smallest sum is a pair of the least used texts.
        pair = min(left, key=lambda pair: used[0][pair[0]] + used[1][pair[1]])
        left.remove(pair)
        chosen.append(pair)
        for counter, place in zip(used, pair, strict=True):
            counter[place] += 1
    return chosen


def _by_edits() -> Callable[[str, str], float]:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance


# Choice -> makes its distance between two texts.
DISTANCES: dict[Choice, Callable[[], Callable[[str, str], float]]] = {
    Choice.random: lambda: lambda a, b: 0.0,
    Choice.closest: _by_edits,
    Choice.length: lambda: lambda a, b: abs(len(a) - len(b)),
}


def _pair(right: Sample, wrong: Sample) -> Fields:
    return {**right.prompt, "chosen": right.text, "rejected": wrong.text}


def _ranked(pairs: list[tuple[Sample, Sample]]) -> Fields:
    """The answers in pairs of one problem, right ones first, each once."""
    right, wrong = (list(dict.fromkeys(sample.text for sample in side)) for side in zip(*pairs, strict=True))
    scores = [1.0] * len(right) + [0.0] * len(wrong)
    return {**pairs[0][0].prompt, "answers": right + wrong, "scores": scores}


def _count(right: list[Sample], wrong: list[Sample], pairs: list[tuple[Sample, Sample]], file: PairFile) -> None:
    """Count the usable samples of a problem: used, or dropped."""
    used = {sample.index for pair in pairs for sample in pair}
    if not right:
        reason = "the problem has no right sample to choose"
    elif not wrong:
        reason = "the problem has no wrong sample to reject"
    else:
        reason = "left over: the problem has enough without it"
    for kind, side in (("right", right), ("wrong", wrong)):
        for sample in side:
            if sample.index in used:
                file.count(kind, sample.row)
            else:
                file.drop(reason, sample.row)
