"""What a GPU proves and measures, in stages: each in a process of its own with a time limit, each leaving its results.

    python benchmarks/gpu.py                            # all stages, the one that is worth most first
    python benchmarks/gpu.py --minutes 8                # as far as they get in eight minutes
    python benchmarks/gpu.py --only paths --only large
    python benchmarks/gpu.py --rehearse                 # on the CPU, tiny: shows that all works, measures nothing

A result is printed, and a line of results.jsonl under --output, as soon as it is known, so that a run that is cut off
has left what it measured. After a stage its results are printed as a table, and at the end those of all stages.
Status 0: something was measured, nothing failed, no goal was missed; 1: otherwise; 2: the run could not start, or its
disk is full; 130, 143, 129: it was ended by Ctrl-C, SIGTERM or SIGHUP.

Words in the results:
  stock             LLaMA-Factory's own DPO stage; ours is the plugin's
  trie              a pair in one row: what both answers begin with once, then what is left of each
  row per answer    both answers of a pair in rows of their own, as stock has them
  sigmoid           the loss of DPO, as LLaMA-Factory calls it
  Sr                the refinement term of Sr-DPO, from pairs with a longer prompt
  warm cache        the reference model's log-probabilities are known from an earlier run
  planned           what `llamafactory-ext plan` says of the recipe
  what lasts        memory of weights, optimizer states and a reference model; the peak above it is what a step adds
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.resolve()))  # which PYTHONSAFEPATH leaves out
sys.path.append(str(Path(__file__).parent.parent.resolve()))

# Up to `check`, by the standard library alone: releases of typer, for one, need a package that only the wheels bring.
from gpu_packages import install
from gpu_processes import SignalError, last_line, noting_signals, run
from gpu_results import ITSELF, Recorder, alone, in_words, read, table
from gpu_stages import NO_GPU, STAGES, Stage, remove_models, run_stage

HERE = Path(__file__).parent.resolve()
OUTPUT, REHEARSAL = Path("outputs/gpu"), Path("outputs/gpu-rehearsal")
LEAST = 25  # seconds, of which a stage imports for 15
MINUTES, MOST = 9.5, 24 * 60
NONE = 3
ASK = f"import torch; raise SystemExit(0 if torch.cuda.is_available() else {NONE})"


def main(words: list[str] | None = None) -> int:
    """Run the stages that a command line names, and return the status."""
    options = parser().parse_args(words)
    if options.rehearse and options.minutes is not None:
        parser().error("--minutes limits what runs on a GPU, and a rehearsal has no limit: leave one of them out.")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    results = (options.output or (REHEARSAL if options.rehearse else OUTPUT)).absolute() / "results.jsonl"
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    before = results.stat().st_size if results.is_file() else 0
    try:
        with noting_signals():
            check(options.rehearse)
            make_folder(results.parent)
            with alone(results):
                return measure(
                    stages, results, prepared(options.rehearse), options.minutes or MINUTES, options.rehearse
                )
    except SignalError as error:
        has_results = results.is_file() and read(results, before)
        found = f"what was measured is in {results}" if has_results else "nothing was measured"
        print(f"gpu.py: {error}; {found}.", file=sys.stderr)
        return 128 + error.number
    except OSError as error:
        print(f"gpu.py: {in_words(error, results)}.", file=sys.stderr)
    except ValueError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument(
        "--only",
        action="append",
        choices=[stage.name for stage in STAGES],
        help="a stage; write it several times for several stages",
    )
    limit = f"for all stages together, without the installation of wheels (default: {MINUTES:g}); not for a rehearsal"
    about.add_argument("--minutes", type=minutes, help=limit)
    about.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes: about five minutes")
    where = f"a folder for results.jsonl and the stages' logs (default: {OUTPUT}, or {REHEARSAL})"
    about.add_argument("--output", type=Path, help=where)
    return about


def minutes(text: str) -> float:
    """A number of minutes, of a day at most.

    Raises:
        argparse.ArgumentError: if it is none.
    """
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= MOST:
            return float(text)
    raise argparse.ArgumentError(None, f"--minutes takes a number of minutes above 0, such as 8 ({MOST} at most).")


def check(rehearse: bool) -> None:
    """Say beforehand what would keep every stage from working.

    Raises:
        ValueError: with a sentence that says what to do.
    """
    for name in ("torch", "rich"):
        if not is_installed(name):
            raise ValueError(f"{name} is missing: install it with `{sys.executable} -m pip install {name}`.")
    if rehearse:
        return
    print("Asking torch for a GPU.")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        status = run([sys.executable, "-c", ASK], said, seconds=120)
        said.seek(0)
        if status == NONE:
            raise ValueError(NO_GPU)
        if status != 0:
            raise ValueError(f"torch does not say whether there is a GPU: {last_line(said.read())}")


def is_installed(package: str) -> bool:
    """Whether there is a package, and not only a folder of that name."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def make_folder(output: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: if there is a file of that name.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{output} is no folder, but a file or in a file: name a folder with --output.") from None


def prepared(rehearse: bool) -> dict[str, str]:
    """The environment of the stages: the checkout, and before it the wheels, where LLaMA-Factory is not installed.

    Raises:
        ValueError: with a sentence that says what to do, if it is nowhere.
    """
    paths = [str(HERE.parent), str(HERE)]
    if not is_installed("llamafactory"):
        paths.insert(0, str(install()))
    before = os.environ.get("PYTHONPATH")
    changes = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    changes |= {"PYTHONUNBUFFERED": "1"}  # what a stage that is killed has said is in its log
    changes |= {"PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}
    changes |= {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return os.environ | changes


def measure(stages: list[Stage], results: Path, environment: dict[str, str], limit: float, rehearse: bool) -> int:
    """Run stages while there is time for them; 0 if something was measured, nothing failed and no goal was missed.

    Args:
        limit: in minutes; a rehearsal, which shares its machine with others, has none.
    """
    before, deadline = results.stat().st_size, time.monotonic() + 60 * limit
    last: list[dict[str, Any]] = []
    remove_models()
    if rehearse:
        print("A rehearsal: it shows whether everything works; its numbers mean nothing.")
    try:
        for stage in stages:
            left = math.inf if rehearse else deadline - time.monotonic()
            if left < LEAST:
                print(
                    f"{stage.name} is left out: it takes {LEAST} s to get anywhere, and {max(left, 0):.0f} s are left."
                )
                continue
            seconds = min(stage.seconds, left)
            print(f"{stage.name}: {stage.about}{'' if rehearse else f', at most {seconds:.0f} s'}")
            problem = run_stage(stage, results, environment, rehearse, math.inf if rehearse else seconds)
            if problem is not None:
                failed(stage, results, problem)
            last = [row for row in read(results, before) if row["stage"] == stage.name]
            print(f"\n{table(last)}\n")
            if problem is not None and NO_GPU in problem:
                break
    finally:
        rows = read(results, before)
        if rows != last:
            print(f"\nAll results\n\n{table(rows)}\n")
        if rows:
            print(f"They are in {results}.")
    return int(not rows or any(row["met"] is False for row in rows))


def failed(stage: Stage, results: Path, problem: str) -> None:
    """Note how a stage ended that could not do so itself; versions and card are its own to say."""
    from training_runs import commit  # which imports more than the standard library

    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    Recorder(stage.name, results, about).failed(ITSELF, problem)
    print(f"  {ITSELF}  {problem}")


if __name__ == "__main__":
    sys.exit(main())
