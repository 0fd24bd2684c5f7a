"""What a GPU proves and measures, in stages: each in a process of its own with a time limit, each leaving its results.

    python benchmarks/gpu.py                            # all stages, the most worthy first
    python benchmarks/gpu.py --minutes 8                # as far as they get in eight minutes
    python benchmarks/gpu.py --only paths --only large
    python benchmarks/gpu.py --rehearse                 # all stages on the CPU with tiny shapes, in two minutes

Every number is in results.jsonl under --output as soon as it is known, and the table so far is printed after each
stage, so that a run that is cut off has left what it measured. Without network, `make gpu-wheels` fetches beforehand
what LLaMA-Factory needs; the wheels are found in .wheels and installed into a folder of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_packages import MEMORY, PREFIX, WHEELS, install
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).parent
SITE = Path(tempfile.gettempdir()) / "llamafactory-ext-gpu"
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
    """Run the stages that the words of a command line name; 0 if all ran and no goal was missed."""
    options = parser().parse_args(words)
    output: Path = options.output or (REHEARSAL if options.rehearse else OUTPUT)
    output.mkdir(parents=True, exist_ok=True)
    results, environment = output / "results.jsonl", prepared()
    deadline = time.monotonic() + 60 * options.minutes
    failed = False
    for stage in STAGES:
        if options.only and stage.name not in options.only:
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            console.print(f"{stage.name} is left out: {left:.0f} s are left, in which it would not get anywhere.")
            continue
        started = time.monotonic()
        problem = run(replace(stage, seconds=min(stage.seconds, int(left))), output, environment, options.rehearse)
        note(results, stage, problem or f"{time.monotonic() - started:.0f} s", met=problem is None)
        failed = failed or problem is not None
        console.print(table(read(results)))
    return int(failed or any(row["met"] is False for row in read(results)))


def parser() -> argparse.ArgumentParser:
    # By the standard library, because the packages that the wheels bring are not there yet.
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--only", action="append", choices=[stage.name for stage in STAGES], help="several for several")
    about.add_argument("--minutes", type=float, default=9.5, help="stages end with these, and leave what they have")
    about.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    where = f"a folder for results.jsonl and the stages' logs (default: {OUTPUT}, or {REHEARSAL})"
    about.add_argument("--output", type=Path, help=where)
    return about


def prepared() -> dict[str, str]:
    """The environment of the stages: the checkout, and before it the wheels, where LLaMA-Factory is not installed."""
    paths = [HERE.parent.resolve(), HERE.resolve()]
    if WHEELS.is_dir() and importlib.util.find_spec("llamafactory") is None:
        install(SITE)  # not into the output, which may be copied from machine to machine
        paths.insert(0, SITE)
    before = os.environ.get("PYTHONPATH")
    found = [*map(str, paths), *([before] if before else [])]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return os.environ | {"PYTHONPATH": os.pathsep.join(found)} | quiet


def run(stage: Stage, output: Path, environment: dict[str, str], rehearse: bool) -> str | None:
    """Run a stage; what was wrong in words, or None. Its process group ends with its time."""
    console.print(f"[bold]{stage.name}[/bold]: {stage.about}, at most {stage.seconds} s")
    log, results = output / f"{stage.name}.log", output / "results.jsonl"
    whole_lines(results)
    command = [sys.executable, str(HERE / "gpu_worker.py"), stage.name, str(results)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            # A rehearsal shares its machine with others, and is there to see that all of it works.
            status = process.wait(None if rehearse else stage.seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {stage.seconds} s"
        finally:
            end(process)
            clean()
    return None if status == 0 else f"ended with status {status}: {last_line(log)} ({log})"


def end(process: subprocess.Popen[Any]) -> None:
    """End a stage with all that it started, its end included by Ctrl-C."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def clean() -> None:
    """Remove what a stage that was killed left in memory: the weights of its models."""
    for folder in MEMORY.glob(f"{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def whole_lines(results: Path) -> None:
    """End a line that was cut off, so that it spoils no other."""
    if results.is_file() and not results.read_bytes().endswith(b"\n"):
        with results.open("ab") as file:
            file.write(b"\n")


def note(results: Path, stage: Stage, ended: str, met: bool) -> None:
    """How a stage ended: after how long, or with what problem."""
    row = {"stage": stage.name, "what": "the stage itself", "value": ended, "unit": "", "goal": None, "met": met}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(results: Path) -> list[dict[str, Any]]:
    """The rows so far, of several measurements of the same the latest; a line that was cut off is left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["stage"], row["what"]] = row
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("stage", "what", "value", "goal", "", title="So far", title_justify="left")
    for row in rows:
        mark = {True: "[green]met", False: "[red]missed", None: ""}[row["met"]]
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
        shown.add_row(row["stage"], escape(row["what"]), escape(f"{value} {row['unit']}"), row["goal"] or "", mark)
    return shown


if __name__ == "__main__":
    sys.exit(main())
