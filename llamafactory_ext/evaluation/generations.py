"""What a run leaves on disk: a manifest that says what it is, and one line per answer, never lost, never doubled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError
from ..manifests import first_difference
from ..whole_files import write_whole

MANIFEST, GENERATIONS = "manifest.json", "generations.jsonl"
CHUNK = 32  # answers per fsync: what a power cut may cost, never what a kill may double


@dataclass(frozen=True)
class Generation:
    """One answer of a model.

    Args:
        index: of the problem in its data.
        text: without special tokens.
        token_ids: of the answer, where the engine tells them.
        finish_reason: `stop`, or `length` at the token limit.
        refused: why the server would not take the question; there is no answer then, and `text` is empty.
        left_out: fields of the request that the model does not take, and which were left to their defaults.
    """

    index: int
    text: str
    token_ids: list[int] | None
    finish_reason: str | None
    refused: str | None = None
    left_out: tuple[str, ...] = ()


class Run:
    """A folder with the answers of one model or adapter to one set of problems; one process at a time writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / GENERATIONS
        self.lock = FileLock(folder / ".lock")

    def open(self, manifest: dict[str, Any]) -> dict[int, Generation]:
        """Begin or resume, and return what is there already.

        Raises:
            UserError: if the folder holds a run with another manifest, or another process is writing to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process writes to {self.folder}: wait for it, or name another --output."
            ) from None
        except NotImplementedError:
            raise UserError(f"{self.folder} is on a file system without locks: name an --output on another.") from None
        file = self.folder / MANIFEST
        if file.is_file():
            self._refuse_another(self.manifest(), manifest)
        else:
            write_whole(file, json.dumps(manifest, indent=2))
        self._drop_torn_line()
        done = self.read()
        self.file = self.path.open("a", encoding="utf-8")
        self.unsynced = 0
        return done

    def manifest(self) -> dict[str, Any]:
        """What the run was begun with.

        Raises:
            UserError: if that cannot be read.
        """
        file = self.folder / MANIFEST
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} cannot be read ({error}): name another --output.") from error

    def _refuse_another(self, recorded: dict[str, Any], manifest: dict[str, Any]) -> None:
        if (difference := first_difference(recorded, manifest)) is not None:
            raise UserError(f"{self.folder} holds another run: {difference}. Name another --output.")

    def _drop_torn_line(self) -> None:
        """Cut off a last line that a kill left unfinished; its problem is asked again."""
        if not self.path.is_file():
            return
        with self.path.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    def append(self, generation: Generation) -> None:
        """Add one answer: handed to the operating system at once, which keeps it if this process is killed."""
        self.file.write(json.dumps(asdict(generation)) + "\n")
        self.file.flush()
        self.unsynced += 1
        if self.unsynced >= CHUNK:
            os.fsync(self.file.fileno())
            self.unsynced = 0

    def refuse_others(self, answers: Iterable[int], count: int) -> None:
        """
        Raises:
            UserError: if there is an answer to none of the problems, whose indices begin with 0.
        """
        unknown = [index for index in answers if index >= count]
        if unknown:
            raise UserError(f"{self.path} answers a problem {unknown[0]}, which there is not: remove that line.")

    def read(self) -> dict[int, Generation]:
        """The answers by problem; a torn last line is left out.

        Raises:
            UserError: if a line that is not the last is damaged.
        """
        if not self.path.is_file():
            return {}
        found = {}
        *lines, _ = self.path.read_bytes().split(
            b"\n"
        )  # and nothing else: an answer may hold what str takes for a line end
        for number, line in enumerate(lines, start=1):
            try:
                generation = _generation(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise UserError(f"{self.path}, line {number} is damaged ({error}): remove it and resume.") from error
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
    """A line's answer; what a later release has added to it is left out.

    Raises:
        ValueError, TypeError, KeyError: if it is none.
    """
    known = {field.name: fields[field.name] for field in dataclass_fields(Generation) if field.name in fields}
    generation = Generation(**{**known, "left_out": tuple(known.get("left_out", ()))})
    if type(generation.index) is not int or generation.index < 0 or not isinstance(generation.text, str):
        raise ValueError("its index is no whole number, or its text no text")
    ids = generation.token_ids
    if ids is not None and not (isinstance(ids, list) and all(type(each) is int for each in ids)):
        raise ValueError("its token_ids are no whole numbers")
    return generation


def run_folder(folder: Path, file: str) -> Path:
    """The folder of a run: the one named, unless it is only the --output that holds a single run's folder.

    Raises:
        UserError: if several do.
    """
    inner = sorted(path.parent for path in folder.glob(f"*/{file}"))
    if not inner or (folder / GENERATIONS).is_file():
        return folder
    if len(inner) > 1:
        raise UserError(f"{folder} holds several runs: name one, such as {inner[0]}.")
    return inner[0]
