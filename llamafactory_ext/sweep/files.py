"""The files that a sweep writes into its folder: recipes, and what the sweep is."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import hashes
from ..data.files import hash_of_data, hash_of_entry
from ..distributions import version
from ..environment import PACKAGES
from ..errors import UserError
from ..whole_files import write_whole
from .records import read_object, read_record
from .shapes import About
from .spec import Cell, notes
from .tasks import WHERE, Agenda
from .work import OURS

SWEEP_FILE = "sweep.json"


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
    check_unchanged(agenda)
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
        **_trained_with(cells),
        "chosen": list(chosen),
        "notes": notes(sweep, cells),
        "versions": {name: number for name in ("llamafactory-ext", *PACKAGES) if (number := version(name))},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    _write_if_new(sweep.output / SWEEP_FILE, json.dumps(about, indent=1))


def _trained_with(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Hashes of what cells train with, beside their recipes: data, its entries in dataset_info.json, files, models."""
    return {
        "data": _data_hashes(cells),
        "entries": {name: hash_of_entry(folder, name) for cell in cells for folder, name in cell.datasets},
        "named": hashes.of_named(cell.settings for cell in cells),
    }


def check_unchanged(agenda: Agenda) -> None:
    """
    Raises:
        UserError: if the data, or a file or model that recipes name, has changed since a cell was trained.
    """
    for kind, now in _trained_with(agenda.cells).items():
        _check_kind(agenda, kind, now)


def _check_kind(agenda: Agenda, kind: str, hashes_now: Mapping[str, Any]) -> None:
    before = read_object(agenda.sweep.output / SWEEP_FILE, About).get(kind, {})
    changed = [name for name, digest in hashes_now.items() if before.get(name, digest) != digest]
    if changed and any(read_record(cell.folder, "train").state == "done" for cell in agenda.cells):
        called = {"data": "the data set ", "entries": "the entry in dataset_info.json of the data set "}.get(kind, "")
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
    found = {name: hash_of_data(folder, name) for folder, name in named}
    return {name: digest for name, digest in found.items() if digest is not None}


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
