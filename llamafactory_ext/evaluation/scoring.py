"""Scores answers: the number in each, accuracies with confidence intervals, and rates of degeneration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from statistics import fmean, variance
from typing import Any

from .degeneration import inspect_output
from .extraction import TIERS, VERSION, read_answer
from .generations import Generation
from .intervals import effective_number, wilson_95
from .questions import Question, problems_hash

SIGNS = ("degenerate", "loop", "cut_off", "empty")


def score_output(question: Question, generation: Generation | None) -> dict[str, Any]:
    """One problem's row; without an answer, because it was not asked yet or was refused, it is wrong in all tiers."""
    if generation and generation.refused is not None:
        return {**score_output(question, None), "refused": generation.refused}
    row: dict[str, Any] = {
        "index": question.index,
        "problem": question.id,
        "gold": str(question.gold),
        "missing": generation is None,
    }
    text = generation.text if generation else ""
    for tier in TIERS:
        reading = read_answer(text, tier)
        row[tier] = {
            "answer": _text(reading.answer),
            "correct": reading.answer == question.gold,
            "conflict": reading.conflict,
        }
    if generation:
        row |= inspect_output(text, generation.token_ids, generation.finish_reason).as_dict()
    return row


def _text(answer: Decimal | None) -> str | None:
    return None if answer is None else str(answer)


def score_run(questions: list[Question], generations: Mapping[int, Generation]) -> dict[str, Any]:
    """A run's rows and their summary: fingerprint of the problems, accuracies with Wilson's 95% interval, conflicts,
    and signs of degeneration."""
    rows = [score_output(question, generations.get(question.index)) for question in questions]
    summary = {"problems_sha256": problems_hash(questions), **summarize(rows)}
    return {"extractor": VERSION, "summary": summary, "rows": rows}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of rows; rates from 0 to 1, those of degeneration over the answered problems."""
    count = len(rows)
    tiers: dict[str, Any] = {}
    for tier in TIERS:
        correct = sum(row[tier]["correct"] for row in rows)
        tiers[tier] = {
            "correct": correct,
            "accuracy": correct / count,
            "wilson_95": wilson_95(correct / count, count),
            "answered": sum(row[tier]["answer"] is not None for row in rows),
            "conflicts": sum(row[tier]["conflict"] for row in rows),
        }
    answered = [row for row in rows if not row["missing"]]
    signs = {sign: sum(row[sign] for row in answered) / max(len(answered), 1) for sign in SIGNS}
    means = {key: sum(row[key] for row in answered) / max(len(answered), 1) for key in ("seq_rep_4", "zlib_ratio")}
    return {"problems": count, "missing": count - len(answered), **tiers, "degeneration": {**signs, **means}}


def about_problems(source: str, questions: list[Question], template: str) -> dict[str, Any]:
    """What the answers to problems and their scores depend on, for the manifest.

    Args:
        source: a file or a Hub data set.
        questions: its problems.
        template: the prompt.
    """
    return {
        "data": {"source": source, "sha256": problems_hash(questions), "problems": len(questions)},
        "prompt": template,
        "extractor": VERSION,
    }


def pass_rates(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several samples per problem say of a model; rates from 0 to 1.

    `pass@1` is the mean over problems of the share of right samples. Samples of a problem are not independent, so its
    interval is Wilson's for the effective number of samples (Kish's design effect), which is at least the number of
    problems and at most that of samples.

    Args:
        samples: rows with `problem`, `correct`, `answer`, `degenerate` and `finish_reason`, in any order; at least one.
    """
    rows = list(samples)
    by_problem: dict[str, list[bool]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row["correct"])
    rates = [fmean(right) for right in by_problem.values()]
    rate, of_mean = fmean(rates), variance(rates) / len(rates) if len(rates) > 1 else 0.0
    return {
        "problems": len(rates),
        "samples": len(rows),
        "pass@1": rate,
        "wilson_95": wilson_95(rate, effective_number(rate, of_mean, len(rates), len(rows))),
        "solved": fmean(each > 0 for each in rates),
        "all_right": fmean(each == 1 for each in rates),
        "all_wrong": fmean(each == 0 for each in rates),
        "unread": fmean(row["answer"] is None for row in rows),
        "degenerate": fmean(row["degenerate"] for row in rows),
        "cut_off": fmean(row["finish_reason"] == "length" for row in rows),
    }
