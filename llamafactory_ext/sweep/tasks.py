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
from ..evaluation import command
from ..scoring.file import unfinished_path
from ..whole_files import write_whole
from .evaluators import Asking, HeldOut, Judged, option_words
from .judging import baseline_of
from .records import read_object, read_record
from .shapes import About
from .spec import ADAPTERS, BASE, Cell, Sweep, notes
from .work import LLAMAFACTORY, OURS, Task

SWEEP_FILE = "sweep.json"
PAIRS = "pairs.jsonl"
ANSWERS, JUDGE = Judged.folder, "judge"  # folders of a cell
MODEL_ITSELF = "base"  # what the evaluation's commands call the model that they were given, beside adapters
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
        self._contents: dict[Path, str] = {}  # hashes, each computed once

    def chains(self, cells: Sequence[Cell]) -> list[list[Task]]:
        """Commands that need each other stand in one chain, in their order: the untrained models', then the cells'."""
        return [*([task] for task in self.base_tasks(cells)), *(self.cell_tasks(cell) for cell in cells)]

    def base_tasks(self, cells: Sequence[Cell]) -> list[Task]:
        """Asking each model that cells start from, but for those that are asked with adapters of theirs."""
        models = dict.fromkeys(cell.base_model for cell in cells if cell.base_model in self.bases)
        return [
            self._ask(evaluator, self.bases[model], self.sweep.output / self.bases[model], model)
            for model in models
            for evaluator in self.sweep.evaluators.asking
            if evaluator.base
        ]

    def cell_tasks(self, cell: Cell) -> list[Task]:
        """Training a cell and what is done with it alone; adapters are asked together, later."""
        tasks = [self.train_task(cell)]
        if not cell.is_adapter:
            asking = self.sweep.evaluators.asking
            tasks += [self._ask(evaluator, cell.name, cell.folder, str(cell.model)) for evaluator in asking]
        if self.sweep.evaluators.pairs is not None and cell.has_reference:
            tasks.append(self._pairs_task(self.sweep.evaluators.pairs, cell))
        return tasks

    def train_task(self, cell: Cell) -> Task:
        made = [cell.folder / PAIRS, unfinished_path(cell.folder / PAIRS)]
        for evaluator in self.sweep.evaluators.asking:
            made.append(cell.folder / evaluator.folder)
            made += [self.sweep.output / group / evaluator.folder / cell.name for group in self.groups.values()]
        for other in self.cells:
            baseline = self._baseline_of(other)
            made += [other.folder / JUDGE] if baseline is not None and cell.name in (other.name, baseline) else []
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
        """Asking all trained adapters of a model in one load of the engine."""
        tasks = []
        for model, group in self.groups.items():
            adapters = {c.name: c for c in trained if c.is_adapter and c.base_model == model}
            for evaluator in self.sweep.evaluators.asking if adapters else ():
                runs = [*adapters, *([MODEL_ITSELF] if evaluator.base else [])]
                asked = self._unasked(evaluator, group, model, runs) or runs
                words = [
                    word for run in asked if run in adapters for word in ("--adapter", f"{run}={adapters[run].model}")
                ]
                words += [] if MODEL_ITSELF in asked else ["--skip-base"]
                tasks.append(self._ask(evaluator, group, self.sweep.output / group, model, *words, runs=runs))
        return tasks

    def _unasked(self, evaluator: Asking, group: str, model: str, runs: Sequence[str]) -> list[str]:
        """The runs of a group without results: the others are not asked again when adapters have been added."""
        folder = self.sweep.output / group
        if read_record(folder, evaluator.step).fingerprint != self.fingerprint(evaluator, model):
            return list(runs)
        return [run for run in runs if not (folder / evaluator.folder / run / evaluator.result).is_file()]

    def _ask(
        self,
        evaluator: Asking,
        name: str,
        folder: Path,
        model: str,
        *more: str,
        runs: Sequence[str] = (MODEL_ITSELF,),
    ) -> Task:
        output = folder / evaluator.folder
        words = [evaluator.python or sys.executable, *evaluator.command(), "--engine", evaluator.engine]
        words += ["--model", model, *evaluator.words(), "--output", str(output), *option_words(evaluator.options)]
        return Task(
            name,
            evaluator.step,
            folder,
            (*words, *more),
            fingerprint=self.fingerprint(evaluator, model),
            resumes=(output,),
            results=tuple(output / run / evaluator.result for run in runs),
        )

    def fingerprint(self, evaluator: Asking, model: str) -> str:
        """A hash of what the results of a model depend on, the content of local files included."""
        paths = [Path(each) for each in evaluator.named() if isinstance(each, str) and each]  # empty: this folder
        return hashes.of_value([model, evaluator.asked(), [self._content(path) for path in paths if path.exists()]])

    def _content(self, path: Path) -> str:
        if path not in self._contents:
            self._contents[path] = hashes.of_data(path)
        return self._contents[path]

    # --- judging -----------------------------------------------------------------------------------------------------

    def judge_tasks(self, cells: Sequence[Cell]) -> list[Task]:
        """Comparing the answers of cells with those of their baselines, wherever both are there."""
        tasks = [self._judge_task(cell) for cell in cells if self._baseline_of(cell) is not None]
        return [task for task in tasks if all(Path(folder, "answers.jsonl").is_file() for folder in task.reads)]

    def _baseline_of(self, cell: Cell) -> str | None:
        judged = self.sweep.evaluators.judge
        return None if judged is None else baseline_of(judged, cell, self.cells)

    def _judge_task(self, cell: Cell) -> Task:
        judged, baseline = self.sweep.evaluators.judge, self._baseline_of(cell)
        assert judged is not None
        assert baseline is not None
        ours, theirs = self._answers(cell), self._answers_of_baseline(cell, baseline)
        words = [judged.python or sys.executable, *command("judge"), "--a", str(ours), "--b", str(theirs)]
        words += ["--names", f"{cell.name},{baseline}", *judged.judging(), "--output", str(cell.folder / JUDGE)]
        return Task(
            cell.name,
            "judge",
            cell.folder,
            tuple(words),
            fingerprint=hashes.of_value([judged.judging(), self.fingerprint(judged, f"{cell.name} {baseline}")]),
            reads=(ours, theirs),
            resumes=(cell.folder / JUDGE,),
            results=(cell.folder / JUDGE / "results.json",),
        )

    def fingerprints(self, cell: Cell) -> dict[str, str]:
        """Of the commands of a cell's own, by step."""
        tasks = self.cell_tasks(cell)
        tasks += [self._judge_task(cell)] if self._baseline_of(cell) is not None else []
        return {task.step: task.fingerprint for task in tasks}

    def _answers(self, cell: Cell) -> Path:
        """Where the answers of a cell are."""
        if cell.is_adapter:
            return self.sweep.output / self.groups[cell.base_model] / ANSWERS / cell.name
        return cell.folder / ANSWERS / MODEL_ITSELF

    def _answers_of_baseline(self, cell: Cell, name: str) -> Path:
        if name == BASE:  # the untrained model that the cell starts from
            group = self.groups.get(cell.base_model) or self.bases[cell.base_model]
            return self.sweep.output / group / ANSWERS / MODEL_ITSELF
        return self._answers(next(other for other in self.cells if other.name == name))

    def _pairs_task(self, held_out: HeldOut, cell: Cell) -> Task:
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
        held_out = self.sweep.evaluators.pairs
        folders = dict.fromkeys(cell.data_folder for cell in self.cells) if held_out else ()
        return {folder: _hash_of_data(folder, held_out.dataset) for folder in folders if held_out}


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


