"""The two papers' studies in small: a model from scratch, a pilot, the grid, a report, and what became of each claim.

    python examples/reproduce/reproduce.py                        about an hour on two CPU cores
    python examples/reproduce/reproduce.py --gsm8k /path/to/gsm8k also SmolLM2-135M on the real GSM8K (needs a GPU)

Everything is under outputs/reproduce; interrupted, even by kill -9, the same command goes on. Run it in the checkout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from llamafactory_ext.report.claims import as_markdown, findings
from llamafactory_ext.report.claims.study import Study
from llamafactory_ext.report.page import write_report
from llamafactory_ext.report.table import groups
from llamafactory_ext.sweep.results import SweepResults
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from rates import choose_rates  # noqa: E402
from start import make_data, make_model  # noqa: E402
from steps import accuracies, choose_start, fill_in, make_whole, run, sweep, train, untrained_accuracy  # noqa: E402

RESULTS = Path("outputs/reproduce")  # what the recipes name
ROOM = 0.6  # of the problems solved by the model that trainings start from


def main() -> None:
    args = parse_arguments()
    make_data_and_weights()
    train(HERE / "sft.yaml", RESULTS)
    choose_start(RESULTS, ROOM)
    pilot = sweep(HERE / "pilot.yaml", RESULTS / "pilot")
    low, high = rates_of(pilot)
    print(f"The grid's learning rates, by the pilot: {low:g} and {high:g}", flush=True)
    grid = sweep(fill_in(HERE / "grid.yaml", {"LOW": low, "HIGH": high}, RESULTS), RESULTS / "grid")
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


def make_data_and_weights() -> None:
    """Data and random weights."""
    make_whole(RESULTS / "data", make_data)
    make_whole(RESULTS / "random", lambda folder: make_model(folder, RESULTS / "data"))


# --- the sweeps ------------------------------------------------------------------------------------------------------


def rates_of(pilot: SweepResults) -> tuple[float, float]:
    return choose_rates(accuracies(pilot), untrained_accuracy(pilot))


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
    grid = sweep(fill_in(folder / "gsm8k_grid.yaml", {"LOW": low, "HIGH": high}, folder), folder / "grid")
    print(write_report(folder / "grid", folder / "grid" / "report"))
    write_whole(folder / "claims.md", as_markdown(findings(study_of(grid))))


# --- claims ----------------------------------------------------------------------------------------------------------


def study_of(grid: SweepResults) -> Study:
    return Study(groups([cell for cell in grid.cells if cell.is_trained]), untrained_accuracy(grid))


if __name__ == "__main__":
    main()
