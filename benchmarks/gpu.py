"""What a GPU proves and measures, in stages: each in a process of its own with a time limit, each leaving its results.

    python benchmarks/gpu.py                            # all stages, the one that is worth most first
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
    try:
        output.mkdir(parents=True, exist_ok=True)
        environment = prepared(options.rehearse)
    except (OSError, ValueError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    results = output / "results.jsonl"
    before = results.stat().st_size if results.is_file() else 0
    deadline = time.monotonic() + 60 * options.minutes
    failed = False
    clean()
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
        console.print(table(read(results, before)))
        if problem is not None and NO_GPU in problem:
            break
    rows = read(results, before)
    return int(failed or not rows or any(row["met"] is False for row in rows))


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
            process_group=0,
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
    if results.is_file() and not results.read_bytes().endswith(b"\n"):
        with results.open("ab") as file:
            file.write(b"\n")


def note(results: Path, stage: Stage, ended: str, met: bool) -> None:
    """How a stage ended: after how long, or with what problem."""
    row = {"stage": stage.name, "what": "the stage itself", "value": ended, "unit": "", "goal": None, "met": met}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(results: Path, start: int = 0) -> list[dict[str, Any]]:
    """The rows from a byte on, of several measurements of the same the latest; what is no row of ours is left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    content = results.read_bytes()[start:] if results.is_file() else b""
    for line in content.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
            is_ours = (
                isinstance(row["stage"], str) and isinstance(row["what"], str) and row["met"] in (True, False, None)
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if is_ours:
            rows[row["stage"], row["what"]] = row
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("stage", "what", "value", "goal", "", title="So far", title_justify="left")
    for row in rows:
        mark = {True: "[green]met", False: "[red]missed", None: ""}[row["met"]]
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
        words = (row["stage"], row["what"], f"{value} {row['unit']}", str(row["goal"] or ""))
        shown.add_row(*map(escape, words), mark)
    return shown


if __name__ == "__main__":
    sys.exit(main())
