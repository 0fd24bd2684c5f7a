"""Pairs from dialogues: Anthropic/hh-rlhf, and data sets laid out as HuggingFaceH4/ultrafeedback_binarized."""

from __future__ import annotations

import re
from typing import Any

from ..rows import SCORES, BadRow, Fields, number, text

Turn = tuple[str, str]  # role and text

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rlhf_pair(fields: Fields) -> Fields:
    """A pair from two dialogues with `Human:` and `Assistant:` turns, which differ in the last response.

    Returns:
        `instruction`, `history`, `chosen` and `rejected`.

    Raises:
        BadRow: if the dialogues differ before the last response, do not alternate, or have an empty turn.
    """
    return _pair(_turns(text(fields, "chosen")), _turns(text(fields, "rejected")))


def ultrafeedback_pair(fields: Fields) -> Fields:
    """A pair from two lists of messages (`role`, `content`), which differ in the last one.

    Returns:
        `system` (empty without a system message), `instruction`, `history`, `chosen`, `rejected`, and the scores
        `score_chosen` and `score_rejected` where the row has them.

    Raises:
        BadRow: if a side is not a list of messages; otherwise as `hh_rlhf_pair`.
    """
    chosen, rejected = _messages(fields, "chosen"), _messages(fields, "rejected")
    system = ""
    if chosen[:1] == rejected[:1] and chosen and chosen[0][0] == "system":
        system, chosen, rejected = chosen[0][1], chosen[1:], rejected[1:]
    scores = {name: number(fields[name]) for name in SCORES if name in fields}
    return {"system": system} | _pair(chosen, rejected) | scores


def kind_by_scores(pair: Fields) -> str:
    """The kind of a pair for the tally: whether its scores are usable, and agree with what is preferred."""
    scores = [pair[name] for name in SCORES if name in pair]
    if None in scores:
        return "pairs whose scores are not numbers"
    if len(scores) == 2 and scores[0] < scores[1]:
        return "pairs whose rejected response has the higher score"
    return "pairs"


def _turns(dialogue: str) -> list[Turn]:
    before, *parts = _SPEAKER.split(dialogue)
    if before.strip() or not parts:
        raise BadRow("the dialogue does not begin with `Human:`")
    return [(_ROLES[speaker], said.strip()) for speaker, said in zip(parts[::2], parts[1::2], strict=True)]


def _messages(fields: Fields, column: str) -> list[Turn]:
    messages = fields.get(column)
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise BadRow(f"no list of messages with role and content in the column {column!r}")
    return [(message["role"], message["content"].strip()) for message in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _pair(chosen: list[Turn], rejected: list[Turn]) -> Fields:
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the dialogues differ before the last response")
    wanted = ["user", "assistant"] * (len(chosen) // 2)
    for turns in (chosen, rejected):
        if not turns or [role for role, _ in turns] != wanted:
            raise BadRow("the turns do not alternate between user and assistant")
        if not all(said for _, said in turns):
            raise BadRow("a turn is empty")

    said = [words for _, words in chosen[:-1]]
    history = [list(turn) for turn in zip(said[:-1:2], said[1:-1:2], strict=True)]
    return {"instruction": said[-1], "history": history, "chosen": chosen[-1][1], "rejected": rejected[-1][1]}
