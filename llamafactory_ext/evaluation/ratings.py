"""From a judge's replies to ratings from 1 to 10, and from those to means, intervals and paired differences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .answered import Exchange
from .generations import Generation
from .intervals import mean_95, t_test_p
from .verdicts import grouped, labels

LEAST, MOST = 1, 10
# The last line, with nothing else on it but MT-Bench's label; judges often print it in bold, and some give halves.
RATING_LINE = re.compile(
    r"(?:^|\n)[ \t]*(?:\*\*)?(?:Rating:(?:\*\*)?[ \t]*)?(?:\*\*)?\[\[([0-9]+(?:\.[0-9]+)?)\]\](?:\*\*)?\s*\Z",
    re.IGNORECASE,
)


def parse_rating(reply: Generation) -> float | None:
    """The rating in the last line; None if there is none from 1 to 10, or the reply was cut off."""
    match = RATING_LINE.search(reply.text)
    if match is None or reply.finish_reason == "length":
        return None
    rating = float(match[1])
    return rating if LEAST <= rating <= MOST else None


def grade_rows(run: str, judged: Sequence[Exchange], replies: Mapping[int, Generation]) -> list[dict[str, Any]]:
    """One row per turn; with R repeats, replies iR to iR + R - 1 belong to turn i."""
    repeats = len(replies) // len(judged)
    rows = []
    for number, each in enumerate(judged):
        own = [replies[number * repeats + repeat] for repeat in range(repeats)]
        ratings = [parse_rating(reply) for reply in own]
        rows.append(
            {
                "run": run,
                **each.about,
                "answer": each.answers[0][-1],
                "mean": fmean(_given(ratings)) if any(ratings) else None,
                "ratings": ratings,
                "replies": [_reply(reply) for reply in own],
            }
        )
    return rows


def _given(ratings: Iterable[float | None]) -> list[float]:
    return [rating for rating in ratings if rating is not None]


def _reply(reply: Generation) -> dict[str, str]:
    return {"reply": reply.text, **({} if reply.refused is None else {"refused": reply.refused})}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run's ratings: overall, by turn and by category; None if there is no rating.

    Args:
        rows: of the run, as `grade_rows` returns them.
    """
    rated = [row for row in rows if row["mean"] is not None]
    missing = [row for row in rows if None in row["ratings"]]
    return {
        **means(rated),
        "turns": len(rated),
        "unparseable": {
            "replies": sum(row["ratings"].count(None) for row in missing),
            "questions": labels(rows, missing),
        },
        "by_turn": {name: means(found) for name, found in grouped(rated, "turn").items()},
        "by_category": {name: means(found) for name, found in grouped(rated, "category").items()},
    }


def means(rated: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean rating with Student's 95% interval over questions, and the spread over the repeats.

    A question counts once: as the mean of its turns, each the mean of its repeats. The spread is the pooled standard
    deviation of the ratings r of one turn about their mean, over turns i with R_i ratings:

    s = sqrt(sum_i sum_j (r_ij - mean_i)^2 / sum_i (R_i - 1))

    Args:
        rated: rows with `id`, `mean` and `ratings`, of which at least one is there.

    Returns:
        `mean`, `interval_95` (None of a single question), `questions`, and `spread` (None without repeats).
    """
    scores = list(question_means(rated).values())
    ratings = [_given(row["ratings"]) for row in rated]
    squares = sum((rating - fmean(own)) ** 2 for own in ratings for rating in own)
    freedom = sum(len(own) - 1 for own in ratings)
    return {
        "mean": fmean(scores) if scores else None,
        "interval_95": mean_95(scores),
        "questions": len(scores),
        "spread": math.sqrt(squares / freedom) if freedom else None,
    }


def question_means(rated: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By question, the mean over its turns."""
    return {id: fmean(row["mean"] for row in found) for id, found in grouped(rated, "id").items()}


def compare(rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first run against each other run: the mean difference over questions, Student's 95% interval and paired
    t-test, p-values also by Holm.

    A question's difference is that of its means over the turns that both runs have a rating for.

    Args:
        rows: run -> its rows.
    """
    baseline, *others = rows
    found = [_difference(baseline, other, rows) for other in others]
    tested = [row["p"] for row in found if row["p"] is not None]
    corrected = iter(_holm(tested))
    return [{**row, "p_holm": None if row["p"] is None else next(corrected)} for row in found]


def _difference(baseline: str, other: str, rows: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    a, b = (
        {(row["id"], row["turn"]): row for row in rows[run] if row["mean"] is not None} for run in (baseline, other)
    )
    shared = [key for key in a if key in b]
    first, second = (question_means([found[key] for key in shared]) for found in (a, b))
    differences = [second[id] - first[id] for id in first]
    return {
        "baseline": baseline,
        "run": other,
        "questions": len(differences),
        "difference": fmean(differences) if differences else None,
        "interval_95": mean_95(differences),
        "p": t_test_p(differences),
    }


def _holm(p: Sequence[float]) -> list[float]:
    from statsmodels.stats.multitest import multipletests

    return [float(each) for each in multipletests(p, method="holm")[1]] if p else []
