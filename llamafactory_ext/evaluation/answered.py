"""Answers that are judged: read from the runs of `eval answers` or other files, and matched between models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rows import Fields
from .generations import run_folder
from .models import BASE
from .open_questions import by_key, category_of, read_located, references_of, row_id

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Answered:
    """A model's answers to the turns of a question.

    Args:
        id: of the question; None if its row has none.
        turns: the user's.
        answers: one per turn.
        refused: why a turn has no answer; None for each that has one.
        category: of the question, if the data has one.
        references: a reference answer per turn, None for a turn without one; empty if no turn has one.
    """

    id: str | None
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    refused: tuple[str | None, ...]
    category: str | None = None
    references: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """A turn that is judged, with all that came before it.

    Args:
        id: of the question; without ids in the data its number, from 1.
        turns: the user's, up to the one that is judged.
        answers: of each model to these turns.
        category: of the question, if the data has one.
        reference: a reference answer to the turn that is judged, if the data has one.
        label: how messages name the turn.
    """

    id: str
    turns: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    category: str | None = None
    reference: str | None = None
    label: str = ""

    @property
    def turn(self) -> int:
        """The number of the turn that is judged, from 1."""
        return len(self.turns)

    @property
    def question(self) -> str:
        """The turn that is judged."""
        return self.turns[-1]

    @property
    def dialogue(self) -> str:
        """What a judge reads of the user: the question, or all turns so far."""
        return _numbered("Turn", self.turns)

    def answer(self, model: int) -> str:
        """What a judge reads of a model: its answer, or all answers so far."""
        return _numbered("Answer to turn", self.answers[model])

    @property
    def content(self) -> list[Any]:
        """What a judgment depends on, for a fingerprint."""
        if self.turn == 1 and self.reference is None:
            return [self.id, self.question, *(answers[-1] for answers in self.answers)]
        return [self.id, self.turns, self.answers, self.reference]

    @property
    def about(self) -> dict[str, Any]:
        """The columns of a row of results that say what was judged, before those of the answers."""
        optional = {"category": self.category, "reference": self.reference}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"id": self.id, "turn": self.turn, **given, "question": self.question}


def _numbered(what: str, texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{what} {number}:\n{text}" for number, text in enumerate(texts, start=1))


def turn_label(id: str, turn: int, turns: int) -> str:
    """How messages and results name a turn, counted from 1: by its question's id alone if it is the only one."""
    return id if turns == 1 else f"{id} (turn {turn})"


# --- exchanges -------------------------------------------------------------------------------------------------------


def exchanges(questions: Sequence[tuple[Answered, ...]], paths: Sequence[Path]) -> tuple[list[Exchange], list[str]]:
    """The turns to judge, and the labels of those left out, because they were refused for one of the models.

    Args:
        questions: each with the answers of every model.
        paths: where these come from, for messages.

    Raises:
        UserError: if every turn was refused.
    """
    found, refused = [], []
    for answered in questions:
        first = answered[0]
        category = next((each.category for each in answered if each.category), None)
        references = next((each.references for each in answered if each.references), (None,) * len(first.turns))
        for turn in range(1, len(first.turns) + 1):
            label = turn_label(str(first.id), turn, len(first.turns))
            if any(each.refused[turn - 1] is not None for each in answered):
                refused.append(label)
                continue
            answers = tuple(each.answers[:turn] for each in answered)
            found.append(Exchange(str(first.id), first.turns[:turn], answers, category, references[turn - 1], label))
    if not found:
        raise UserError(f"Every question was refused for {' or '.join(map(str, paths))}: run `eval answers` again.")
    return found, refused


