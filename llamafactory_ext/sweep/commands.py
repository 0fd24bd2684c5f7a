"""`llamafactory-ext sweep`."""

from __future__ import annotations

import fnmatch
import signal
import sys
import time
from collections.abc import Sequence
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .check import check
from .display import Display, console, show_plan, show_results
from .records import check_locks
from .spec import Cell, read_sweep
from .tasks import Agenda, write_recipes, write_sweep
from .work import Task

Opt = typer.Option


class Launcher(StrEnum):
    local = "local"
    slurm = "slurm"
    ray = "ray"


class Part(Enum):
    """What of a sweep is run: trainings; what belongs to single cells; what they share; all of it."""

    train = "train"
    apart = "apart"
    shared = "shared"
    all = "all"


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file.", metavar="SWEEP.yaml")],
    only: Annotated[list[str] | None, Opt(help="Only cells whose name fits this pattern, like 'minor_dpo-*'.")] = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Show cells, steps and time, and run nothing.")] = False,
    rerun_failed: Annotated[bool, Opt("--rerun-failed", help="Try failed cells again.")] = False,
    train_only: Annotated[bool, Opt("--train-only", help="Score nothing; the same without it does.")] = False,
    apart: Annotated[bool, Opt("--apart", hidden=True, help="Only what belongs to one cell: a cluster's job.")] = False,
    shared: Annotated[bool, Opt("--shared", hidden=True, help="Only what cells share: a cluster's last job.")] = False,
    launcher: Annotated[Launcher, Opt(help="Here, or a cluster job per cell (pip install submitit; ray[default]).")] = (
        Launcher.local
    ),
) -> None:
    """Train and score a grid of recipes. Interrupted, even by kill -9, the same command goes on.

    llamafactory-ext sweep examples/metamath_qwen1.5_7b/sweep.yaml --dry-run

    llamafactory-ext sweep examples/metamath_qwen1.5_7b/sweep.yaml --only 'minor_dpo-*' --rerun-failed

    The file: `recipe` (a path, or keys), `axes` (a list of values per key, or several such grids), `output` (a folder),
    and if you like `evaluation` (`data`, `engine`, `python`, `options` of evaluation/gsm8k.py, `base`), `held_out`
    (`dataset`, `max_samples`: pairs to score), `gpus_per_cell`, `at_once` (cells at a time without GPUs), `launcher`
    (parameters of submitit's AutoExecutor, like timeout_min, or of Ray's client). Keys that a cell's loss does not take
    are left out of it.
    Each cell has a folder with recipe, logs, model and scores; `llamafactory-ext report OUTPUT` makes a page of all.
    Ends with 0 if all is trained, 1 if a command has failed or is not done, 2 if the file is wrong.
    """
    if not dry_run:
        check_locks()
    asked = read_sweep(file)
    agenda = Agenda(asked, asked.cells())
    cells = _chosen(agenda.cells, only or [])
    with console.status("reading the recipes"):
        steps = check(asked, cells)
    show_plan(agenda, cells, steps)
    if dry_run:
        return
    write_recipes(agenda, cells)
    write_sweep(agenda, file)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running commands are ended
    if launcher is Launcher.local:
        flags = {Part.train: train_only, Part.apart: apart, Part.shared: shared}
        _run_here(agenda, cells, rerun_failed, next((part for part, given in flags.items() if given), Part.all))
    else:
        _submit(launcher, agenda, file, cells, rerun_failed, train_only)
    if not show_results(agenda, cells):
        raise typer.Exit(1)


def _chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    chosen = [c for c in cells if not patterns or any(fnmatch.fnmatchcase(c.name, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(f"no cell's name fits {' or '.join(patterns)}: they are {', '.join(c.name for c in cells)}.")
    return chosen


def _run_here(agenda: Agenda, cells: Sequence[Cell], rerun_failed: bool, part: Part) -> None:
    from .run import Runner, slots

    chains = {
        Part.train: [[agenda.train_task(cell)] for cell in cells],
        Part.apart: [agenda.cell_tasks(cell) for cell in cells],
        Part.shared: [[task] for task in agenda.base_tasks(cells)],
        Part.all: agenda.chains(cells),
    }
    wait_for_earlier([task for chain in chains[part] for task in chain])
    with Display() as display:
        runner = Runner(slots(agenda.sweep), rerun_failed, display.report)
        display.run(runner, chains[part])
        if part in (Part.all, Part.shared):
            display.run(runner, [[task] for task in agenda.adapter_tasks(agenda.trained(cells))])


def wait_for_earlier(tasks: Sequence[Task]) -> None:
    """Wait for commands that outlived an earlier sweep: they may hold the very GPU that a new one would be given."""
    with console.status("") as status:
        while going := [task for task in tasks if task.record().state == "running"]:
            names = ", ".join(f"{task.step} {task.name}" for task in going)
            status.update(f"waiting for what an earlier run has started: {names}")
            time.sleep(1)


def _submit(
    launcher: Launcher, agenda: Agenda, file: Path, cells: Sequence[Cell], rerun_failed: bool, train_only: bool
) -> None:
    from .launch import connect, run_on_cluster

    with console.status("submitting") as status:
        run_on_cluster(
            connect(launcher, agenda.sweep),
            agenda,
            file,
            cells,
            rerun_failed=rerun_failed,
            train_only=train_only,
            watch=lambda jobs: status.update(f"{len(jobs)} jobs queued or running: {', '.join(jobs)}"),
        )
