"""Self-refinement on pairs whose gap in quality is known: a model from scratch, a pilot, the grid, and the claims.

    python examples/reproduce/graded.py

Everything is under outputs/graded; interrupted, even by kill -9, the same command goes on. Run it in the checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory_ext.recipe.reading import read_recipe
from llamafactory_ext.report.claims import as_markdown
from llamafactory_ext.report.claims.graded import Graded, graded_findings
from llamafactory_ext.report.page import write_report
from llamafactory_ext.report.table import groups
from llamafactory_ext.report.variants import Variant
from llamafactory_ext.scoring.file import read_scores
from llamafactory_ext.scoring.scorer import score_pairs
from llamafactory_ext.sweep.results import SweepResults
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from graded_figure import draw  # noqa: E402
from graded_pairs import RATINGS, make_data  # noqa: E402
from start import Shape, make_model  # noqa: E402
from steps import accuracies, choose_start, fill_in, make_whole, sweep, train, untrained_accuracy  # noqa: E402

RESULTS = Path("outputs/graded")  # what the recipes name
SHAPE = Shape(hidden=128, intermediate=384, layers=4, heads=4)  # 0.8 million parameters
ABLE = 0.9  # of the problems solved by the model that trainings start from
INTACT = 0.75  # of what the untrained model solves, DPO must still solve at the grid's learning rate
FOR_TRAINING = ("max_samples", "ipo_length_normalize")  # keys that say nothing of held-out pairs and Sr-DPO


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not (Path.cwd() / "examples" / "reproduce").is_dir():
        sys.exit("Run it in the checkout's folder, which its recipes' paths start from.")
    make_whole(RESULTS / "data", make_data)
    make_whole(RESULTS / "random", lambda folder: make_model(folder, RESULTS / "data", SHAPE))
    if not (RESULTS / "start").is_dir():
        train(HERE / "graded_sft.yaml", RESULTS)
        choose_start(RESULTS, ABLE)
    pilot = sweep(HERE / "graded_pilot.yaml", RESULTS / "pilot")
    rate = choose_rate(accuracies(pilot), untrained_accuracy(pilot))
    print(f"The grid's learning rate, by the pilot: {rate:g}", flush=True)
    grid = sweep(fill_in(HERE / "graded_grid.yaml", {"RATE": rate}, RESULTS), RESULTS / "grid")
    for name in ("pilot", "grid"):
        print(write_report(RESULTS / name, RESULTS / name / "report"))
    study, start = graded_study(grid), score(RESULTS / "start", RESULTS / "random", "start")
    found = graded_findings(study, column(start, "augmented_margin") - column(start, "margin"), gaps(start))
    write_whole(RESULTS / "claims.md", as_markdown(found))
    draw(study, RESULTS / "graded.png")
    print(RESULTS / "claims.md")


def choose_rate(accuracies: Mapping[float, float], untrained: float) -> float:
    """The largest rate of the pilot's ladder at which DPO leaves the model `INTACT`; the smallest if there is none.

    So the refinement term, which grows with the margins, is as large as it can be in a model that still works.
    """
    intact = [rate for rate, accuracy in accuracies.items() if accuracy >= INTACT * untrained]
    return max(intact) if intact else min(accuracies)


# --- held-out pairs --------------------------------------------------------------------------------------------------


def graded_study(grid: SweepResults) -> dict[Variant, Graded]:
    """Every held-out pair's margin and Delta by loss and lambda, as means over the seeds."""
    study = {}
    for group in groups([cell for cell in grid.cells if cell.is_trained]):
        scored = [score(cell.model, RESULTS / "start", cell.name) for cell in group.cells]
        margin, delta = (np.mean([column(rows, name) for rows in scored], axis=0) for name in ("margin", "refinement"))
        study[group.variant] = Graded(gaps(scored[0]), margin, delta)
    return study


def score(model: Path, reference: Path, name: str) -> list[dict[str, Any]]:
    """A model's held-out pairs, with and without `sr_prompt`, whatever loss it was trained by."""
    output = RESULTS / "held_out" / f"{name}.jsonl"
    if not output.is_file():
        recipe = read_recipe([str(HERE / "graded_preference.yaml")])
        recipe = {key: value for key, value in recipe.items() if key not in FOR_TRAINING}
        own = {"pref_loss": "sr_dpo", "dataset": "held_out"}
        paths = {"model_name_or_path": str(model), "ref_model": str(reference)}
        for done, total in score_pairs(recipe | own | paths, output, 50):
            print(f"\r{name}: {done} of {total} pairs", end="", flush=True)
        print()
    return read_scores(output)


def gaps(rows: list[dict[str, Any]]) -> np.ndarray:
    """How many more wrong results the rejected answers have, by the answers' ratings."""
    wrong = {float(rating): count for count, rating in enumerate(RATINGS)}
    return np.array([wrong[row["score_rejected"]] - wrong[row["score_chosen"]] for row in rows], dtype=np.float64)


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


if __name__ == "__main__":
    main()
