"""What the files of a sweep hold, as far as somebody reads it back: a changed value is named before it is used."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from ..errors import UserError

LARGEST = 1e100  # beyond it, no figure can be drawn


class Cell(BaseModel):
    name: str
    place: dict[str, Any] = {}
    fingerprints: dict[str, str]


class Base(BaseModel):
    name: str
    fingerprints: dict[str, str]


class Asked(BaseModel):
    axes: list[dict[str, Any]] | dict[str, Any]
    evaluators: dict[str, Any] = {}  # earlier releases wrote none


class Chosen(BaseModel):
    key: str
    of: str
    by: str
    place: dict[str, Any]
    value: Any
    measured: dict[str, FiniteFloat]


class About(BaseModel):
    """sweep.json."""

    sweep: Asked
    cells: Annotated[list[Cell], Field(min_length=1)]
    bases: list[Base]
    data: dict[str, str] = {}
    entries: dict[str, str] = {}
    named: dict[str, Any] = {}
    chosen: list[Chosen] = []
    notes: list[str] = []


class Tier(BaseModel):
    accuracy: FiniteFloat
    wilson_95: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class Degeneration(BaseModel):
    degenerate: FiniteFloat


class Scored(BaseModel):
    problems: int
    strict: Tier
    flexible: Tier
    degeneration: Degeneration


class Verdict(BaseModel):
    correct: bool


class Answer(BaseModel):
    index: int
    strict: Verdict


class Scores(BaseModel):
    """A run's results.json of gsm8k.py."""

    extractor: str = "1"
    summary: Scored
    rows: list[Answer]


class Rate(BaseModel):
    count: int
    rate: FiniteFloat
    wilson_95: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class Judged(BaseModel):
    a: str
    b: str
    judge: str
    questions: int
    turns: int
    judged: int
    win: Rate
    tie: Rate
    lose: Rate
    sign_test_p: FiniteFloat


class Outcome(BaseModel):
    id: str
    turn: int = 1
    category: str | None = None
    outcome: Literal["win", "tie", "lose"] | None


class Judgments(BaseModel):
    """results.json of `eval judge`."""

    summary: Judged
    rows: list[Outcome]


class Trained(BaseModel):
    """train_results.json of transformers."""

    train_runtime: FiniteFloat


class State(BaseModel):
    """trainer_state.json of transformers."""

    log_history: list[dict[str, Any]]


def check(found: Any, shape: Any, path: Path) -> None:
    """
    Raises:
        UserError: if what a file holds has not its shape.
    """
    try:
        _adapter(shape).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise damaged(path, f"{place}: {first['msg']}") from error


def check_logs(logs: list[dict[str, Any]], path: Path) -> None:
    """Refuse logs without a step, and metrics that no figure can show.

    Raises:
        UserError: likewise.
    """
    for number, log in enumerate(logs):
        metrics = {key: value for key, value in log.items() if "/" in key or key in ("loss", "grad_norm")}
        wrong = [key for key, value in metrics.items() if not _is_drawable(value)]
        if type(log.get("step")) is not int or wrong:
            raise damaged(
                path, f"log_history.{number}: {', '.join(wrong) or 'step'} is not a number that a figure can show"
            )


def _is_drawable(value: Any) -> bool:
    return isinstance(value, int | float) and not LARGEST < abs(value) < float("inf")


def damaged(path: Path, what: str = "") -> UserError:
    """The error of a file that somebody has changed or cut."""
    detail = f" ({what})" if what else ""
    return UserError(
        f"{path} is damaged{detail}: remove it, then run `llamafactory-ext sweep` again to write a new one."
    )


@functools.cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
