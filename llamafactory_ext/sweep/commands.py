"""`llamafactory-ext sweep`."""

from __future__ import annotations

import fnmatch
import signal
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import UserError
from .results import read_results
from .spec import Cell, Sweep, read_sweep
from .tasks import adapter_tasks, chains_of, progress_of, train_task, write_recipes, write_sweep
from .work import Record, Task

console = Console()
Opt = typer.Option
COLOURS = {"done": "green", "failed": "red", "interrupted": "yellow", "running": "cyan"}


class Launcher(StrEnum):
    local = "local"
    slurm = "slurm"
    ray = "ray"


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file.", metavar="SWEEP.yaml")],
    only: Annotated[list[str] | None, Opt(help="Only cells whose name fits this pattern, like 'minor_dpo-*'.")] = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Show cells, steps and time, and run nothing.")] = False,
    rerun_failed: Annotated[bool, Opt("--rerun-failed", help="Try failed cells again.")] = False,
    train_only: Annotated[bool, Opt("--train-only", help="Score nothing; the same without it does.")] = False,
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
    (parameters of submitit's executor or of Ray's client). Keys that a cell's loss does not take are left out of it.
    Each cell has a folder with recipe, logs, model and scores; `llamafactory-ext report OUTPUT` makes a page of all.
    """
    asked = read_sweep(file)
    every = asked.cells()
    cells = _chosen(every, only or [])
    steps = _check(asked, cells)
    chains = chains_of(asked, cells)
    if train_only:
        chains = [[task for task in chain if task.step == "train"] for chain in chains]
    _show_plan(asked, cells, steps)
    if dry_run:
        return
    write_recipes(cells)
    write_sweep(asked, every, file)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running commands are ended
    if launcher is not Launcher.local:
        _submit(launcher, asked, file, cells, rerun_failed, train_only)
    else:
        _run_here(asked, cells, chains, rerun_failed, train_only)
    if _show_results(asked, cells):
        raise typer.Exit(1)


def _chosen(cells: list[Cell], patterns: Sequence[str]) -> list[Cell]:
    chosen = [c for c in cells if not patterns or any(fnmatch.fnmatchcase(c.name, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(f"no cell's name fits {' or '.join(patterns)}: they are {', '.join(c.name for c in cells)}.")
    return chosen


def _check(asked: Sweep, cells: Sequence[Cell]) -> dict[str, int | None]:
    """Every cell's recipe parsed and its data looked up, before anything runs; its steps by its name.

    Raises:
        UserError: for the first that is wrong, with its name.
    """
    from ..planning.schedule import count_pairs, make_schedule, training_args_of
    from ..recipe import parse_recipe

    steps: dict[str, int | None] = {}
    with console.status("reading the recipes"):
        for cell in cells:
            try:
                _, data_args, _ = parse_recipe(cell.recipe)
                training_args = training_args_of(cell.recipe)
                pairs = count_pairs(data_args, [])
                schedule = make_schedule(training_args, pairs, asked.gpus_per_cell, data_args.cutoff_len)
            except ValueError as error:
                raise UserError(f"cell {cell.name}: {error}") from error
            model = cell.base_model
            if model.startswith(("/", ".", "outputs/")) and not Path(model).is_dir():
                raise UserError(f"cell {cell.name}: there is no model {model}: name a folder, or a hub's name.")
            steps[cell.name] = schedule.steps
    return steps


# --- showing ---------------------------------------------------------------------------------------------------------


def _show_plan(asked: Sweep, cells: Sequence[Cell], steps: dict[str, int | None]) -> None:
    records = {cell.name: train_task(cell).record() for cell in cells}
    pace = _seconds_per_step(records, steps)
    table = Table("cell", "steps", "time", "state", title=f"{len(cells)} cells in {asked.output}", title_justify="left")
    for cell in cells:
        count, record = steps[cell.name], records[cell.name]
        guess = None if pace is None or count is None else pace * count
        time_ = _duration(record.seconds) if record.seconds else f"~{_duration(guess)}" if guess else ""
        table.add_row(cell.name, "?" if count is None else f"{count:,}", time_, _state(record))
    console.print(table)
    left = [steps[name] for name, record in records.items() if record.state != "done"]
    if not left:
        return
    known = sum(count for count in left if count is not None)
    text = f"To train: {len(left)} cells, {known:,} steps{'' if None not in left else ' and some unknown'}"
    about = f", about {_duration(pace * known)} one after another" if pace else "; time is known after the first"
    console.print(text + about)


def _seconds_per_step(records: dict[str, Record], steps: dict[str, int | None]) -> float | None:
    done = [(r.seconds, steps[name]) for name, r in records.items() if r.state == "done" and r.seconds and steps[name]]
    return sum(seconds for seconds, _ in done) / sum(count or 0 for _, count in done) if done else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _state(record: Record) -> str:
    colour = COLOURS.get(record.state)
    return f"[{colour}]{record.state}[/]" if colour else record.state


def _run_here(
    asked: Sweep, cells: Sequence[Cell], chains: list[list[Task]], rerun_failed: bool, train_only: bool
) -> None:
    from .run import Runner, slots

    with _Display() as display:
        runner = Runner(slots(asked), rerun_failed, display.report)
        display.run(runner, chains)
        if not train_only:
            trained = [cell for cell in cells if train_task(cell).record().state == "done"]
            display.run(runner, [[task] for task in adapter_tasks(asked, trained)])


def _submit(
    launcher: Launcher, asked: Sweep, file: Path, cells: Sequence[Cell], rerun_failed: bool, train_only: bool
) -> None:
    from .launch import connect, run_on_cluster

    options = [*(["--rerun-failed"] if rerun_failed else []), *(["--train-only"] if train_only else [])]
    with console.status("submitting") as status:
        run_on_cluster(
            connect(launcher, asked),
            asked,
            file,
            cells,
            options,
            watch=lambda jobs: status.update(f"{len(jobs)} jobs queued or running: {', '.join(jobs)}"),
        )


class _Display:
    """A bar over all commands, one per running command, and a line for each that has ended."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        remaining = (TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
        self.progress = Progress(*columns, *remaining, console=console, speed_estimate_period=1e9)
        self.bars: dict[Task, Any] = {}
        self.begun = time.monotonic()
        self.left = 0

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def run(self, runner: Any, chains: Sequence[Sequence[Task]]) -> None:
        open_tasks = [task for chain in chains for task in chain if task.record().state != "done"]
        if not open_tasks:
            return
        self.left = len(open_tasks)
        self.total = self.progress.add_task("sweep", total=self.left, status="")
        runner.run(chains, lambda: self.watch(runner))

    def watch(self, runner: Any) -> None:
        running = dict(runner.running)
        for task in running:
            if task not in self.bars:
                self.bars[task] = self.progress.add_task(f"  {task.step} {task.name}", total=None, status="")
            done, total, status = progress_of(task)
            self.progress.update(self.bars[task], completed=done, total=total, status=status)
        for task in [task for task in self.bars if task not in running]:
            self.progress.remove_task(self.bars.pop(task))

    def report(self, task: Task, record: Record) -> None:
        self.left -= 1
        self.progress.advance(self.total)
        seconds = _duration(record.seconds)
        if record.state == "done":
            self.progress.console.print(f"{task.step} {task.name}: done in {seconds}; {self.left} left")
        else:
            self.progress.console.print(
                f"[red]{task.step} {task.name}: {escape(record.error or record.state)}; see {task.log}"
            )


def _show_results(asked: Sweep, cells: Sequence[Cell]) -> int:
    """A table of all cells with their strict accuracy; returns how many failed."""
    found = read_results(asked.output)
    results = {result.name: result for result in [*found.bases, *found.cells]}
    table = Table("cell", "trained", "scored", "strict", title_justify="left")
    failures: list[str] = []
    for chain in chains_of(asked, cells):
        records = {task.step: task.record() for task in chain}
        for task in chain:
            if records[task.step].state == "failed":
                failures.append(f"{task.step} {task.name}: {records[task.step].error} (see {task.log})")
        result = results[chain[0].name]
        states = [_state(records[step]) if step in records else "" for step in ("train", "score")]
        table.add_row(chain[0].name, *states, f"{result.summary['strict']['accuracy']:.1%}" if result.summary else "")
    console.print(table)
    for failure in failures:
        console.print(f"[red]failed:[/] {escape(failure)}")
    if failures:
        console.print("Try them again with --rerun-failed.")
    return len(failures)
