"""Loss files on a board: which of them it reads, and what they register, found out without running them in its process.

A board's page sends paths, and whoever reaches the board can send any, and upload files, too. So a loss file is read
only from folders that were named when the board was started, and in a process of its own with a time limit. What it
registers comes back as a description; the board then has losses that say everything and compute nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..losses import lookup
from ..losses.registry import FLAGS, Loss
from .errors import BoardError

FOLDERS = "LLAMAFACTORY_EXT_LOSS_FOLDERS"  # as PATH is written
SECONDS = 60  # to import torch takes a third of it on a busy machine
READ = "from llamafactory_ext.webui.loss_files import describe; describe()"
KNOWN = 100  # files, the latest; a board that runs for months forgets the others


@dataclass(frozen=True)
class Contents:
    """What a file registers, or what is wrong with it, which state of the file this was, and when its reading began."""

    state: tuple[int, ...]
    begun: float
    losses: tuple[Loss, ...] = ()
    error: str | None = None


class LossFiles:
    """The loss files of one board.

    Args:
        demo_mode: whether the board is LLaMA-Factory's demo, which trains nothing.
    """

    def __init__(self, demo_mode: bool) -> None:
        self.demo_mode = demo_mode
        self.known: dict[Path, Contents] = {}
        self._lock = threading.Lock()
        self._locks: dict[Path, tuple[threading.Lock, int]] = {}  # of files, with how many read them or wait

    def read(self, path: Any, again: bool = False) -> None:
        """Find out what a file registers, which may take `SECONDS`. What is wrong is kept, too.

        Args:
            path: what a page has sent.
            again: whether to read a file that has not changed since, as what it imports may have.
        """
        file = self._allowed(path) if isinstance(path, str) and path else None
        if file is None or not file.is_file():
            return
        asked = time.monotonic()
        with self._reading(file):
            known, state = self.known.get(file), _state(file)
            # Of several events that wait for one file, the first one reads it for all.
            is_new = known is not None and known.state == state and (not again or known.begun > asked)
            if not is_new:
                contents = Contents(state, time.monotonic(), *_contents(file))
                self.known.pop(file, None)  # it is the latest now
                self.known[file] = contents
        for oldest in list(self.known)[:-KNOWN]:
            self.known.pop(oldest, None)  # another page's event may have been faster

    @contextlib.contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        with self._lock:
            lock, waiting = self._locks.get(file, (threading.Lock(), 0))
            self._locks[file] = lock, waiting + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, waiting = self._locks.pop(file)
                if waiting > 1:
                    self._locks[file] = lock, waiting - 1

    def load(self, path: str) -> None:
        """Register what is known of a file, in place of `registry`'s running it.

        Raises:
            ValueError: if the file may not be read, has not been read, or something is wrong with it.
        """
        file = self._allowed(path)
        if file is None:
            raise BoardError("demo" if self.demo_mode else "forbidden", file=repr(path), variable=FOLDERS)
        if not file.is_file():
            raise BoardError("no_file", file=repr(path), full=str(file))
        contents = self.known.get(file)
        if contents is None or contents.state != _state(file):
            raise BoardError("unread", file=repr(path))
        if contents.error is not None:
            raise ValueError(contents.error.replace(repr(str(file)), repr(path)))  # as it was written
        lookup.add(contents.losses)

    def _allowed(self, path: str) -> Path | None:
        """The file of a path, symbolic links resolved, if it may be read.

        Where it may not, nothing is said of it: neither where links lead, nor whether there is such a user.
        """
        if self.demo_mode:
            return None
        try:
            file = lookup.loss_file(path)
        except ValueError:
            return None
        folders = [Path(name).resolve() for name in os.environ.get(FOLDERS, "").split(os.pathsep) if name]
        is_allowed = any(file.is_relative_to(folder) for folder in folders)
        return file if is_allowed and not _is_upload(file) else None


def _is_upload(file: Path) -> bool:
    from gradio.utils import get_upload_folder

    return file.is_relative_to(Path(get_upload_folder()).resolve())


def _state(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


# --- in a process of its own ------------------------------------------------------------------------------------------


def _contents(file: Path) -> tuple[tuple[Loss, ...], str | None]:
    # -P: the working directory is not a place to import from in trainings, either.
    command = [sys.executable, "-P", "-c", READ, str(file)]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, encoding="utf-8", errors="replace") as process:
        try:
            described, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            _end(process.pid)
            remedy = "remove what it waits for and any processes that it leaves running"
            return (), f"pref_loss_file {str(file)!r} did not finish its import in {SECONDS} s: {remedy}."
    try:
        found = json.loads(described)
        return tuple(map(_stand_in, found.get("losses", ()))), found.get("error")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # a file may write there, too
        return (), f"pref_loss_file {str(file)!r} ended the process that imported it: remove the call that exits."


def _end(pid: int) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def describe() -> None:
    """Run the file that the command line names, and print what it registers as JSON, apart from what it prints."""
    answer, process = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.getpid()
    os.dup2(2, 1)
    try:
        names = lookup.load_loss_file(sys.argv[1])
        found: dict[str, Any] = {"losses": [_description(lookup.get_loss(name)) for name in names]}
    except ValueError as error:
        found = {"error": str(error)}
    except Exception as error:  # a default may be anything, and fail when it is shown
        found = {"error": f"pref_loss_file {sys.argv[1]!r} cannot be shown: {type(error).__name__}: {error}"}
    if os.getpid() != process:  # the file has forked: one process answers
        os._exit(0)
    with answer:
        json.dump(found, answer)


def _description(loss: Loss) -> dict[str, Any]:
    parameters = [
        {"name": name, "annotation": _named(parameter.annotation)}
        | ({} if parameter.default is parameter.empty else {"default": _plain(parameter.default)})
        for name, parameter in loss.parameters.items()
    ]
    return {
        "name": loss.name,
        **{flag: getattr(loss, flag) for flag in FLAGS},
        "description": inspect.getdoc(loss.function),
        "parameters": parameters,
    }


def _named(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _plain(default: Any) -> Any:
    return default if isinstance(default, (bool, int, float, str, type(None))) else str(default)


def _stand_in(described: dict[str, Any]) -> Loss:
    """A loss of which everything is known but how to compute it."""

    def function(pairs: Any, **hyperparameters: Any) -> Any:
        raise NotImplementedError("a board computes no loss")

    pairs = inspect.Parameter("pairs", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    function.__signature__ = inspect.Signature([pairs, *_parameters(described["parameters"])])  # type: ignore[attr-defined]
    function.__doc__ = described["description"]
    return Loss(described["name"], function, metrics=None, **{flag: described[flag] for flag in FLAGS})


def _parameters(described: Iterable[dict[str, Any]]) -> list[inspect.Parameter]:
    empty, kind = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(each["name"], kind, default=each.get("default", empty), annotation=each["annotation"])
        for each in described
    ]
