"""What a sweep has found so far, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.harness_results import HarnessResults, read_harness
from ..recipe.keys import split
from ..scoring.file import read_scores
from ..scoring.summary import Summary, summarize
from .evaluators import Asking, Benchmarks, Problems
from .files import SWEEP_FILE, read_yaml
from .records import Record, Step, read_object, read_record
from .shapes import About, Judgments, Scores, State, Trained, check_logs, damaged
from .spec import ADAPTERS
from .tasks import JUDGE, MODEL_ITSELF, PAIRS


@dataclass(frozen=True)
class Result:
    """A cell, or an untrained model, and what is known of it.

    Args:
        name: of the cell.
        place: its values on the axes; empty for an untrained model.
        recipe: its recipe, empty for an untrained model.
        folder: its folder.
        records: how each of its commands went.
        summary: the summary that gsm8k.py made, or None.
        correct: whether each problem was solved (strict), by its index; empty where it was not scored.
        pairs: what `llamafactory-ext score` found on held-out pairs, or None.
        margins: the margin of each held-out pair in nats, by its index; empty where there are none.
        benchmarks: what lm-evaluation-harness measured, or None.
        judged: how often its answers were better than those of its baseline, by the summary of `eval judge`, or None.
        outcomes: the judge's verdict on each turn of each question: `id`, `outcome` (win, tie or lose), and `turn` and
            `category` where the questions have them; turns without a verdict are left out.
        augmented_margins: the margins under the augmented prompt, by the pair's index.
        score_gaps: by how much the data's own score of a pair's chosen response is higher, by its index; pairs without
            scores are left out.
    """

    name: str
    place: dict[str, Any]
    recipe: dict[str, Any]
    folder: Path
    records: dict[Step, Record]
    summary: dict[str, Any] | None
    correct: dict[int, bool]
    pairs: Summary | None
    margins: dict[int, float]
    benchmarks: HarnessResults | None = None
    judged: dict[str, Any] | None = None
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    augmented_margins: dict[int, float] = field(default_factory=dict)
    score_gaps: dict[int, float] = field(default_factory=dict)

    @property
    def loss(self) -> str:
        """The loss, several with commas between; of another stage than dpo, the stage."""
        stage = str(self.recipe.get("stage", "sft"))
        return ",".join(map(str, split(self.recipe.get("pref_loss", "sigmoid")))) if stage == "dpo" else stage

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def is_trained(self) -> bool:
        return "train" in self.records and self.records["train"].state == "done"

    @property
    def train_seconds(self) -> float | None:
        """Of the training itself, without loading and saving, as transformers measures it; None if it was resumed."""
        file = self.model / "train_results.json"
        if not (self.is_trained and file.is_file()) or self.records["train"].resumed:
            return None
        return read_object(file, Trained).get("train_runtime")

    @cached_property
    def log_history(self) -> list[dict[str, Any]]:
        state = self.model / "trainer_state.json"
        if not (self.is_trained and state.is_file()):
            return []
        logs = list(read_object(state, State).get("log_history", []))
        check_logs(logs, state)
        return logs


@dataclass(frozen=True)
class SweepResults:
    """Everything that the folder of a sweep holds.

    Args:
        about: sweep.json.
        cells, bases: trained models, and those that they start from.
    """

    about: dict[str, Any]
    cells: list[Result]
    bases: list[Result]


def read_results(folder: Path) -> SweepResults:
    """
    Raises:
        UserError: if the folder is not that of a sweep.
    """
    file = folder / SWEEP_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {SWEEP_FILE}: name the `output` of a `llamafactory-ext sweep`.")
    about = read_object(file, About)
    groups = {base["name"]: base["fingerprints"] for base in about["bases"] if base["name"].startswith(ADAPTERS)}
    cells = [_result(folder / "cells" / cell["name"], cell, groups) for cell in about["cells"]]
    bases = [_result(folder / base["name"], base, {}) for base in about["bases"]]
    return SweepResults(about, cells, bases)


def _result(own: Path, about: dict[str, Any], groups: dict[str, dict[str, str]]) -> Result:
    """What a folder holds, as far as it belongs to the sweep as it is now, going by its records' fingerprints."""
    current = {step: read_record(own, step) for step, fingerprint in about["fingerprints"].items()}
    current = {step: record for step, record in current.items() if record.fingerprint == about["fingerprints"][step]}

    def run_of(evaluator: type[Asking]) -> Path | None:
        """The folder with what a command of the evaluator's has found."""
        if evaluator.step in current:
            return own / evaluator.folder / MODEL_ITSELF
        for group, fingerprints in groups.items():  # adapters are asked together, beside the cells' folder
            folder = own.parents[1] / group
            run = folder / evaluator.folder / str(about["name"])
            known = fingerprints.get(evaluator.step)
            if known and read_record(folder, evaluator.step).fingerprint == known and run.is_dir():
                return run
        return None

    scored, measured = run_of(Problems), run_of(Benchmarks)
    scores = _scores(scored) if scored else {}
    file = own / "recipe.yaml"
    recipe = read_yaml(file) if file.is_file() else {}
    _check_numbers(recipe, file)
    has_pairs = "pairs" in current and (own / PAIRS).is_file()
    pairs = read_scores(own / PAIRS) if has_pairs else []
    is_measured = measured is not None and (measured / Benchmarks.result).is_file()
    judged = _judgments(own / JUDGE / "results.json") if "judge" in current else {}
    rows = [row for row in pairs if not row["skipped"]]
    return Result(
        name=about["name"],
        place=about.get("place", {}),
        recipe=recipe,
        folder=own,
        records=current,
        summary=scores["summary"] | {"extractor": scores.get("extractor")} if scores else None,
        correct={row["index"]: row["strict"]["correct"] for row in scores.get("rows", [])},
        pairs=summarize(pairs) if has_pairs else None,
        margins={row["index"]: row["margin"] for row in rows},
        benchmarks=read_harness(measured) if measured and is_measured else None,
        judged=judged.get("summary"),
        outcomes=[row for row in judged.get("rows", []) if row["outcome"]],
        augmented_margins=_by_pair(rows, "augmented_margin"),
        score_gaps=_score_gaps(rows),
    )


def _by_pair(rows: Sequence[dict[str, Any]], column: str) -> dict[int, float]:
    """A column by the pair's index, of the rows that have it."""
    return {row["index"]: row[column] for row in rows if row.get(column) is not None}


def _score_gaps(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    chosen, rejected = _by_pair(rows, "score_chosen"), _by_pair(rows, "score_rejected")
    return {index: chosen[index] - rejected[index] for index in chosen if index in rejected}


def _judgments(file: Path) -> dict[str, Any]:
    found = read_object(file, Judgments)
    judged = sum(row["outcome"] is not None for row in found.get("rows", []))
    if found and judged != found["summary"]["judged"]:
        raise damaged(file, f"{judged} rows of {found['summary']['judged']} verdicts")
    return found


def _scores(run: Path) -> dict[str, Any]:
    file = run / "results.json"
    found = read_object(file, Scores)
    if found and len(found["rows"]) != found["summary"]["problems"]:
        raise damaged(file, f"{len(found['rows'])} rows of {found['summary']['problems']} problems")
    return found


def _check_numbers(recipe: dict[str, Any], file: Path) -> None:
    for key in ("learning_rate", "pref_beta"):
        try:
            float(recipe.get(key) or 0)
        except (TypeError, ValueError) as error:
            raise damaged(file, f"{key} is not a number") from error
