"""The sweep's file: a base recipe, axes, and the cells that result."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ..errors import UserError
from ..losses.lookup import get_loss
from ..recipe.keys import OBJECTIVE_KEYS, keys_not_taken, split
from ..recipe.reading import Settings, read_recipe
from .evaluators import Evaluators, Strict

SHORT = {"pref_loss": "", "learning_rate": "lr", "pref_beta": "beta", "num_train_epochs": "epochs"}
SWEEP_OWN = ("output_dir",)  # keys of a recipe that the sweep writes itself
MOVED = {"evaluation": "gsm8k", "held_out": "pairs"}  # keys of earlier releases
BASE, ADAPTERS = "base", "adapters"  # folders of untrained models, and of adapters that are scored together


class Sweep(Strict):
    """A sweep as its file describes it.

    Args:
        recipe: the path of the base recipe, or its keys.
        axes: a list of values per key; or several such grids, whose cells are joined.
        output: the folder of the sweep.
        evaluators: what is done with each trained model.
        gpus_per_cell: the GPUs of one training; 0: none, even if there are some.
        at_once: cells at a time on a machine without GPUs.
        launcher: parameters of submitit's `AutoExecutor`, or of Ray's client.
    """

    recipe: str | dict[str, Any]
    axes: dict[str, Any] | list[dict[str, Any]]
    output: Path
    evaluators: Evaluators = Field(default_factory=Evaluators)
    gpus_per_cell: int = Field(default=1, ge=0)
    at_once: int = Field(default=1, ge=1)
    launcher: dict[str, Any] = Field(default_factory=dict)

    @property
    def references(self) -> Path:
        """Where the reference's log-probabilities are kept, which all cells look up."""
        return self.output / "references"

    def base_recipe(self) -> Settings:
        return read_recipe([self.recipe]) if isinstance(self.recipe, str) else dict(self.recipe)

    def cells(self) -> list[Cell]:
        """Every combination of each grid, in their order. What a loss does not take is dropped from its cells, and
        combinations that are the same without it are one cell.

        Raises:
            UserError: for a wrong axis or loss.
        """
        base = self.base_recipe()
        cells: dict[str, Cell] = {}
        for grid in as_list(self.axes):
            for place in _combinations(grid):
                place, settings = self._recipe(base, place)
                if all(settings != cell.settings for cell in cells.values()):
                    name = _unused(_name(place), cells)
                    cells[name] = Cell(name, place, settings, self.output / "cells" / name)
        if not cells:
            raise UserError("the sweep has no cells: write at least one grid under `axes`.")
        return list(cells.values())

    def _recipe(self, base: Settings, place: Settings) -> tuple[Settings, Settings]:
        """A combination without the keys that its loss does not take, and the recipe that it makes of the base's."""
        settings = {"report_to": "none", "ref_log_probs_cache_dir": str(self.references), **base, **place}
        if settings.get("stage") == "dpo":
            try:
                foreign = keys_not_taken(settings)
            except ValueError as error:
                raise UserError(str(error)) from error
            settings = {key: value for key, value in settings.items() if key not in foreign}
        else:
            del settings["ref_log_probs_cache_dir"]
        return {key: value for key, value in place.items() if key in settings}, settings


@dataclass(frozen=True)
class Cell:
    """One training of a sweep.

    Args:
        name: of its folder; says where on the axes it is.
        place: its values on the axes, those that its loss takes.
        settings: its recipe, but for the `output_dir`.
        folder: recipe, logs, records of what has been done, the trained model, its scores.
    """

    name: str
    place: Mapping[str, Any]
    settings: Settings
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def recipe(self) -> Settings:
        return {**self.settings, "output_dir": str(self.model)}

    @property
    def base_model(self) -> str:
        return str(self.settings.get("model_name_or_path"))

    @property
    def is_adapter(self) -> bool:
        return self.settings.get("finetuning_type", "lora") in ("lora", "oft")

    @property
    def is_preference(self) -> bool:
        return self.settings.get("stage") == "dpo"

    @property
    def has_reference(self) -> bool:
        names = split(self.settings.get("pref_loss", "sigmoid"))
        return self.is_preference and any(get_loss(name).needs_reference for name in names)

    @property
    def data_folder(self) -> str:
        return str(self.settings.get("dataset_dir", "data"))

    @property
    def datasets(self) -> list[tuple[str, str]]:
        """Folder and name of each data set."""
        named = self.settings.get("dataset") or []
        names = named.split(",") if isinstance(named, str) else named
        return [(self.data_folder, name.strip()) for name in names]