def write_sweep(agenda: Agenda, file: Path, chosen: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write what the sweep is into its folder, for whoever finds it there, and for the report.

    Args:
        agenda: of all its cells.
        file: the sweep's file.
        chosen: values of axes that earlier sweeps have chosen, and how.

    Raises:
        UserError: if the data, a file or model that recipes name, or a choice has changed since a cell was trained.
    """
    sweep, cells = agenda.sweep, agenda.cells
    data = _data_hashes(cells)
    named = hashes.of_named(cell.settings for cell in cells)
    _check_unchanged(agenda, "data", data)
    _check_unchanged(agenda, "named", named)
    _check_choices(agenda, chosen)
    asking = sweep.evaluators.asking
    about = {
        "file": str(file),
        "command": f"{OURS} sweep {file}",
        "sweep": sweep.model_dump(mode="json"),
        "cells": [{"name": c.name, "place": c.place, "fingerprints": agenda.fingerprints(c)} for c in cells],
        "bases": [
            {"name": name, "model": model, "fingerprints": {e.step: agenda.fingerprint(e, model) for e in asking}}
            for model, name in {**agenda.bases, **agenda.groups}.items()
        ],
        "data": data,
        "named": named,
        "chosen": list(chosen),
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


def _check_choices(agenda: Agenda, chosen: Sequence[Mapping[str, Any]]) -> None:
    """Cells with another value would stand beside those of the value that was best when they were trained."""
    folders = (file.parent for file in agenda.sweep.output.glob("cells/*/train.json"))
    if not any(read_record(folder, "train").state == "done" for folder in folders):
        return
    now = {(each["key"], repr(each["place"])): each for each in chosen}
    for before in read_object(agenda.sweep.output / SWEEP_FILE, About).get("chosen", []):
        each = now.get((before["key"], repr(before["place"])))
        if each is not None and each["value"] != before["value"]:
            raise UserError(
                f"{each['of']} now chooses {each['key']} {each['value']}, where it chose {before['value']} before: "
                f"write another `output`, or {before['value']} in place of the choice."
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
