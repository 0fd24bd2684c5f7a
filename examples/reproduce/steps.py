"""The steps that studies in small share: a model from scratch, the checkpoint that they start from, their sweeps.

Each is done once: interrupted, even by kill -9, the same command goes on. Run it in the checkout.
"""

from __future__ import annotations

import bisect
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from llamafactory_ext.report.table import learning_rate_of
from llamafactory_ext.sweep.results import SweepResults, read_results
from llamafactory_ext.sweep.work import keep_checkpoints
from llamafactory_ext.whole_files import write_whole

# --- the model -------------------------------------------------------------------------------------------------------


def make_whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder, unless it is there: whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.replace(folder)


def train(recipe: Path, folder: Path) -> None:
    """SFT into a folder's `sft`; LLaMA-Factory resumes from its last checkpoint, and writes all_results.json last."""
    with own_log(folder / "sft.log") as log:
        if not (folder / "sft" / "all_results.json").is_file():
            keep_checkpoints(folder / "sft")
            print("SFT from random weights: 15 to 20 minutes on two cores", flush=True)
            run("llamafactory-cli", "train", str(recipe), log=log)


def choose_start(folder: Path, room: float) -> None:
    """The first checkpoint that solves so many of the calibration problems, by bisection: accuracy grows with training.

    How fast a small model learns to add is a matter of a few hundred steps, and of luck; what a study needs is a model
    of a known ability.
    """
    if (folder / "start").is_dir():
        return
    checkpoints = sorted((folder / "sft").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    index = bisect.bisect_left(checkpoints, room, key=lambda checkpoint: solved(checkpoint, folder))
    chosen = checkpoints[min(index, len(checkpoints) - 1)]
    print(
        f"The model that all trainings start from: {chosen.name}, which solves {solved(chosen, folder):.1%}", flush=True
    )
    unneeded = shutil.ignore_patterns("optimizer.pt", "scheduler.pt", "rng_state*")
    make_whole(folder / "start", lambda start: shutil.copytree(chosen, start, ignore=unneeded))


def solved(checkpoint: Path, folder: Path) -> float:
    """The share of the calibration problems that it solves."""
    scores = folder / "calibration" / checkpoint.name
    with own_log(folder / "calibration.log") as log:
        # Answers that are there are kept, and refused if they are another model's or to other problems.
        words = ["--engine", "hf", "--model", str(checkpoint), "--data", str(folder / "data" / "calibration.jsonl")]
        words += ["--output", str(scores), "--prompt", "plain", "--max-tokens", "128", "--batch-size", "100"]
        run(sys.executable, "evaluation/gsm8k.py", *words, log=log)
    results = json.loads((scores / "results.json").read_text(encoding="utf-8"))
    return float(results["base"]["strict"]["accuracy"])


# --- the sweeps ------------------------------------------------------------------------------------------------------


def sweep(file: Path, folder: Path) -> SweepResults:
    begun = time.monotonic()
    run("llamafactory-ext", "sweep", str(file), may_end_with=(0, 1))  # 1: some cells failed, which the report shows
    print(f"{file.stem}: {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    results = read_results(folder)
    unfinished = [cell.name for cell in results.cells if "train" not in cell.records]
    unfinished += [c.name for c in results.cells for r in c.records.values() if r.state not in ("done", "failed")]
    if unfinished:
        sys.exit(f"{file} is not finished ({', '.join(unfinished)}): run the same command again.")
    return results


def accuracies(pilot: SweepResults) -> dict[float, float]:
    """By learning rate, what a pilot's models solve."""
    unscored = [cell.folder for cell in pilot.cells if cell.summary is None]
    if unscored:
        sys.exit(f"The pilot has no scores in {unscored[0]}: see the logs there.")
    return {learning_rate_of(cell): cell.summary["strict"]["accuracy"] for cell in pilot.cells if cell.summary}


def untrained_accuracy(results: SweepResults) -> float:
    summary = results.bases[0].summary
    if summary is None:
        sys.exit(f"The untrained model was not scored: see {results.bases[0].folder}/score.log.")
    return float(summary["strict"]["accuracy"])


def fill_in(template: Path, values: dict[str, float], folder: Path) -> Path:
    """A sweep's file with words in its axes replaced by numbers, in a folder."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return values.get(value, value) if isinstance(value, str) else value

    settings = yaml.safe_load(template.read_text(encoding="utf-8"))
    settings["axes"] = [{key: filled(value) for key, value in grid.items()} for grid in settings["axes"]]
    write_whole(folder / template.name, yaml.safe_dump(settings, sort_keys=False))
    return folder / template.name


# --- commands --------------------------------------------------------------------------------------------------------


@contextmanager
def own_log(path: Path) -> Iterator[IO[bytes]]:
    """A log that one process and those that it starts print to; waits for what an earlier, killed run has started."""
    with path.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        yield log


def run(*words: str, log: IO[bytes] | None = None, may_end_with: tuple[int, ...] = (0,)) -> None:
    """A command of this environment, also where it is not activated; what it prints goes to a log if one is given."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    status = subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode
    if status not in may_end_with:
        sys.exit(f"{' '.join(words)} ended with {status}{f'; see {log.name}' if log else ''}.")