def notes(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    """What is worth knowing about a sweep and its results, though nothing is wrong."""
    found = []
    trained = {name for cell in cells for _, name in cell.datasets}
    held_out = sweep.evaluators.pairs
    if held_out is not None and held_out.dataset in trained:
        found.append(
            f"Cells train on the held-out pairs {held_out.dataset!r}: their scores say nothing about new pairs."
        )
    base = sweep.base_recipe()
    names = {str(cell.settings.get("pref_loss", "sigmoid")) for cell in cells}
    refined = [cell.name for cell in cells if cell.is_preference and _is_refined_dpo(cell)]
    if refined and "sr_dpo" in names:
        found.append(
            f"`sr_lambda` makes Sr-DPO of `sigmoid` in {', '.join(refined)}: for DPO, sweep it without the key."
        )
    for key in OBJECTIVE_KEYS:
        without = [cell.name for cell in cells if key in base and cell.is_preference and key not in cell.settings]
        if 0 < len(without) < len(cells):
            found.append(f"`{key}` is left out where the loss does not take it, in {', '.join(without)}.")
    return found


def _is_refined_dpo(cell: Cell) -> bool:
    return cell.settings.get("pref_loss", "sigmoid") == "sigmoid" and bool(cell.settings.get("sr_lambda"))


def read_sweep(path: Path) -> Sweep:
    """
    Raises:
        UserError: if there is no such file, or a key or value of it is wrong; one sentence says what to write instead.
    """
    settings = read_recipe([str(path)])
    for key, kind in MOVED.items():
        if key in settings:
            raise UserError(
                f"{path}: `{key}` is an evaluator now: write its keys as `evaluators: [{{{kind}: {{…}}}}]`."
            )
    try:
        sweep = Sweep(**settings)
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}; see `llamafactory-ext sweep --help`.") from error
    for evaluator in sweep.evaluators.asking:
        evaluator.check()
    return sweep


def first_error(error: ValidationError) -> str:
    """The first of pydantic's errors, with its place."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("dict", "list", "str")))
    return f"`{place}`: {first['msg'].removeprefix('Value error, ').lower()}"


def as_list(axes: Settings | list[Settings]) -> list[Settings]:
    """The grids of `axes`."""
    return axes if isinstance(axes, list) else [axes]


def _combinations(grid: Mapping[str, Any]) -> Iterator[Settings]:
    axes = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    for key, values in axes.items():
        if not values:
            raise UserError(f"the axis `{key}` has no values: write a list of them.")
        if key in SWEEP_OWN:
            raise UserError(f"`{key}` cannot be an axis, because the sweep sets it for every cell: remove it.")
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def _name(place: Mapping[str, Any]) -> str:
    """`minor_dpo-lr1e-05-beta0.1`; characters that are unusual in a file name become `_`."""
    words = [f"{SHORT.get(key, key)}{written(value)}" for key, value in place.items()]
    name = re.sub(r"[^\w.+-]", "_", "-".join(words)).encode()[:200]  # a file's name has at most 255 bytes
    return name.decode(errors="ignore") or "cell"


def _unused(name: str, taken: Container[str]) -> str:
    """The name, or with a number where other values are written alike."""
    return next(n for n in itertools.chain([name], (f"{name}.{i}" for i in itertools.count(2))) if n not in taken)


def written(value: Any) -> str:
    """A value of an axis, as names of cells and methods have it."""
    if isinstance(value, list):
        return ",".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