def load_answered(paths: Sequence[Path], limit: int | None = None) -> list[tuple[Answered, ...]]:
    """Each question with the models' answers to it, in the order of the first file.

    Rows are matched by `id` (or `question_id`) if every row has one, else by the text of the question; without ids, a
    question's id is its number in the first file, from 1.

    Args:
        paths: of each model, a jsonl or parquet file with `question` and `answer`, or `turns` and `answers`, the folder
            of a run of `eval answers`, or a folder that contains a single run.
        limit: number of questions to read, None for all.

    Raises:
        UserError: if a row lacks a field, a question occurs twice, or the files do not answer the same questions.
    """
    files = [_read(path) for path in paths]
    by_id = all(row.id for rows in files for row in rows)
    keyed = [
        by_key(path, [str(row.id) if by_id else "\n\n".join(row.turns) for row in rows], rows)
        for path, rows in zip(paths, files, strict=True)
    ]
    for path, other in zip(paths[1:], keyed[1:], strict=True):
        _check_same(paths[0], keyed[0], path, other)
    return [
        tuple(replace(of_model[key], id=key if by_id else str(number)) for of_model in keyed)
        for number, key in itertools.islice(enumerate(keyed[0], start=1), limit)
    ]


def _check_same(a: Path, keyed_a: dict[str, Answered], b: Path, keyed_b: dict[str, Answered]) -> None:
    single = keyed_a.keys() ^ keyed_b.keys()
    if single:
        raise UserError(
            f"{a} and {b} do not answer the same questions: {len(single)} are in only one of them, such as "
            f"{min(single)[:80]!r}. Let both models answer the same file."
        )
    for key, row in keyed_a.items():
        if row.turns != keyed_b[key].turns:
            raise UserError(
                f"{a} and {b} have different questions with the id {key}: let both models answer the same file."
            )


# --- files -----------------------------------------------------------------------------------------------------------


def answers_file(path: Path) -> Path:
    """The file of answers that a path names: itself, or that of a run or of the only run in a folder.

    Raises:
        UserError: if there is none, or there are several runs.
    """
    if not path.is_dir():
        return path
    folder = path if (path / ANSWERS).is_file() else run_folder(path, ANSWERS)
    if not (folder / ANSWERS).is_file():
        raise UserError(
            f"{path} holds no answers to compare: make them with `llamafactory-ext eval answers --output {path}`."
        )
    return folder / ANSWERS


def name_of(path: Path) -> str:
    """What a run is called that has no other name: its adapter, or the folder or file of its answers."""
    place = path.resolve()
    if place.is_file():
        place = place.parent if place.name == ANSWERS else place.with_suffix("")
    return place.parent.name if place.name == BASE else place.name


def _read(path: Path) -> list[Answered]:
    return [_answered(where, row) for where, row in read_located(answers_file(path))]


def _answered(where: str, row: Fields) -> Answered:
    has_several = row.get("question") is None and row.get("turns") is not None
    turns, answers, refused = (_of_several if has_several else _of_one)(where, row)
    references = references_of(where, row, len(turns))
    return Answered(row_id(row), tuple(turns), tuple(answers), tuple(refused), category_of(where, row), references)


def _of_one(where: str, row: Fields) -> tuple[list[str], list[str], list[str | None]]:
    if not all(isinstance(row.get(field), str) for field in ("question", "answer")):
        raise UserError(f"{where} has no text in `question` or `answer`: name a file with both.")
    return [row["question"]], [row["answer"]], [row.get("refused")]


def _of_several(where: str, row: Fields) -> tuple[list[str], list[str], list[str | None]]:
    turns, answers = row["turns"], row.get("answers") or []
    for name, texts in (("turns", turns), ("answers", answers)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} has no list of texts in `{name}`: name a file with `turns` and `answers`.")
    if len(answers) != len(turns):
        raise UserError(f"{where} has {len(turns)} turns, but {len(answers)} answers: write one per turn.")
    refused = row.get("refused") or [None] * len(turns)
    if not isinstance(refused, list) or len(refused) != len(turns):
        raise UserError(
            f"{where}: `refused` must be a list with one entry per turn, null for an answer, or be left out."
        )
    return turns, answers, refused
