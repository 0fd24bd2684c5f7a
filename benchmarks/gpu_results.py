"""What the stages of `benchmarks/gpu.py` find: lines of results.jsonl, and a table of them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ITSELF = "the stage itself"  # the name of the row that says how a stage ended
COLUMNS = {"stage": 10, "what": 52, "value": 30, "goal": 14, "": 6}  # with their widths at most
FULL = (errno.ENOSPC, errno.EDQUOT)


class NoSpaceError(OSError):
    """Results cannot be written any more, so that measuring is in vain."""

    def __init__(self, results: Path) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), str(results))


@dataclass(frozen=True)
class Recorder:
    """Appends what a stage finds to a file, a line each, whole as soon as it is known.

    Args:
        about: what each line says besides: when, with what and on what.
        folder: where the stage writes what is no result.
    """

    stage: str
    results: Path
    about: dict[str, Any]
    folder: Path | None = None

    def __call__(
        self, what: str, value: Any, unit: str = "", *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """A number, or words, under a name that is its own in the stage; met or missed where there is a goal.

        Raises:
            NoSpaceError: if the disk is full.
        """
        met, goal = None, None
        if at_most is not None:
            met, goal = bool(value <= at_most), f"at most {at_most:g}"
        if at_least is not None:
            met, goal = bool(value >= at_least), f"at least {at_least:g}"
        self._append(what, value, unit, goal, met)

    def failed(self, what: str, problem: str) -> None:
        """A part of the stage, or the stage itself, that failed."""
        self._append(what, problem, "", None, False)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """A part of the stage, whose error is its result: time on a GPU is too rare to lose what comes after."""
        try:
            yield
        except NoSpaceError:
            raise
        except Exception as error:
            traceback.print_exc()
            self.failed(what, in_words(error, self.folder))

    def _append(self, what: str, value: Any, unit: str, goal: str | None, met: bool | None) -> None:
        row = {"stage": self.stage, "what": what, "value": value, "unit": unit, "goal": goal, "met": met, **self.about}
        line = json.dumps(row)
        try:
            with self.results.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise (NoSpaceError(self.results) if error.errno in FULL else error) from None


def in_words(error: Exception, folder: Path | None = None) -> str:
    """What went wrong, on one line; where, if the error does not say it, in `folder`."""
    first, *_ = [*str(error).splitlines(), ""]
    named = getattr(error, "filename", None) or folder
    where = f" ({named})" if named else ""
    # The libraries that write weights have errors of their own.
    if getattr(error, "errno", None) in FULL or "No space left on device" in first:
        return f"no space is left on the device{where}"
    is_of_system = isinstance(error, OSError) and error.strerror
    return f"{error.strerror}{where}" if is_of_system else f"{type(error).__name__}: {first}"


@contextmanager
def alone(results: Path) -> Iterator[None]:
    """Make the file of results, whole lines in it, and keep other runs from it.

    Raises:
        ValueError: if another run writes into it.
    """
    with results.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes into {results}: name another folder with --output.") from None
        whole_lines(results)
        yield


def whole_lines(results: Path) -> None:
    """End a line that was cut off, so that it spoils no other.

    Raises:
        NoSpaceError: if the disk is full.
    """
    content = results.read_bytes()
    if content and not content.endswith(b"\n"):
        try:
            with results.open("ab") as file:
                file.write(b"\n")
        except OSError as error:
            raise (NoSpaceError(results) if error.errno in FULL else error) from None


def read(results: Path, start: int = 0) -> list[dict[str, Any]]:
    """The rows from a byte on, of several measurements of the same the latest."""
    return list({(row["stage"], row["what"]): row for row in parsed(results.read_bytes()[start:])}.values())


def parsed(content: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a file; what is no row of ours is left out."""
    for line in content.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
            words = row["stage"], row["what"], row["unit"]
            is_ours = all(isinstance(word, str) for word in words) and row["met"] in (True, False, None)
            if is_ours and {"value", "goal"} <= row.keys():
                yield row
        except (ValueError, TypeError, KeyError, RecursionError):
            continue


def show(results: Path, start: int) -> int:
    """Print the rows from a byte on, and return the byte after the last whole line."""
    content = results.read_bytes()[start:]
    end = content.rfind(b"\n") + 1
    for row in parsed(content[:end]):
        print("  " + "  ".join(cell for cell in cells(row)[1:] if cell))
    return start + end


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the table: stage, what, value with its unit, goal, and whether that is met."""
    mark = {True: "met", False: "missed" if row["goal"] else "failed", None: ""}[row["met"]]
    value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
    words = (row["stage"], row["what"], f"{value} {row['unit']}".strip(), str(row["goal"] or ""))
    return (*map(printable, words), mark)


def printable(text: str) -> str:
    """Text that no terminal takes for a command: line ends, escapes and halves of characters by their numbers."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows below each other, in columns; a cell that is too wide goes on in the next line."""
    lines = [tuple(COLUMNS), *map(cells, rows)]
    longest = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = [min(each, most) for each, most in zip(longest, COLUMNS.values(), strict=True)]
    ruled = [*lines[:1], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join(text for line in ruled for text in _wrapped(line, widths))


def _wrapped(line: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    columns = [textwrap.wrap(cell, max(width, 1)) for cell, width in zip(line, widths, strict=True)]
    for parts in zip_longest(*columns, fillvalue=""):
        yield "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
