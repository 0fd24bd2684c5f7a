"""What `llamafactory-ext sweep` prints: the plan, running commands, and the state of every cell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..commandline import LINE_SECONDS
from .choice import Choice
from .price import Price, Pricing
from .progress import Progress, Watcher
from .records import Record, Step
from .results import read_results
from .spec import Cell
from .tasks import Agenda
from .work import Task

console = Console()
COLOURS = {"done": "green", "failed": "red", "interrupted": "yellow", "running": "cyan"}


def show_plan(
    agenda: Agenda, cells: Sequence[Cell], steps: Mapping[str, int | None], priced: Price | None = None
) -> None:
    """A table of the cells: steps, time, state, and GPU hours where they are priced."""
    records = {cell.name: agenda.train_task(cell).record() for cell in cells}
    pace = _seconds_per_step(records, steps)
    heads = ["cell", "steps", "time", *(["GPU hours"] if priced else []), "state"]
    table = Table(*heads, title=f"{len(cells)} cells in {agenda.sweep.output}", title_justify="left")
    for cell in cells:
        count, record = steps[cell.name], records[cell.name]
        guess = None if pace is None or count is None else pace * count
        time_ = _time(record) if record.seconds else f"~{_duration(guess)}" if guess else ""
        hours = [_hours(priced.cells.get(cell.name))] if priced else []
        table.add_row(cell.name, "?" if count is None else f"{count:,}", time_, *hours, _state(record))
    console.print(table)
    left = [steps[name] for name, record in records.items() if record.state != "done"]
    if not left:
        return
    known = sum(count for count in left if count is not None)
    text = f"To train: {len(left)} cells, {known:,} steps{'' if None not in left else ' and an unknown number more'}"
    about = (
        f", about {_duration(pace * known)} one after another" if pace else "; the time is known after the first cell"
    )
    console.print(text + about)


def show_price(priced: Price, pricing: Pricing) -> None:
    gpu = pricing.gpu
    if not priced.cells:
        return
    known = [hours for hours in priced.cells.values() if hours is not None]
    if known:
        length = f"{pricing.tokens} tokens" if pricing.tokens else "`cutoff_len` tokens"
        console.print(
            f"Trainings: about {_hours(priced.total)} GPU hours ({_hours(priced.reference)} for the reference), on "
            f"{gpu.name.upper()} at {gpu.utilization:.0%} of their peak, with sequences of {length} (--gpu, "
            "--utilization, --tokens). What evaluators take is not counted.",
            soft_wrap=True,
            highlight=False,
        )
    if priced.unknown:
        missing = len(priced.cells) - len(known)
        console.print(
            f"GPU hours of {missing} cells are unknown: {escape(priced.unknown)}", soft_wrap=True, highlight=False
        )


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    return "<0.01" if hours < 0.01 else f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def show_choices(choices: Sequence[Choice]) -> None:
    for choice in choices:
        console.print(choice.told, soft_wrap=True, highlight=False, markup=False)


def _seconds_per_step(records: Mapping[str, Record], steps: Mapping[str, int | None]) -> float | None:
    """Of the cells that were trained at one go."""
    whole = {name: r.seconds for name, r in records.items() if r.state == "done" and r.seconds and not r.resumed}
    done = [(seconds, count) for name, seconds in whole.items() if (count := steps[name])]
    return sum(seconds for seconds, _ in done) / sum(count for _, count in done) if done else None


def _time(record: Record) -> str:
    return f"{_duration(record.seconds)} since resumed" if record.resumed else _duration(record.seconds)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _state(record: Record) -> str:
    colour = COLOURS.get(record.state)
    return f"[{colour}]{record.state}[/]" if colour else record.state


class Display:
    """A bar over all commands, one per running command, and a line for each that has ended."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        remaining = (TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
        self.progress = Bars(*columns, *remaining, console=console, speed_estimate_period=1e9)
        self.bars: dict[Task, tuple[Any, Watcher]] = {}
        self.lines: dict[Task, str] = {}  # what was last said of each
        self.left = 0
        self.last_lines = time.monotonic()

    def __enter__(self) -> Display:
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
                bar = self.progress.add_task(f"  {task.step} {task.name}", total=None, status="")
                self.bars[task] = bar, Watcher(task)
            bar, watcher = self.bars[task]
            now = watcher.look()
            self.progress.update(bar, completed=now.done, total=now.total, status=now.status)
        if not console.is_terminal and time.monotonic() - self.last_lines > LINE_SECONDS:
            self.last_lines = time.monotonic()
            for task in running:
                line = _line(task, self.bars[task][1].now)
                if self.lines.get(task) != line:
                    self.lines[task] = line
                    console.print(line, soft_wrap=True, highlight=False, markup=False)
        for task in [task for task in self.bars if task not in running]:
            self.progress.remove_task(self.bars.pop(task)[0])

    def report(self, task: Task, record: Record) -> None:
        self.left -= 1
        self.progress.advance(self.total)
        if record.state == "done":
            self.progress.console.print(f"{task.step} {task.name}: done in {_time(record)}; {self.left} left")
        else:
            self.progress.console.print(
                f"[red]{task.step} {task.name}: {escape(record.error or record.state)}; see {task.log}"
            )


