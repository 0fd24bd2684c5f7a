"""Execute one command of a sweep in its own process, with a log and a record of how it ended.

Processes are forked from a server that has imported LLaMA-Factory once, because that import takes longer than a small
training (with GPUs they are spawned: the import looks at CUDA, which does not survive a fork). The process itself keeps
the record, and its log is its lock: every process that prints to it holds it, torchrun's workers included. So both stay
true even if the sweep is killed: started again, it waits for commands that are still running.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from .records import Record, Step, hold, log_file, read_record, write_record, written_record

LLAMAFACTORY, OURS = "llamafactory-cli", "llamafactory-ext"
MODULES = {LLAMAFACTORY: "llamafactory.cli", OURS: "llamafactory_ext.cli"}  # what these commands run
# What a training imports; a list of names, because this file is read where LLaMA-Factory is not to be loaded.
PRELOADED = ["llamafactory.cli", "llamafactory.launcher", "llamafactory.train.tuner", "llamafactory.train.dpo.workflow"]
INTERRUPTED = 128 + signal.SIGINT  # the exit status of a command that Ctrl-C has ended


@dataclass(frozen=True)
class Task:
    """A command.

    Args:
        name: of the cell that it belongs to.
        step: which of a cell's commands it is.
        folder: holds log and record.
        argv: the command line.
        fingerprint: a hash of everything that the results depend on; an attempt with another one does not count.
        outputs: what it writes; removed before an attempt, except checkpoints to resume from.
        resumes: outputs that it resumes from by itself; removed only if the fingerprint has changed.
        reads: folders that must be there before it can run.
        invalidates: what was made from its earlier results; removed before an attempt.
        results: files that must exist for it to be done.
    """

    name: str
    step: Step
    folder: Path
    argv: tuple[str, ...]
    fingerprint: str = ""
    outputs: tuple[Path, ...] = ()
    resumes: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()
    invalidates: tuple[Path, ...] = ()
    results: tuple[Path, ...] = ()

    @property
    def log(self) -> Path:
        return log_file(self.folder, self.step)

    def record(self) -> Record:
        """How it went. An attempt with another fingerprint, or without its results, does not count."""
        record = read_record(self.folder, self.step)
        if record.fingerprint != self.fingerprint:
            return Record("to do")
        if record.state == "done" and not all(path.exists() for path in self.results):
            return Record("to do")
        return record

    def write(self, record: Record) -> None:
        write_record(self.folder, self.step, record)


# --- in the process of the command -----------------------------------------------------------------------------------


def execute(task: Task, environment: Mapping[str, str]) -> None:
    """Run the command here, unless it is done when the log is free; ends the process with 1 if it fails."""
    os.environ.update(environment)
    _own(task.log)
    if task.record().state == "done":
        return
    with _recorded(task, resumed=prepare(task)):
        run_here(task.argv)


def _own(log: Path) -> None:
    """Wait until no process holds the log, then take it for this process and those that it starts."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        hold(file)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def prepare(task: Task) -> bool:
    """Remove what cannot be resumed from, and what was made from results that are about to be replaced.

    Returns:
        Whether something is left to resume from.
    """
    is_same = written_record(task.folder, task.step).fingerprint == task.fingerprint
    kept = [path for path in task.resumes if is_same and path.exists()]
    kept += [path for path in task.outputs if is_same and keep_checkpoints(path)]
    for path in (*task.outputs, *task.resumes, *task.invalidates):
        if path not in kept:
            remove(path)
    return bool(kept)


@contextmanager
def _recorded(task: Task, resumed: bool) -> Iterator[None]:
    start = time.monotonic()
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = Record("running", task.argv, task.fingerprint, now, resumed=resumed)
    task.write(record)
    print(f"\n{record.started} $ {' '.join(task.argv)}", flush=True)
    try:
        yield
    except KeyboardInterrupt:  # no failure: it is left as interrupted
        sys.exit(INTERRUPTED)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == INTERRUPTED:  # typer's way to say the same
            raise
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            task.write(replace(record, state="failed", error=_last_line(error), seconds=time.monotonic() - start))
            raise
    task.write(replace(record, state="done", seconds=time.monotonic() - start))


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
        except (OSError, ValueError, RecursionError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return bool(whole)


def run_here(argv: tuple[str, ...]) -> None:
    """A command line in this process where it is Python's and this interpreter's, else in another.

    Raises:
        SystemExit: as the command ends, if it says so.
    """
    program, *arguments = argv
    if program == sys.executable:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    elif program in MODULES:
        sys.argv = list(argv)
        runpy.run_module(MODULES[program], run_name="__main__")
    else:
        sys.exit(subprocess.run(argv, check=False).returncode)


# --- in the process of the sweep -------------------------------------------------------------------------------------


def start(task: Task, environment: Mapping[str, str]) -> BaseProcess:
    """Start a command in its own process."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(PRELOADED)
    process_of = multiprocessing.get_context("spawn").Process if "CUDA_VISIBLE_DEVICES" in environment else fork.Process
    process = process_of(target=execute, args=(task, dict(environment)), name=f"{task.step} {task.name}")
    with _out_of_reach_of_ctrl_c():
        process.start()
    return process


@contextmanager
def _out_of_reach_of_ctrl_c() -> Iterator[None]:
    """What is started here never hears a terminal's Ctrl-C: it is the sweep's, which ends its commands (`end`)."""
    resource_tracker.ensure_running()  # else multiprocessing starts it meanwhile, and lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(process: BaseProcess) -> None:
    """Ask a command, and everything that it has started, to end."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()


def ended(task: Task, process: BaseProcess) -> Record:
    """The record of a command whose process has ended; if it could not write one any more, it is written here."""
    status = process.exitcode or 0
    record = task.record()
    if record.state in ("done", "failed"):
        return record
    if status in (-signal.SIGTERM, -signal.SIGINT, INTERRUPTED):
        return replace(record, state="interrupted")
    error = f"ended by {f'signal {-status}' if status < 0 else f'status {status}'}"
    if status == -signal.SIGKILL:
        error += " (the system does this when memory runs out)"
    if status == 0:
        error = (
            f"ended without an error, but wrote no {task.results[0].name}" if task.results else "ended without a record"
        )
    record = Record("failed", task.argv, task.fingerprint, record.started, error=error, resumed=record.resumed)
    task.write(record)
    return record
