"""What a GPU proves and measures, in stages: each in a process of its own with a time limit, each leaving its results.

    python benchmarks/gpu.py                            # all stages, the one that is worth most first
    python benchmarks/gpu.py --minutes 8                # as far as they get in eight minutes
    python benchmarks/gpu.py --only paths --only large
    python benchmarks/gpu.py --rehearse                 # all stages on the CPU with tiny shapes: five minutes

Every number is printed, and in results.jsonl under --output, as soon as it is known, and the table so far is printed
after each stage, so that a run that is cut off has left what it measured. Without network, `make gpu-wheels` fetches
beforehand what LLaMA-Factory needs; the wheels are found in .wheels and installed into a folder of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_packages import WHEELS, install
from gpu_worker import MEMORY, NO_GPU, PREFIX
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).parent
OUTPUT, REHEARSAL = Path("outputs/gpu"), Path("outputs/gpu-rehearsal")

console = Console()
console.width = max(console.width, 120)  # a log has no terminal's width


@dataclass(frozen=True)
class Stage:
    """A module `gpu_<name>` with a function `measure`, and the seconds that it may take on a GPU."""

    name: str
    seconds: int
    about: str


LEAST = 25  # seconds, of which a stage imports for 15
STAGES = (
    Stage("paths", 120, "every way of training, with tiny models, against stock LLaMA-Factory"),
    Stage("large", 180, "Qwen1.5-7B's shape: pairs a second and memory beside stock"),
    Stage("small", 120, "Qwen2.5-0.5B's and 1.5B's shapes, in full"),
    Stage("attention", 45, "tries against padded rows, and which kernels run"),
    Stage("study", 75, "DPO and MinorDPO at a learning rate that is too high, watched"),
)


def main(words: list[str] | None = None) -> int:
    """Run the stages that a command line names; 0 if something was measured, nothing failed and no goal was missed."""
    options = parser().parse_args(words)
    output: Path = options.output or (REHEARSAL if options.rehearse else OUTPUT)
    results = output / "results.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with alone(results):
            before = results.stat().st_size
            stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
            has_failed = measure(stages, results, prepared(options.rehearse), options.minutes, options.rehearse)
            rows = read(results, before)
    except (OSError, ValueError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu.py: interrupted; what was measured is in {results}.", file=sys.stderr)
        return 130
    return int(has_failed or not rows or any(row["met"] is False for row in rows))


@contextmanager
def alone(results: Path) -> Iterator[None]:
    """Make the file of results, whole lines in it, and keep other runs from it.

    Raises:
        ValueError: if another run writes into it.
    """
    with results.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes into {results}: name another folder with --output.") from None
        whole_lines(results)
        yield


def measure(stages: list[Stage], results: Path, environment: dict[str, str], minutes: float, rehearse: bool) -> bool:
    """Run stages while there is time for them; whether one failed."""
    before, deadline = results.stat().st_size, time.monotonic() + 60 * minutes
    has_failed = False
    clean()
    for stage in stages:
        left = deadline - time.monotonic()
        if left < LEAST:
            console.print(f"{stage.name} is left out: {left:.0f} s are left, in which it would not get anywhere.")
            continue
        started = time.monotonic()
        problem = run(replace(stage, seconds=min(stage.seconds, int(left))), results, environment, rehearse)
        note(results, stage, problem or f"{time.monotonic() - started:.0f} s", met=problem is None)
        has_failed = has_failed or problem is not None
        console.print(table(read(results, before)))
        if problem is not None and NO_GPU in problem:
            break
    return has_failed


def parser() -> argparse.ArgumentParser:
    # By the standard library, because releases of typer need a package that only the wheels bring.
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument(
        "--only",
        action="append",
        choices=[stage.name for stage in STAGES],
        help="a stage; write it several times for several stages",
    )
    about.add_argument("--minutes", type=positive, default=9.5, help="for all stages together (default: 9.5)")
    about.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    where = f"a folder for results.jsonl and the stages' logs (default: {OUTPUT}, or {REHEARSAL})"
    about.add_argument("--output", type=Path, help=where)
    return about


def positive(text: str) -> float:
    """A number of minutes; argparse says what is wrong with another text."""
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


def prepared(rehearse: bool) -> dict[str, str]:
    """The environment of the stages: the checkout, and before it the wheels, where LLaMA-Factory is not installed.

    Raises:
        ValueError: with a sentence that says what to do, if it is nowhere.
    """
    paths = [HERE.parent.resolve(), HERE.resolve()]
    if importlib.util.find_spec("llamafactory") is None:
        if not any(WHEELS.glob("*.whl")):
            raise ValueError(
                f"LLaMA-Factory is not installed: install it, or bring {WHEELS}, which `make gpu-wheels` makes where "
                "there is a network."
            )
        try:
            paths.insert(0, install())
        except subprocess.CalledProcessError:
            raise ValueError(f"pip could not install {WHEELS}: make it again with `make gpu-wheels`.") from None
    before = os.environ.get("PYTHONPATH")
    found = [*map(str, paths), *([before] if before else [])]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if rehearse:
        quiet["CUDA_VISIBLE_DEVICES"] = ""
    return os.environ | {"PYTHONPATH": os.pathsep.join(found)} | quiet


def run(stage: Stage, results: Path, environment: dict[str, str], rehearse: bool) -> str | None:
    """Run a stage and print what it finds; what was wrong in words, or None. Its process group ends with its time."""
    console.print(f"[bold]{stage.name}[/bold]: {stage.about}, at most {stage.seconds} s")
    log = results.with_name(f"{stage.name}.log")
    whole_lines(results)
    command = [sys.executable, str(HERE / "gpu_worker.py"), stage.name, str(results)]
    # A rehearsal shares its machine with others, and is there to see that all of it works.
    deadline = math.inf if rehearse else time.monotonic() + stage.seconds
    shown = results.stat().st_size
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
        try:
            while (status := process.poll()) is None and time.monotonic() < deadline:
                time.sleep(0.2)
                shown = show(results, shown)
        finally:
            end(process)
            clean()
    show(results, shown)
    if status is None:
        return f"stopped after {stage.seconds} s"
    return None if status == 0 else f"ended with status {status}: {last_line(log)} ({log})"


def end(process: subprocess.Popen[Any]) -> None:
    """End a stage with all that it started, its end included by Ctrl-C."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def clean() -> None:
    """Remove the models of stages that were killed, of this run and of those that are no more."""
    for folder in [*MEMORY.glob(f"{PREFIX}*"), *Path(tempfile.gettempdir()).glob(f"{PREFIX}*")]:
        started_by = folder.name.removeprefix(PREFIX).split("-")[0]
        if started_by == str(os.getpid()) or not Path("/proc", started_by).is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def whole_lines(results: Path) -> None:
    """End a line that was cut off, so that it spoils no other."""
    content = results.read_bytes()
    if content and not content.endswith(b"\n"):
        with results.open("ab") as file:
            file.write(b"\n")


