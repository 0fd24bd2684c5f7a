"""What a sweep has found so far, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..correlation import Summary, summarize
from ..errors import UserError
from ..score import read_scores
from .spec import ADAPTERS
from .tasks import MODEL_ITSELF, PAIRS, SCORES, SWEEP_FILE, read_yaml
from .work import STEPS, Record, Step, read_record


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
    """

    name: str
    place: dict[str, Any]
    recipe: dict[str, Any]
    folder: Path
    records: dict[Step, Record]
    summary: dict[str, Any] | None
    correct: dict[int, bool]
    pairs: Summary | None

    @property
    def loss(self) -> str:
        """The loss; of another stage than dpo, the stage."""
        stage = str(self.recipe.get("stage", "sft"))
        return str(self.recipe.get("pref_loss", "sigmoid")) if stage == "dpo" else stage

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def is_trained(self) -> bool:
        return "train" in self.records and self.records["train"].state == "done"

    @property
    def train_seconds(self) -> float | None:
        """Of the training itself, without loading and saving, as transformers measures it."""
        file = self.model / "train_results.json"
        if not (self.is_trained and file.is_file()):
            return None
        return json.loads(file.read_text(encoding="utf-8")).get("train_runtime")

    @cached_property
    def log_history(self) -> list[dict[str, Any]]:
        state = self.model / "trainer_state.json"
        if not (self.is_trained and state.is_file()):
            return []
        return json.loads(state.read_text(encoding="utf-8"))["log_history"]


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
    about = json.loads(file.read_text(encoding="utf-8"))
    cells = [_cell(cell["name"], cell["place"], folder) for cell in about["cells"]]
    bases = [_result(name, folder / name, folder, {}, {}) for name in about["bases"]]
    return SweepResults(about, cells, bases)


def _cell(name: str, place: dict[str, Any], folder: Path) -> Result:
    file = folder / "cells" / name / "recipe.yaml"
    return _result(name, file.parent, folder, place, read_yaml(file) if file.is_file() else {})


def _result(name: str, own: Path, folder: Path, place: dict[str, Any], recipe: dict[str, Any]) -> Result:
    scores = _scores(own, folder, name)
    steps = {step: read_record(own, step) for step in STEPS}
    return Result(
        name,
        place,
        recipe,
        own,
        records={step: record for step, record in steps.items() if record.state != "to do"},
        summary=scores.get("summary"),
        correct={row["index"]: row["strict"]["correct"] for row in scores.get("rows", [])},
        pairs=summarize(read_scores(own / PAIRS)) if (own / PAIRS).is_file() else None,
    )


def _scores(own: Path, folder: Path, name: str) -> dict[str, Any]:
    """Where gsm8k.py put them: alone, or together with other adapters of a model, the model itself as `base`."""
    places = [own / SCORES / MODEL_ITSELF, *(group / SCORES / name for group in sorted(folder.glob(f"{ADAPTERS}*")))]
    file = next((place / "results.json" for place in places if (place / "results.json").is_file()), None)
    return json.loads(file.read_text(encoding="utf-8")) if file else {}