def _line(task: Task, now: Progress) -> str:
    """How far a command is, for a log."""
    unit = "steps" if task.step == "train" else "done"
    done = (
        "starting"
        if not now.done
        else f"{now.done} {unit}"
        if now.total is None
        else f"{now.done} of {now.total} {unit}"
    )
    return ", ".join(filter(None, [f"{task.step} {task.name}: {done}", now.status]))


def show_results(agenda: Agenda, cells: Sequence[Cell]) -> bool:
    """A table of all cells with the state of each command and the strict accuracy; whether nothing has failed or been
    interrupted."""
    found = read_results(agenda.sweep.output)
    results = {result.name: result for result in [*found.bases, *found.cells]}
    steps: list[Step] = ["train", *agenda.sweep.evaluators.steps]
    table = Table("cell", *steps, "strict", title_justify="left")
    failures: list[str] = []
    interrupted: list[str] = []
    shared = [*agenda.adapter_tasks(agenda.trained(cells)), *agenda.judge_tasks(cells)]
    for chain in _by_name([*(task for tasks in agenda.chains(cells) for task in tasks), *shared]):
        records = {task.step: task.record() for task in chain}
        for task in chain:
            if records[task.step].state == "failed":
                failures.append(f"{task.step} {task.name}: {records[task.step].error} (see {task.log})")
        interrupted += [f"{task.step} {task.name}" for task in chain if records[task.step].state == "interrupted"]
        result = results[chain[0].name]
        states = [_state(records[step]) if step in records else "" for step in steps]
        table.add_row(chain[0].name, *states, f"{result.summary['strict']['accuracy']:.1%}" if result.summary else "")
    console.print(table)
    for failure in failures:
        console.print(f"[red]failed:[/] {escape(failure)}")
    if failures:
        console.print("To try them again, add --rerun-failed.")
    for name, result in results.items():
        if result.judged and result.judged["judged"] < result.judged["turns"]:
            missing = result.judged["turns"] - result.judged["judged"]
            console.print(
                f"[yellow]judge {name}: {missing} of {result.judged['turns']} answers have no verdict; to ask "
                f"again, remove {result.folder / 'judge.json'}, then run the same command.",
                soft_wrap=True,
                highlight=False,
            )
    if interrupted:
        console.print(f"Interrupted; run the same command to resume: {', '.join(interrupted)}")
    return not failures and not interrupted


def _by_name(tasks: Sequence[Task]) -> list[list[Task]]:
    """The commands of each cell or model, in their order."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        found.setdefault(task.name, []).append(task)
    return list(found.values())
