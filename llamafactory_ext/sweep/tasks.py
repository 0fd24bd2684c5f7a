"""The commands of a sweep in their order, and which of them are done."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .. import hashes
from ..data.files import file_of, registered
from ..distributions import version
from ..environment import PACKAGES
from ..errors import UserError
from ..evaluation import GSM8K
from ..scoring.file import unfinished_path
from ..whole_files import write_whole
from .records import read_object, read_record
from .shapes import About
from .spec import ADAPTERS, BASE, Cell, Sweep, notes
from .work import LLAMAFACTORY, OURS, Task

SWEEP_FILE = "sweep.json"
PAIRS = "pairs.jsonl"
SCORES = "scores"  # the folder that gsm8k.py writes to
MODEL_ITSELF = "base"  # what gsm8k.py calls the model that it was given, beside adapters
WHERE = ("output_dir", "ref_log_probs_cache_dir")  # keys of a recipe that do not change what is trained


class Agenda:
    """The commands of a sweep.

    Names and folders come from all of its cells, whichever are asked for: they stay the same with `--only`.
    """

    def __init__(self, sweep: Sweep, cells: Sequence[Cell]) -> None:
        self.sweep = sweep
        self.cells = cells
        adapted = dict.fromkeys(cell.base_model for cell in cells if cell.is_adapter)
        alone = dict.fromkeys(cell.base_model for cell in cells if cell.base_model not in adapted)
        self.groups = _names(list(adapted), ADAPTERS)
        self.bases = _names(list(alone), BASE)

    def chains(self, cells: Sequence[Cell]) -> list[list[Task]]:
        """Commands that need each other stand in one chain, in their order: the untrained models', then the cells'."""
        return [*([task] for task in self.base_tasks(cells)), *(self.cell_tasks(cell) for cell in cells)]

    def base_tasks(self, cells: Sequence[Cell]) -> list[Task]:
        """Scoring each model that cells start from, but for those that are scored with adapters of theirs."""
        if self.sweep.evaluation is None or not self.sweep.evaluation.base:
            return []
        models = dict.fromkeys(cell.base_model for cell in cells if cell.base_model in self.bases)
        return [self._score(self.bases[model], self.sweep.output / self.bases[model], model) for model in models]

    def cell_tasks(self, cell: Cell) -> list[Task]:
        """Training a cell and scoring it; adapters are scored together, later."""
        tasks = [self.train_task(cell)]
        if self.sweep.evaluation is not None and not cell.is_adapter:
            tasks.append(self._score(cell.name, cell.folder, str(cell.model)))
        if self.sweep.held_out is not None and cell.has_reference:
            tasks.append(self._pairs_task(cell))
        return tasks

    def train_task(self, cell: Cell) -> Task:
        made = [cell.folder / SCORES, cell.folder / PAIRS, unfinished_path(cell.folder / PAIRS)]
        made += [self.sweep.output / group / SCORES / cell.name for group in self.groups.values()]
        return Task(
            cell.name,
            "train",
            cell.folder,
            (LLAMAFACTORY, "train", str(cell.recipe_file)),
            fingerprint=hashes.of_value({key: value for key, value in cell.settings.items() if key not in WHERE}),
            outputs=(cell.model,),
            invalidates=tuple(made),
        )

    def trained(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of the cells whose training is done."""
        return [cell for cell in cells if self.train_task(cell).record().state == "done"]

    def adapter_tasks(self, trained: Sequence[Cell]) -> list[Task]:
        """Scoring all trained adapters of a model in one load of the engine."""
        if self.sweep.evaluation is None:
            return []
        tasks = []
        for model, group in self.groups.items():
            adapters = {c.name: c for c in trained if c.is_adapter and c.base_model == model}
            if adapters:
                runs = [*adapters, *([MODEL_ITSELF] if self.sweep.evaluation.base else [])]
                asked = self._unscored(group, model, runs) or runs
                words = [
                    word for run in asked if run in adapters for word in ("--adapter", f"{run}={adapters[run].model}")
                ]
                words += [] if MODEL_ITSELF in asked else ["--skip-base"]
                tasks.append(self._score(group, self.sweep.output / group, model, *words, runs=runs))
        return tasks

    def _unscored(self, group: str, model: str, runs: Sequence[str]) -> list[str]:
        """The runs of a group without results: the others are not asked again when adapters have been added."""
        folder = self.sweep.output / group
        if read_record(folder, "score").fingerprint != self.score_fingerprint(model):
            return list(runs)
        return [run for run in runs if not (folder / SCORES / run / "results.json").is_file()]

    def _score(self, name: str, folder: Path, model: str, *more: str, runs: Sequence[str] = (MODEL_ITSELF,)) -> Task:
        evaluation = self.sweep.evaluation
        assert evaluation is not None
        script = GSM8K if evaluation.script is None else (str(evaluation.script),)
        words = [evaluation.python or sys.executable, *script, "--engine", evaluation.engine]
        words += ["--model", model, "--data", evaluation.data, "--output", str(folder / SCORES)]
        words += option_words(evaluation.options)
        return Task(
            name,
            "score",
            folder,
            (*words, *more),
            fingerprint=self.score_fingerprint(model),
            resumes=(folder / SCORES,),
            results=tuple(folder / SCORES / run / "results.json" for run in runs),
        )

    def score_fingerprint(self, model: str) -> str:
        """A hash of what the scores of a model depend on."""
        evaluation = self.sweep.evaluation
        asked = evaluation and evaluation.model_dump(mode="json", exclude={"python", "script", "base"})
        return hashes.of_value([model, asked, self.asked_files])

    @cached_property
    def asked_files(self) -> list[str]:
        """Hashes of the problems and of the files that options name, as a prompt's, where they are local."""
        evaluation = self.sweep.evaluation
        named = [evaluation.data, *evaluation.options.values()] if evaluation else []
        paths = [Path(each) for each in named if isinstance(each, str) and each]  # an empty path is this folder
        return [hashes.of_data(path) for path in paths if path.exists()]

    def _pairs_task(self, cell: Cell) -> Task:
        held_out = self.sweep.held_out
        assert held_out is not None
        output = cell.folder / PAIRS
        most = "null" if held_out.max_samples is None else held_out.max_samples  # the recipe's is for training
        words = [OURS, "score", str(cell.recipe_file), f"dataset={held_out.dataset}", f"max_samples={most}"]
        if cell.is_adapter:
            words.append(f"adapter_name_or_path={cell.model}")
        else:
            reference = cell.settings.get("ref_model", cell.base_model)
            words += [f"model_name_or_path={cell.model}", f"ref_model={reference}"]
        return Task(
            cell.name,
            "pairs",
            cell.folder,
            (*words, "--output", str(output)),
            fingerprint=hashes.of_value([held_out.model_dump(), self.held_out_pairs[cell.data_folder]]),
            outputs=(output,),
            resumes=(unfinished_path(output),),
            results=(output,),
        )

    @cached_property
    def held_out_pairs(self) -> dict[str, str | None]:
        """A hash of the held-out pairs by the data folder that they are in; None if they are those of a hub."""
        held_out = self.sweep.held_out
        folders = dict.fromkeys(cell.data_folder for cell in self.cells) if held_out else ()
        return {folder: _hash_of_data(folder, held_out.dataset) for folder in folders if held_out}


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line, `--batch-size=8`, mappings as JSON; true is the name alone, false nothing."""
    words = []
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        if value is not False:
            given = json.dumps(value) if isinstance(value, dict) else value
            words.append(name if value is True else f"{name}={given}")
    return words


def _names(models: Sequence[str], stem: str) -> dict[str, str]:
    """A name per model: the stem alone if there is one model only."""
    return {model: stem if len(models) == 1 else f"{stem}.{number}" for number, model in enumerate(models, start=1)}


# --- files of the sweep ----------------------------------------------------------------------------------------------


def write_recipes(agenda: Agenda, cells: Sequence[Cell]) -> None:
    """Write every cell's recipe into its folder.

    Raises:
        UserError: if any cell of the sweep was trained with another one; nothing is written then.
    """
    for cell in agenda.cells:
        record = read_record(cell.folder, "train")
        if record.state in ("done", "running") and record.fingerprint != agenda.train_task(cell).fingerprint:
            other = _difference(read_yaml(cell.recipe_file), cell.recipe)
            raise UserError(
                f"{cell.folder} was trained with another `{other}`: write another `output`, or remove this folder."
            )
    for cell in cells:
        _write_if_new(cell.recipe_file, yaml.safe_dump(cell.recipe, sort_keys=False, allow_unicode=True))


def write_sweep(agenda: Agenda, file: Path) -> None:
    """Write what the sweep is into its folder, for whoever finds it there, and for the report.

    Raises:
        UserError: if the data, or a file or model that recipes name, has changed since a cell was trained.
    """
    sweep, cells = agenda.sweep, agenda.cells
    data = _data_hashes(cells)
    named = hashes.of_named(cell.settings for cell in cells)
    _check_unchanged(agenda, "data", data)
    _check_unchanged(agenda, "named", named)
    shared = [(model, name) for model, name in {**agenda.bases, **agenda.groups}.items()]
    about = {
        "file": str(file),
        "command": f"{OURS} sweep {file}",
        "sweep": sweep.model_dump(mode="json"),
        "cells": [
            {"name": c.name, "place": c.place, "fingerprints": {t.step: t.fingerprint for t in agenda.cell_tasks(c)}}
            for c in cells
        ],
        "bases": [
            {"name": name, "model": model, "fingerprints": {"score": agenda.score_fingerprint(model)}}
            for model, name in shared
        ],
        "data": data,
        "named": named,
        "notes": notes(sweep, cells),
        "versions": {name: number for name in ("llamafactory-ext", *PACKAGES) if (number := version(name))},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    _write_if_new(sweep.output / SWEEP_FILE, json.dumps(about, indent=1))


def _check_unchanged(agenda: Agenda, kind: str, hashes_now: Mapping[str, Any]) -> None:
    before = read_object(agenda.sweep.output / SWEEP_FILE, About).get(kind, {})
    changed = [name for name, digest in hashes_now.items() if before.get(name, digest) != digest]
    if changed and any(read_record(cell.folder, "train").state == "done" for cell in agenda.cells):
        called = "the data set " if kind == "data" else ""
        raise UserError(
            f"{called}{changed[0]!r} has changed since cells in {agenda.sweep.output} were trained with it: write "
            "another `output`, or remove this folder."
        )


def _write_if_new(path: Path, text: str) -> None:
    """Jobs of a cluster that share a folder come to write the same again; then nobody writes."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _data_hashes(cells: Sequence[Cell]) -> dict[str, str]:
    """sha256 of every local file or folder that cells train on, by data set."""
    named = dict.fromkeys(data for cell in cells for data in cell.datasets)
    found = {name: _hash_of_data(folder, name) for folder, name in named}
    return {name: digest for name, digest in found.items() if digest is not None}


def _hash_of_data(folder: str, name: str) -> str | None:
    """Of what a folder's dataset_info.json says that a data set is; None if that is no local file or folder."""
    file = file_of(registered(Path(folder)), name)
    return None if file is None or not Path(folder, file).exists() else hashes.of_data(Path(folder, file))


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe that the sweep has written.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: remove it, then run `llamafactory-ext sweep` again.") from error


def _difference(recorded: dict[str, Any], now: dict[str, Any]) -> str | None:
    keys = sorted({*recorded, *now}.difference(WHERE))
    return next((key for key in keys if recorded.get(key) != now.get(key)), None)
