"""From a judge's replies to verdicts, and from those to win, tie and lose rates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import UserError
from .answered import Exchange, turn_label
from .generations import Generation
from .intervals import clustered_rate

Position = Literal["first", "second", "tie"]
Outcome = Literal["win", "tie", "lose"]
POSITIONS: dict[str, Position] = {"A": "first", "B": "second", "C": "tie"}
OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "lose")
# The last line, with nothing else on it; judges often print it in bold.
VERDICT_LINE = re.compile(r"(?:^|\n)[ \t]*(?:\*\*)?\[\[([ABC])\]\](?:\*\*)?\s*\Z")


def parse_verdict(reply: Generation) -> Position | None:
    """Which position the judge prefers; None if the last line is not a verdict, or the reply was cut off."""
    match = VERDICT_LINE.search(reply.text)
    return POSITIONS[match[1]] if match and reply.finish_reason != "length" else None


def outcome(a_first: Position | None, b_first: Position | None) -> Outcome | None:
    """Model A's result on a turn, from the verdicts in both orders; None if a verdict is missing."""
    if a_first is None or b_first is None:
        return None
    if (a_first, b_first) == ("first", "second"):
        return "win"
    return "lose" if (a_first, b_first) == ("second", "first") else "tie"


def judge_rows(pairs: Sequence[Exchange], replies: Mapping[int, Generation]) -> list[dict[str, Any]]:
    """One row per turn; replies 2i and 2i + 1 belong to pair i with A's and with B's answer first."""
    rows = []
    for number, pair in enumerate(pairs):
        a_first, b_first = replies[2 * number], replies[2 * number + 1]
        verdicts = parse_verdict(a_first), parse_verdict(b_first)
        (*_, a), (*_, b) = pair.answers
        rows.append(
            {
                **pair.about,
                "a": a,
                "b": b,
                "outcome": outcome(*verdicts),
                "a_first": _judgment(verdicts[0], a_first),
                "b_first": _judgment(verdicts[1], b_first),
            }
        )
    return rows


def _judgment(verdict: Position | None, reply: Generation) -> dict[str, str | None]:
    refused = {} if reply.refused is None else {"refused": reply.refused}
    return {"verdict": verdict, "reply": reply.text, **refused}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Model A's win, tie and lose rates over the turns judged in both orders, overall, by turn and by category, and the
    judge's position bias.

    `contradictions`: both orders prefer the same position, so different models. `positions`: verdicts by position.

    Raises:
        UserError: if no turn has a verdict in both orders.
    """
    judged = [row for row in rows if row["outcome"]]
    questions = {row["id"] for row in rows}
    if not judged:
        raise UserError(
            f"None of {len(questions)} questions has a verdict in both orders: read the replies in generations.jsonl, "
            "then choose another --judge or --prompt, and another --output."
        )
    orders = [(row["a_first"]["verdict"], row["b_first"]["verdict"]) for row in judged]
    contradictions = sum(a_first == b_first != "tie" for a_first, b_first in orders)
    given = [verdict for order in orders for verdict in order]
    return {
        "questions": len(questions),
        "turns": len(rows),
        "unparseable": {
            "replies": sum(row[order]["verdict"] is None for row in rows for order in ("a_first", "b_first")),
            "questions": labels(rows, [row for row in rows if not row["outcome"]]),
        },
        **rates(judged),
        "contradictions": {"count": contradictions, "rate": contradictions / len(judged)},
        "positions": {position: given.count(position) for position in POSITIONS.values()},
        "by_turn": {name: rates(found) for name, found in grouped(judged, "turn").items()},
        "by_category": {name: rates(found) for name, found in grouped(judged, "category").items()},
    }


def rates(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Win, tie and lose rates over turns, and the exact sign test over questions.

    The turns of a question are not independent. So the intervals are Wilson's for the effective number of turns, and a
    question counts once in the sign test: as won if more of its turns are won than lost, as lost if fewer are.

    Args:
        judged: rows with `id` and `outcome`, at least one.
    """
    from statsmodels.stats.proportion import binom_test

    by_question: dict[str, list[Outcome]] = {}
    for row in judged:
        by_question.setdefault(row["id"], []).append(row["outcome"])
    found = list(by_question.values())
    balance = [outcomes.count("win") - outcomes.count("lose") for outcomes in found]
    wins, losses = sum(each > 0 for each in balance), sum(each < 0 for each in balance)
    return {
        "judged": len(judged),
        **{
            result: clustered_rate([(outcomes.count(result), len(outcomes)) for outcomes in found])
            for result in OUTCOMES
        },
        "sign_test_p": float(binom_test(wins, wins + losses)) if wins + losses else 1.0,
    }


def grouped(rows: Sequence[dict[str, Any]], column: str) -> dict[str, list[dict[str, Any]]]:
    """The rows by what a column says, in the order of first appearance; rows without it are in no group."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if (name := row.get(column)) is not None:
            found.setdefault(str(name), []).append(row)
    return found


def labels(rows: Sequence[dict[str, Any]], some: Sequence[dict[str, Any]]) -> list[str]:
    """How messages name some of the rows, which have `id` and `turn`."""
    turns: dict[str, int] = {}
    for row in rows:
        turns[row["id"]] = max(turns.get(row["id"], 1), row["turn"])
    return [turn_label(row["id"], row["turn"], turns[row["id"]]) for row in some]
