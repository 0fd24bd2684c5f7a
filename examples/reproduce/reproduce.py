"""The two papers' studies in small: a model from scratch, a pilot, the grid, a report, and what became of each claim.

    python examples/reproduce/reproduce.py                        about an hour on two CPU cores
    python examples/reproduce/reproduce.py --gsm8k /path/to/gsm8k also SmolLM2-135M on the real GSM8K (needs a GPU)

Everything is under outputs/reproduce; interrupted, even by kill -9, the same command goes on. Run it in the checkout.
"""

from __future__ import annotations

import argparse
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

from llamafactory_ext.report.claims import as_markdown, findings
from llamafactory_ext.report.claims.study import Study
from llamafactory_ext.report.page import write_report
from llamafactory_ext.report.table import groups, learning_rate_of
from llamafactory_ext.sweep.results import SweepResults, read_results
from llamafactory_ext.sweep.work import keep_checkpoints
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from rates import choose_rates  # noqa: E402
from start import make_data, make_model  # noqa: E402

RESULTS = Path("outputs/reproduce")  # what the recipes name
ROOM = 0.6  # of the problems solved by the model that trainings start from


def main() -> None:
    args = parse_arguments()
    make_data_and_weights()
    train()
    choose_start()
    pilot = sweep(HERE / "pilot.yaml", RESULTS / "pilot")
    low, high = rates_of(pilot)
    print(f"The grid's learning rates, by the pilot: {low:g} and {high:g}", flush=True)
    grid = sweep(fill_in(HERE / "grid.yaml", {"LOW": low, "HIGH": high}), RESULTS / "grid")
    for name in ("pilot", "grid"):
        print(write_report(RESULTS / name, RESULTS / name / "report"))
    write_whole(RESULTS / "claims.md", as_markdown(findings(study_of(grid))))
    print(RESULTS / "claims.md")
    if args.gsm8k:
        reproduce_gsm8k(args.gsm8k)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="a folder with GSM8K's train.jsonl and test.jsonl")
    args = parser.parse_args()
    if args.gsm8k:
        missing = [name for name in ("train.jsonl", "test.jsonl") if not (args.gsm8k / name).is_file()]
        if missing:
            parser.error(f"{args.gsm8k} holds no {missing[0]}: name a folder with GSM8K's train.jsonl and test.jsonl.")
        import torch

        if not torch.cuda.is_available():
            parser.error("--gsm8k trains SmolLM2-135M 60 times, which needs a GPU: leave it out here.")
    if not (Path.cwd() / "examples" / "reproduce").is_dir():
        parser.error("run it in the checkout's folder, which its recipes' paths start from.")
    return args


# --- the model -------------------------------------------------------------------------------------------------------


def make_whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder, unless it is there: whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.replace(folder)


def make_data_and_weights() -> None:
    """Data and random weights."""
    make_whole(RESULTS / "data", make_data)
    make_whole(RESULTS / "random", lambda folder: make_model(folder, RESULTS / "data"))


def train() -> None:
    """SFT; LLaMA-Factory resumes from its last checkpoint, and writes all_results.json last."""
    with own_log(RESULTS / "sft.log") as log:
        if not (RESULTS / "sft" / "all_results.json").is_file():
            keep_checkpoints(RESULTS / "sft")
            print("SFT from random weights: about a quarter of an hour on two cores", flush=True)
            run("llamafactory-cli", "train", str(HERE / "sft.yaml"), log=log)


def choose_start() -> None:
    """The first checkpoint that solves `ROOM` of the calibration problems, by bisection: accuracy grows with training.

    How fast a model of this size learns to add is a matter of a few hundred steps, and of luck; what the study needs is
    one with room both ways.
    """
    if (RESULTS / "start").is_dir():
        return
    checkpoints = sorted((RESULTS / "sft").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    index = bisect.bisect_left(checkpoints, ROOM, key=solved)
    chosen = checkpoints[min(index, len(checkpoints) - 1)]
    print(f"The model that all trainings start from: {chosen.name}, which solves {solved(chosen):.1%}", flush=True)
    unneeded = shutil.ignore_patterns("optimizer.pt", "scheduler.pt", "rng_state*")
    make_whole(RESULTS / "start", lambda folder: shutil.copytree(chosen, folder, ignore=unneeded))


def solved(checkpoint: Path) -> float:
    """The share of the calibration problems that it solves."""
    scores = RESULTS / "calibration" / checkpoint.name
    with own_log(RESULTS / "calibration.log") as log:
        # Answers that are there are kept, and refused if they are another model's or to other problems.
        words = ["--engine", "hf", "--model", str(checkpoint), "--data", str(RESULTS / "data" / "calibration.jsonl")]
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


def rates_of(pilot: SweepResults) -> tuple[float, float]:
    unscored = [cell.name for cell in pilot.cells if cell.summary is None]
    if unscored:
        sys.exit(f"The pilot has no scores of {', '.join(unscored)}: see their logs in {RESULTS / 'pilot' / 'cells'}.")
    accuracies = {learning_rate_of(c): c.summary["strict"]["accuracy"] for c in pilot.cells if c.summary}
    return choose_rates(accuracies, untrained_accuracy(pilot))


def untrained_accuracy(results: SweepResults) -> float:
    summary = results.bases[0].summary
    if summary is None:
        sys.exit(f"The untrained model was not scored: see {results.bases[0].folder}/score.log.")
    return float(summary["strict"]["accuracy"])


def fill_in(template: Path, values: dict[str, float]) -> Path:
    """A sweep's file with words in its axes replaced by numbers, in the results' folder."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return values.get(value, value) if isinstance(value, str) else value

    settings = yaml.safe_load(template.read_text(encoding="utf-8"))
    settings["axes"] = [{key: filled(value) for key, value in grid.items()} for grid in settings["axes"]]
    write_whole(RESULTS / template.name, yaml.safe_dump(settings, sort_keys=False))
    return RESULTS / template.name


def reproduce_gsm8k(gsm8k: Path) -> None:
    """The MinorDPO grid with SmolLM2-135M-Instruct on pairs from GSM8K's train file, scored on its test file."""
    sys.path.insert(0, str(HERE.parent / "demo"))
    from model import default_model

    folder = RESULTS / "gsm8k"
    default_model(folder)
    if not (folder / "data" / "dataset_info.json").is_file():  # written after the pairs
        (folder / "data").mkdir(parents=True, exist_ok=True)
        run(
            "llamafactory-ext",
            "data",
            "corrupt",
            str(gsm8k / "train.jsonl"),
            "--output",
            str(folder / "data/gsm8k_pairs.jsonl"),
        )
    for name in ("pilot", "grid"):
        settings = yaml.safe_load((HERE / f"gsm8k_{name}.yaml").read_text(encoding="utf-8"))
        settings["evaluators"][0]["gsm8k"]["data"] = str(gsm8k / "test.jsonl")
        write_whole(folder / f"gsm8k_{name}.yaml", yaml.safe_dump(settings, sort_keys=False))
    low, high = rates_of(sweep(folder / "gsm8k_pilot.yaml", folder / "pilot"))
    grid = sweep(fill_in(folder / "gsm8k_grid.yaml", {"LOW": low, "HIGH": high}), folder / "grid")
    print(write_report(folder / "grid", folder / "grid" / "report"))
    write_whole(folder / "claims.md", as_markdown(findings(study_of(grid))))


# --- claims ----------------------------------------------------------------------------------------------------------


def study_of(grid: SweepResults) -> Study:
    return Study(groups([cell for cell in grid.cells if cell.is_trained]), untrained_accuracy(grid))


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


if __name__ == "__main__":
    main()
