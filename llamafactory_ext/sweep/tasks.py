"""What a sweep has to do: the commands of its cells, in their order, and what of it is done."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..environment import PACKAGES, version
from ..errors import UserError
from ..pairs.files import whole_file
from .spec import BASE, Cell, Evaluation, Sweep
from .work import LLAMAFACTORY, OURS, Task

SWEEP_FILE = "sweep.json"
PAIRS = "pairs.jsonl"
SCORES = "scores"  # the folder in a cell's that gsm8k.py writes to


def chains_of(sweep: Sweep, cells: Sequence[Cell]) -> list[list[Task]]:
    """Commands that need each other stand in one chain, in their order: the untrained models', then the cells'."""
    return [*([task] for task in base_tasks(sweep, cells)), *(cell_tasks(sweep, cell) for cell in cells)]


def cell_tasks(sweep: Sweep, cell: Cell) -> list[Task]:
    """The commands of a cell, each needing the one before; adapters are scored together, later."""
    tasks = [train_task(cell)]
    if sweep.evaluation is not None and not cell.is_adapter:
        tasks.append(_score(sweep.evaluation, cell.name, cell.folder, str(cell.model)))
    if sweep.held_out is not None:
        tasks.append(Task(cell.name, "pairs", cell.folder, _score_pairs(sweep, cell), fresh=cell.folder / PAIRS))
    return tasks


def train_task(cell: Cell) -> Task:
    return Task(cell.name, "train", cell.folder, (LLAMAFACTORY, "train", str(cell.recipe_file)), fresh=cell.model)


def base_tasks(sweep: Sweep, cells: Sequence[Cell]) -> list[Task]:
    """Scoring each model that cells start from, but for those that are scored with adapters of theirs."""
    if sweep.evaluation is None or not sweep.evaluation.base:
        return []
    models = dict.fromkeys(cell.base_model for cell in cells)
    alone = [model for model in models if not any(c.is_adapter and c.base_model == model for c in cells)]
    names = _names(list(models), BASE)
    return [_score(sweep.evaluation, names[model], sweep.output / names[model], model) for model in alone]


def adapter_tasks(sweep: Sweep, trained: Sequence[Cell]) -> list[Task]:
    """Scoring all trained adapters of a model in one load of the engine."""
    adapters = [cell for cell in trained if cell.is_adapter]
    if sweep.evaluation is None or not adapters:
        return []
    names = _names(list(dict.fromkeys(cell.base_model for cell in adapters)), "adapters")
    tasks = []
    for model, name in names.items():
        words = [word for c in adapters if c.base_model == model for word in ("--adapter", f"{c.name}={c.model}")]
        words += [] if sweep.evaluation.base else ["--skip-base"]
        tasks.append(_score(sweep.evaluation, name, sweep.output / name, model, *words))
    return tasks


def _names(models: Sequence[str], stem: str) -> dict[str, str]:
    """A name per model: the stem alone if there is one model only."""
    return {model: stem if len(models) == 1 else f"{stem}.{number}" for number, model in enumerate(models, start=1)}


def _score(evaluation: Evaluation, name: str, folder: Path, model: str, *more: str) -> Task:
    options = [word for key, value in evaluation.options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words = [evaluation.python or sys.executable, str(evaluation.script), "--engine", evaluation.engine]
    words += ["--model", model, "--data", evaluation.data, "--output", str(folder / SCORES), *options, *more]
    return Task(name, "score", folder, tuple(words))


def _score_pairs(sweep: Sweep, cell: Cell) -> tuple[str, ...]:
    assert sweep.held_out is not None
    words = [OURS, "score", str(cell.recipe_file), f"dataset={sweep.held_out.dataset}"]
    if sweep.held_out.max_samples is not None:
        words.append(f"max_samples={sweep.held_out.max_samples}")
    if cell.is_adapter:
        words.append(f"adapter_name_or_path={cell.model}")
    else:
        words += [f"model_name_or_path={cell.model}", f"ref_model={cell.settings.get('ref_model', cell.base_model)}"]
    return (*words, "--output", str(cell.folder / PAIRS))


def write_recipes(cells: Sequence[Cell]) -> None:
    """Write every cell's recipe into its folder.

    Raises:
        UserError: if a cell was trained with another one; nothing is written then.
    """
    for cell in cells:
        is_trained = train_task(cell).record().state in ("done", "running")
        if is_trained and (other := _difference(read_yaml(cell.recipe_file), cell.recipe)):
            raise UserError(
                f"{cell.folder} was trained with another `{other}`: name another `output`, or remove this folder."
            )
    for cell in cells:
        _write_if_new(cell.recipe_file, yaml.safe_dump(cell.recipe, sort_keys=False, allow_unicode=True))


def write_sweep(sweep: Sweep, cells: Sequence[Cell], file: Path) -> None:
    """Write what the sweep is into its folder, for whoever finds it there, and for the report."""
    about = {
        "file": str(file),
        "command": f"{OURS} sweep {file}",
        "sweep": sweep.model_dump(mode="json"),
        "cells": [{"name": cell.name, "place": cell.place} for cell in cells],
        "bases": {task.name: task.words[task.words.index("--model") + 1] for task in base_tasks(sweep, cells)},
        "data": _data_hashes(cells),
        "versions": {name: number for name in ("llamafactory-ext", *PACKAGES) if (number := version(name))},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    _write_if_new(sweep.output / SWEEP_FILE, json.dumps(about, indent=1))


def _write_if_new(path: Path, text: str) -> None:
    """Jobs of a cluster that share a folder come to write the same again; then nobody writes."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with whole_file(path) as file:
            file.write(text)


def _data_hashes(cells: Sequence[Cell]) -> dict[str, str]:
    """sha256 of every local file that cells train on, by data set."""
    hashes = {}
    for folder, names in dict.fromkeys(
        (c.settings.get("dataset_dir", "data"), c.settings.get("dataset")) for c in cells
    ):
        info = Path(folder, "dataset_info.json")
        known = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
        for name in str(names or "").split(","):
            path = Path(folder, known.get(name.strip(), {}).get("file_name", ""))
            if path.is_file():
                with path.open("rb") as content:
                    hashes[name.strip()] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _difference(recorded: dict[str, Any], now: dict[str, Any]) -> str | None:
    return next((key for key in sorted({*recorded, *now}) if recorded.get(key) != now.get(key)), None)


def progress_of(task: Task) -> tuple[int, int | None, str]:
    """How far a running command is: done, in all (None: unknown), and a word about it."""
    if task.step == "train" and task.fresh is not None:
        lines = whole_lines(task.fresh / "trainer_log.jsonl")
        if lines:
            last = json.loads(lines[-1])
            return last["current_steps"], last["total_steps"], f"loss {last['loss']:.3f}" if "loss" in last else ""
    if task.step == "score":
        return sum(len(whole_lines(file)) for file in (task.folder / SCORES).glob("*/generations.jsonl")), None, ""
    return 0, None, ""


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a file that another process may be writing to."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()
