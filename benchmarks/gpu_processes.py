"""Processes of `benchmarks/gpu.py`, and folders for them: they end with it, however it ends.

python benchmarks/gpu_processes.py PARENT MODULE [ARGUMENT ...]    # `python -m MODULE ...` while process PARENT lives
"""

from __future__ import annotations

import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PREFIX = "llamafactory-ext-gpu-"  # of folders, before the process that made them

_arrived: list[int] = []


class SignalError(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal_name(number)}")
        self.number = number


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # those for real time have no names
        return f"signal {number}"


@contextmanager
def noting_signals() -> Iterator[None]:
    """Ctrl-C and its like end what `run` waits for, and interrupt nothing else: cleaning up is never left undone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as of nohup
            signal.signal(number, lambda number, frame: _arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _arrived.clear()


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module in a process that ends with this one."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), str(os.getpid()), name, *arguments]


def run(
    command: list[str],
    output: IO[Any],
    environment: Mapping[str, str] | None = None,
    seconds: float = math.inf,
    meanwhile: Callable[[], None] = lambda: None,
) -> int | None:
    """Run a command in a process group of its own, which ends with it.

    Args:
        output: a file for what it prints.
        seconds: that it may take.
        meanwhile: is called every 0.2 s.

    Returns:
        its status, the negative number of a signal that ended it, or None if its time was up.

    Raises:
        SignalError: if a signal arrives.
    """
    deadline = time.monotonic() + seconds
    said_to, nothing = {"stdout": output, "stderr": subprocess.STDOUT}, subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nothing, **said_to, env=environment, process_group=0)
    try:
        while (status := process.poll()) is None and time.monotonic() < deadline and not _arrived:
            meanwhile()
            time.sleep(0.2)
        if _arrived:
            raise SignalError(_arrived[0])
        return status
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_line(text: str) -> str:
    """The last line that says something; steps of a training and results, in braces, say nothing of how it ended."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("{")), "no output")


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for the time of a with block; if this run is killed, `remove_leftovers` of the next."""
    prefix = f"{PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def remove_leftovers(*parents: Path) -> None:
    """Remove the folders of processes that are no more."""
    for folder in (folder for parent in parents for folder in parent.glob(f"{PREFIX}*")):
        made_by = folder.name.removeprefix(PREFIX).split("-")[0]
        if made_by == str(os.getpid()) or not Path("/proc", made_by).is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _end_with(parent: int) -> None:
    """End this process group with its parent, which a signal that nobody can catch may end."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    parent, name, *arguments = sys.argv[1:]
    threading.Thread(target=_end_with, args=[int(parent)], daemon=True).start()
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
