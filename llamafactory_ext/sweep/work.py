"""One command of a sweep: carried out in a process of its own, with a log and a record of how it ended.

Processes are forked from a server that has imported LLaMA-Factory once, because that import takes longer than a small
training. The process itself holds the lock and keeps the record, so that both are right whatever becomes of the sweep
that started it: killed, and begun again, a sweep waits for a training that still goes on and takes its result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ..pairs.files import whole_file

Step = Literal["train", "score", "pairs"]
STEPS: tuple[Step, ...] = ("train", "score", "pairs")
State = Literal["to do", "running", "done", "failed", "interrupted"]

LLAMAFACTORY, OURS = "llamafactory-cli", "llamafactory-ext"
# What a training imports; a list of names, because this file is read where LLaMA-Factory is not to be loaded.
PRELOADED = ["llamafactory.cli", "llamafactory.launcher", "llamafactory.train.tuner", "llamafactory.train.dpo.workflow"]


@dataclass(frozen=True)
class Record:
    """How a command went: `to do` where it has not begun, `interrupted` where its process is gone without a word.

    Args:
        seconds: of the last attempt, None until it has ended.
        error: the last line of a failure.
        started: of the last attempt, in UTC.
    """

    state: State
    command: tuple[str, ...] = ()
    started: str | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Task:
    """A command.

    Args:
        name: of the cell that it belongs to.
        step: `train`, `score` (problems) or `pairs` (held-out pairs).
        folder: holds lock, log and record.
        words: the command line.
        fresh: a folder or file that is removed before an attempt, unless it holds checkpoints: left by one that was
            killed before it could say that it was done.
    """

    name: str
    step: Step
    folder: Path
    words: tuple[str, ...]
    fresh: Path | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.step}.log"

    @property
    def lock(self) -> FileLock:
        return FileLock(_lock_file(self.folder, self.step))

    def record(self) -> Record:
        """How it went; that of another command line, from before the sweep's file was changed, does not count."""
        record = read_record(self.folder, self.step)
        return record if record.command == self.words else Record("to do")

    def write(self, record: Record) -> None:
        with whole_file(_record_file(self.folder, self.step)) as file:
            json.dump(asdict(record), file, indent=1)


def read_record(folder: Path, step: Step) -> Record:
    """What the last command of this step in a folder has recorded."""
    file = _record_file(folder, step)
    if not file.is_file():
        return Record("to do")
    written = json.loads(file.read_text(encoding="utf-8"))
    record = Record(**written | {"command": tuple(written["command"])})
    if record.state == "running" and not _is_locked(_lock_file(folder, step)):
        return replace(record, state="interrupted")
    return record


def _record_file(folder: Path, step: Step) -> Path:
    return folder / f"{step}.json"


def _lock_file(folder: Path, step: Step) -> Path:
    return folder / f".{step}.lock"


def _is_locked(file: Path) -> bool:
    try:
        with FileLock(file).acquire(timeout=0):
            return False
    except Timeout:
        return True


# --- in the process of the command -----------------------------------------------------------------------------------


def carry_out(task: Task, environment: Mapping[str, str]) -> None:
    """Run the command here, unless it is done when the lock is free; ends the process with 1 if it fails."""
    os.environ.update(environment)
    _write_to(task.log)
    with task.lock:
        if task.record().state == "done":
            return
        if task.fresh is not None and not keep_checkpoints(task.fresh):
            remove(task.fresh)
        with _recorded(task):
            run_here(task.words)


def _write_to(log: Path) -> None:
    """From here on, everything that this process and those that it starts print goes to the end of the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


@contextmanager
def _recorded(task: Task) -> Iterator[None]:
    begun = time.monotonic()
    record = Record("running", task.words, datetime.now(UTC).isoformat(timespec="seconds"))
    task.write(record)
    print(f"\n{record.started} $ {' '.join(task.words)}", flush=True)
    try:
        yield
    except KeyboardInterrupt:  # not a failure: it is left as interrupted
        raise
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            ended = replace(record, state="failed", error=_last_line(error), seconds=time.monotonic() - begun)
            task.write(ended)
            raise
    task.write(replace(record, state="done", seconds=time.monotonic() - begun))


def _last_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"ended with status {error.code}"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_checkpoints(folder: Path) -> bool:
    """Remove checkpoints that a kill cut off; whether one is left to resume from.

    transformers writes a checkpoint's trainer_state.json last.
    """
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append(checkpoint)
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return bool(whole)


def run_here(words: tuple[str, ...]) -> None:
    """A command line in this process where it is Python's and this interpreter's, else in another.

    Raises:
        SystemExit: as the command ends, if it says so.
    """
    program, *arguments = words
    if program == sys.executable:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    elif program in (LLAMAFACTORY, OURS):
        sys.argv = list(words)
        _entry(program)()
    else:
        sys.exit(subprocess.run(words, check=False).returncode)


def _entry(program: str) -> Callable[[], None]:
    if program == OURS:
        from ..cli import main

        return main
    from llamafactory.cli import main as llamafactory

    return llamafactory


# --- in the process of the sweep -------------------------------------------------------------------------------------


def start(task: Task, environment: Mapping[str, str]) -> BaseProcess:
    """Begin a command in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=carry_out, args=(task, dict(environment)), name=f"{task.step} {task.name}")
    process.start()
    return process


def ended(task: Task, process: BaseProcess) -> Record:
    """How a command whose process is gone has gone."""
    record = task.record()
    if record.state in ("to do", "interrupted"):
        status = process.exitcode or 0
        how = f"signal {-status}" if status < 0 else f"status {status}"
        hint = " (9 is what the system sends when memory is short)" if status == -9 else ""
        record = replace(record, state="failed", error=f"ended by {how}{hint}", command=task.words)
        task.write(record)
    return record
