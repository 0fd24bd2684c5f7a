"""Run a sweep: check it, run it here or on a cluster, and show its results."""

from __future__ import annotations

import fnmatch
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path

from rich.markup import escape

from ..errors import UserError
from .check import check, missing_data, what_is_missing
from .choice import choose
from .display import Display, console, show_choices, show_plan, show_price, show_results
from .files import write_recipes, write_sweep
from .price import Pricing, price
from .records import check_locks
from .spec import Cell, notes, read_sweep
from .tasks import Agenda
from .work import Task


class Part(Enum):
    """The part of a sweep to run: trainings; commands of single cells; commands they share; everything."""

    train = "train"
    apart = "apart"
    shared = "shared"
    all = "all"


def conduct(
    file: Path,
    only: Sequence[str],
    launcher: str,
    part: Part,
    *,
    dry_run: Pricing | None = None,
    rerun_failed: bool = False,
) -> bool:
    """Run the commands of a sweep that are not done; returns whether all are, and True with `dry_run`.

    Args:
        file: the sweep's YAML file.
        only: patterns of cells' names; none for all cells.
        launcher: local, slurm or ray.
        part: which commands run here; a cluster's jobs get it on their command line.
        dry_run: what is priced where the plan is only shown; None: the sweep runs.
        rerun_failed: whether failed commands are tried again.

    Raises:
        UserError: if the file or a recipe is wrong.
    """
    asked, choices = choose(read_sweep(file), preliminary=dry_run is not None)
    if dry_run is None:
        check_locks()
        for evaluator in asked.evaluators.asking:
            evaluator.check_files()
        for text in missing_data(asked, asked.cells()):
            raise UserError(text)
    agenda = Agenda(asked, asked.cells())
    cells = _chosen(agenda.cells, only)
    with console.status("reading the recipes"):
        schedules = check(asked, cells)
    steps = {name: schedule.steps for name, schedule in schedules.items()}
    left = [cell for cell in cells if agenda.train_task(cell).record().state != "done"]
    priced = price(left, schedules, dry_run) if dry_run else None
    show_plan(agenda, cells, steps, priced)
    if priced is not None and dry_run is not None:
        show_price(priced, dry_run)
    show_choices(choices)
    for text in what_is_missing(asked, cells) if dry_run else ():
        console.print(f"[yellow]Missing: {escape(text)}", soft_wrap=True)
    for note in notes(asked, cells):
        console.print(f"[yellow]Note: {note}", soft_wrap=True)
    if dry_run:
        return True
    write_recipes(agenda, cells)
    write_sweep(agenda, file, [asdict(choice) for choice in choices])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running commands are ended
    if launcher == "local":
        _run_here(agenda, cells, rerun_failed, part)
    else:
        _submit(launcher, agenda, file, cells, rerun_failed, train_only=part is Part.train)
    return show_results(agenda, cells)


def _chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    chosen = [c for c in cells if not patterns or any(fnmatch.fnmatchcase(c.name, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(f"no cell matches {' or '.join(patterns)}; the cells are {', '.join(c.name for c in cells)}.")
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
            display.run(runner, [[task] for task in agenda.judge_tasks(cells)])


def wait_for_earlier(tasks: Sequence[Task]) -> None:
    """Wait for commands that an earlier, killed sweep has left running: they may hold the GPU that a new one needs."""
    with console.status("") as status:
        while going := [task for task in tasks if task.record().state == "running"]:
            names = ", ".join(f"{task.step} {task.name}" for task in going)
            status.update(f"waiting for commands that an earlier run has left running: {names}")
            time.sleep(1)


def _submit(
    launcher: str, agenda: Agenda, file: Path, cells: Sequence[Cell], rerun_failed: bool, train_only: bool
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
