"""The files of a run: a manifest of what the answers depend on, and one line per answer, never lost or duplicated."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from ..errors import UserError
from ..resuming import first_difference, take
from ..whole_files import write_whole

MANIFEST, GENERATIONS = "manifest.json", "generations.jsonl"
CHUNK = 32  # answers per fsync: at most this many are lost in a power cut, none if the process is killed


@dataclass(frozen=True)
class Generation:
    """One answer of a model.

    Args:
        index: of the problem in its data, from 0.
        text: the answer without special tokens.
        token_ids: the answer's tokens, if the engine returns them.
        finish_reason: `stop`, or `length` at the token limit.
        refused: why the server refused the question; `text` is empty then.
        left_out: fields of the request that the server does not accept, so that its defaults applied.
    """

    index: int
    text: str
    token_ids: list[int] | None
    finish_reason: str | None
    refused: str | None = None
    left_out: tuple[str, ...] = ()


class Run:
    """A folder with the answers of one model or adapter to one set of problems; one process writes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / GENERATIONS
        self.lock = FileLock(folder / ".lock")

    def open(self, manifest: dict[str, Any]) -> dict[int, Generation]:
        """Start or resume the run, and return the saved answers by problem.

        Raises:
            UserError: if the folder belongs to a run with another manifest, or another process is writing to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        take(self.lock, self.folder)
        claim(self.folder, manifest)
        self._drop_torn_line()
        done = self.read()
        self.file = self.path.open("a", encoding="utf-8")
        self.unsynced = 0
        return done

    def manifest(self) -> dict[str, Any]:
        """The manifest that the run was started with.

        Raises:
            UserError: if it cannot be read.
        """
        return _read_manifest(self.folder / MANIFEST)

    def _drop_torn_line(self) -> None:
        """Remove an incomplete last line, left by a killed process; its problem is asked again."""
        if not self.path.is_file():
            return
        with self.path.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    def append(self, generation: Generation, **columns: Any) -> None:
        """Save one answer with further columns: written to the operating system at once, so that it survives if this
        process is killed."""
        self.file.write(json.dumps({**asdict(generation), **columns}) + "\n")
        self.file.flush()
        self.unsynced += 1
        if self.unsynced >= CHUNK:
            os.fsync(self.file.fileno())
            self.unsynced = 0

    def refuse_others(self, answers: Iterable[int], count: int) -> None:
        """Refuse answers to unknown problems.

        Raises:
            UserError: if an index is not below `count`, the number of problems.
        """
        unknown = [index for index in answers if index >= count]
        if unknown:
            raise UserError(
                f"{self.path} has an answer to problem {unknown[0]}, which does not exist: remove that line."
            )

    def read(self) -> dict[int, Generation]:
        """The saved answers by problem, in the order in which they were saved, without an incomplete last line.

        Raises:
            UserError: if a complete line is damaged.
        """
        if not self.path.is_file():
            return {}
        found: dict[int, Generation] = {}
        # Not `splitlines`: an answer may contain other characters that str counts as line ends.
        *lines, _ = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                generation = _generation(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{self.path}, line {number} is damaged ({error}): remove it, then run the same command to resume."
                ) from error
            found.pop(generation.index, None)  # asked again: its place is that of its last answer
            found[generation.index] = generation
        return found

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "file"):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        self.lock.release()


def _generation(fields: dict[str, Any]) -> Generation:
    """The answer in a line; other columns are ignored: those beside the answer, and those that a later release adds.

    Raises:
        ValueError, TypeError, KeyError: if it is not an answer.
    """
    known = {field.name: fields[field.name] for field in dataclass_fields(Generation) if field.name in fields}
    generation = Generation(**{**known, "left_out": tuple(known.get("left_out", ()))})
    if type(generation.index) is not int or generation.index < 0 or not isinstance(generation.text, str):
        raise ValueError("its index is not a whole number, or its text is not text")
    ids = generation.token_ids
    if ids is not None and not (isinstance(ids, list) and all(type(each) is int for each in ids)):
        raise ValueError("its token_ids are not whole numbers")
    return generation


def claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Start a run in a folder, or go on with the one that is there.

    Raises:
        UserError: if the folder belongs to a run with another manifest.
    """
    file = folder / MANIFEST
    if not file.is_file():
        write_whole(file, json.dumps(manifest, indent=2))
    elif (difference := first_difference(_read_manifest(file), manifest)) is not None:
        raise UserError(f"{folder} belongs to another run: {difference}. Choose another --output.")


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): choose another --output.") from error


def run_folder(folder: Path, file: str) -> Path:
    """The folder of a run: `folder` itself, or the single run in it that has `file`.

    Raises:
        UserError: if it contains several runs.
    """
    inner = sorted(path.parent for path in folder.glob(f"*/{file}"))
    if not inner or (folder / GENERATIONS).is_file():
        return folder
    if len(inner) > 1:
        raise UserError(f"{folder} contains several runs: name one, such as {inner[0]}.")
    return inner[0]
