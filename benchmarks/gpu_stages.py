"""The stages of `benchmarks/gpu.py`, and the running of one, in a process of its own with a time limit."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_processes import last_line, module, own_folder, remove_leftovers, run, signal_name
from gpu_results import NoSpaceError, show, whole_lines

# Where stages keep models if there is room: 15 GB of weights are written and read faster in memory.
MEMORY, ROOM = Path("/dev/shm"), 40e9  # bytes
NO_GPU = "there is no GPU that torch can use: write --rehearse to run on the CPU."
NO_SPACE = 74  # the status of a stage that could not write a result, which sysexits.h calls EX_IOERR


@dataclass(frozen=True)
class Stage:
    """A module `gpu_<name>` with a function `measure`, and the seconds that it may take on a GPU."""

    name: str
    seconds: int
    about: str


STAGES = (
    Stage("paths", 120, "every way of training, with tiny models, beside stock or another way"),
    Stage("large", 180, "Qwen1.5-7B's shape: pairs a second and memory beside stock"),
    Stage("small", 120, "Qwen2.5-0.5B's and 1.5B's shapes, in full"),
    Stage("attention", 45, "tries beside a row per answer, and which kernels run"),
    Stage("study", 75, "DPO and MinorDPO at a learning rate that is too high, watched"),
)


def remove_models() -> None:
    """Remove the models of runs that were killed."""
    remove_leftovers(MEMORY, Path(tempfile.gettempdir()))


def run_stage(
    stage: Stage, results: Path, environment: Mapping[str, str], rehearse: bool, seconds: float = math.inf
) -> str | None:
    """Run a stage and print what it finds, in `seconds` at most.

    Returns:
        what was wrong in words, or None.

    Raises:
        SignalError: if a signal arrives.
        NoSpaceError: if the results' disk is full.
    """
    whole_lines(results)
    log, shown = results.with_name(f"{stage.name}.log"), results.stat().st_size

    def go_on_showing() -> None:
        nonlocal shown
        shown = show(results, shown)

    is_there = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    parent = MEMORY if is_there and not rehearse else Path(tempfile.gettempdir())
    with log.open("w", encoding="utf-8") as file, own_folder(parent) as folder:
        command = module("gpu_worker", stage.name, str(results), str(folder), *(["--rehearse"] if rehearse else []))
        status = run(command, file, environment, seconds, go_on_showing)
    go_on_showing()
    if status is None:
        return f"stopped after {seconds:.0f} s"
    if status == NO_SPACE:
        raise NoSpaceError(results)
    return None if status == 0 else f"{_ending(status, log)} ({log})"


def _ending(status: int, log: Path) -> str:
    if status < 0:
        name = signal_name(-status)
        return f"killed by {name}{': out of memory?' if name == 'SIGKILL' else ''}"
    return f"ended with status {status}: {last_line(log.read_text(encoding='utf-8', errors='replace'))}"