def note(results: Path, stage: Stage, ended: str, met: bool) -> None:
    """How a stage ended: after how long, or with what problem."""
    row = {"stage": stage.name, "what": "the stage itself", "value": ended, "unit": "", "goal": None, "met": met}
    row["date"] = datetime.now(UTC).date().isoformat()
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(results: Path, start: int = 0) -> list[dict[str, Any]]:
    """The rows from a byte on, of several measurements of the same the latest."""
    return list({(row["stage"], row["what"]): row for row in parsed(results.read_bytes()[start:])}.values())


def parsed(content: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a file; what is no row of ours is left out."""
    for line in content.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
            words = row["stage"], row["what"], row["unit"]
            is_ours = all(isinstance(word, str) for word in words) and row["met"] in (True, False, None)
            if is_ours and {"value", "goal"} <= row.keys():
                yield row
        except (ValueError, TypeError, KeyError, RecursionError):
            continue


def show(results: Path, start: int) -> int:
    """Print the rows from a byte on, and return the byte after the last whole line."""
    content = results.read_bytes()[start:]
    end = content.rfind(b"\n") + 1
    for row in parsed(content[:end]):
        console.print("  " + "  ".join(cell for cell in cells(row)[1:] if cell), highlight=False)
    return start + end


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of the table: stage, what, value with its unit, goal, and whether that is met."""
    mark = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[row["met"]]
    value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
    words = (row["stage"], row["what"], f"{value} {row['unit']}".strip(), str(row["goal"] or ""))
    return (*map(escape, words), mark)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("stage", "what", "value", "goal", "", title="So far", title_justify="left")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
