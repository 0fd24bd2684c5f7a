"""Open questions of one or several turns, in the layouts of MT-Bench, Vicuna-Bench, Alpaca and LLaMA-Factory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rows import Fields
from .chat_templates import Chat
from .questions import located_rows

QUESTION_FIELDS = ("question", "instruction", "prompt", "turns")


@dataclass(frozen=True)
class Query:
    """An open question, of one or several turns.

    Args:
        id: the row's `id` or `question_id`, else its number, counted from 1.
        messages: the row's system turn and history, if any, and its first turn as the last user turn.
        later: the user's later turns, each to be asked on top of the model's own answers to the earlier ones.
        category: as in the data, such as `writing`.
        references: a reference answer per turn; None for a turn without one, and empty if no turn has one.
    """

    id: str
    messages: Chat
    later: tuple[str, ...] = ()
    category: str | None = None
    references: tuple[str | None, ...] = ()

    @property
    def text(self) -> str:
        """What a judge reads of the first turn: the question, or the dialogue that ends with it."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in self.messages)

    @property
    def turns(self) -> list[str]:
        """What a judge reads of each turn."""
        return [self.text, *self.later]

    def chat(self, system: str | None, answers: Sequence[str] = ()) -> Chat:
        """What a model is asked.

        Args:
            system: the system turn, even an empty one, of a row that has none; None for no system turn.
            answers: the model's own to the earlier turns; without any, the first turn is asked.
        """
        chat = list(self.messages)
        if system is not None and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": system})
        for answer, turn in zip(answers, self.later, strict=False):
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        return chat


def load_queries(path: Path, limit: int | None = None) -> list[Query]:
    """The questions of a jsonl or parquet file: `question`, `instruction` (and `input`), `prompt`, or `turns`, a list.

    They include LLaMA-Factory's `system` and `history` (pairs of a user and an assistant turn), and the `category` and
    `reference` (a list, one per turn) of MT-Bench.

    Raises:
        UserError: if the file does not exist, a row has no question, its other fields are of another kind, or an id
            occurs twice.
    """
    queries = [_query(number, *located) for number, located in enumerate(read_located(path), start=1)][:limit]
    by_key(path, [query.id for query in queries], queries)
    return queries


def _query(number: int, where: str, row: Fields) -> Query:
    text, *later = _turns(where, row)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = []
    for turns in row.get("history") or []:
        if not (isinstance(turns, list) and len(turns) == 2):
            raise UserError(f"{where}: `history` must be a list of pairs, each of a user and an assistant turn.")
        user, assistant = turns
        history += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    question = "\n".join(filter(None, [text, row.get("input")]))
    return Query(
        row_id(row) or str(number),
        [*system, *history, {"role": "user", "content": question}],
        tuple(later),
        category_of(where, row),
        references_of(where, row, 1 + len(later)),
    )


def _turns(where: str, row: Fields) -> list[str]:
    name = next((field for field in QUESTION_FIELDS if row.get(field)), None)
    found = row.get(name) if name else None
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not isinstance(found[0], str):
        raise UserError(f"{where} has no question: write it as `question`, `instruction`, `prompt` or `turns`.")
    for number, turn in enumerate(found, start=1):
        if not isinstance(turn, str) or not turn.strip():
            raise UserError(f"{where}: turn {number} in `{name}` is not a text: write what the user says there.")
    return found


def category_of(where: str, row: Fields) -> str | None:
    """The `category` of a row; None if it has none.

    Raises:
        UserError: if it is not a text.
    """
    found = row.get("category")
    if found is not None and not isinstance(found, str):
        raise UserError(f"{where}: `category` is not a text: write a name, such as `writing`, or remove it.")
    return found or None


def references_of(where: str, row: Fields, turns: int) -> tuple[str | None, ...]:
    """A reference answer per turn, from the `reference` of a row; empty if no turn has one.

    Raises:
        UserError: if it is neither a list of texts, of which some may be null or empty, nor, for a single turn, a text;
            or if it has more entries than there are turns.
    """
    found = row.get("reference")
    given = [found] if isinstance(found, str) and turns == 1 else [] if found is None else found
    if not isinstance(given, list) or not all(each is None or isinstance(each, str) for each in given):
        raise UserError(f"{where}: `reference` must be a list with one text per turn: write one, or remove it.")
    if len(given) > turns:
        raise UserError(f"{where} has {len(given)} references, but {turns} turns: write one per turn.")
    references = tuple(each or None for each in [*given, *[None] * (turns - len(given))])
    return references if any(references) else ()


# --- rows ------------------------------------------------------------------------------------------------------------


def read_located(path: Path) -> list[tuple[str, Fields]]:
    """The rows of a file, at least one, each with its place for messages.

    Raises:
        UserError: if the file cannot be read or is empty.
    """
    located = located_rows(str(path))
    if not located:
        raise UserError(f"{path} is empty: write one JSON object per line.")
    return located


def row_id(row: Fields) -> str | None:
    """The `id` or `question_id` of a row; None if it has none."""
    found = next((row[field] for field in ("id", "question_id") if row.get(field) is not None), None)
    return None if found is None else str(found)


def by_key(path: Path, keys: list[str], values: list[Any]) -> dict[str, Any]:
    """The values by their keys.

    Raises:
        UserError: if a key occurs twice in the file.
    """
    found = dict(zip(keys, values, strict=True))
    if len(found) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{path} has {twice[:80]!r} more than once: give each row an `id` of its own.")
    return found


def content_hash(contents: Sequence[Sequence[Any]]) -> str:
    """Fingerprint (SHA-256, hex) of contents in their order."""
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
