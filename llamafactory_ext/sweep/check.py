"""Checks that every cell of a sweep must pass before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.files import file_of, registered
from ..errors import UserError
from ..planning.schedule import Schedule, count_pairs, make_schedule, training_args_of
from ..recipe.reading import check_folders, parse_recipe
from .judging import check_baselines
from .spec import Cell, Sweep

# The keys that decide how many pairs there are.
DATA = ("dataset", "dataset_dir", "max_samples", "val_size", "streaming", "mix_strategy", "tokenized_path")


def check(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, Schedule]:
    """Parse every cell's recipe and look up its data; the length of its training by its name.

    Raises:
        UserError: for the first cell that is wrong, with its name.
    """
    if sweep.evaluators.judge is not None:
        check_baselines(sweep.evaluators.judge, sweep.cells())
    counted: dict[str, int | None] = {}
    schedules: dict[str, Schedule] = {}
    for cell in cells:
        try:
            _, data_args, finetuning_args = parse_recipe(cell.recipe)
            check_folders("model_name_or_path", cell.base_model, also=["outputs/"])
            training_args = training_args_of(cell.recipe)
            data = repr([cell.recipe.get(key) for key in DATA])
            if data not in counted:
                counted[data] = count_pairs(data_args, [])
            gpus = max(1, sweep.gpus_per_cell)
            schedules[cell.name] = make_schedule(training_args, counted[data], gpus, data_args.cutoff_len)
        except ValueError as error:
            raise UserError(f"cell {cell.name}: {error}") from error
        if cell.is_adapter and sweep.evaluators.any:
            _check_adapter(sweep, cell, finetuning_args)
    return schedules


def what_is_missing(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    """What a run of the sweep would be refused for, although its file is right: data, interpreters, questions."""
    found = missing_data(sweep, cells)
    for evaluator in sweep.evaluators.asking:
        try:
            evaluator.check_files()
        except UserError as error:
            found.append(str(error))
    return found


def missing_data(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    """The data sets of cells and of the held-out pairs that are local files and not there, a sentence for each."""
    pairs = sweep.evaluators.pairs
    named = dict.fromkeys(each for cell in cells for each in cell.datasets)
    if pairs is not None:
        named |= dict.fromkeys((cell.data_folder, pairs.dataset) for cell in cells)
    found = []
    for folder, name in named:
        known = registered(Path(folder))
        file = file_of(known, name)
        if known and name not in known:
            found.append(f"{folder}/dataset_info.json has no data set {name!r}: make it with `llamafactory-ext data`.")
        elif file is not None and not Path(folder, file).exists():
            found.append(f"the data set {name!r} is not there: make {Path(folder, file)} with `llamafactory-ext data`.")
    return found


def _check_adapter(sweep: Sweep, cell: Cell, finetuning_args: Any) -> None:
    """Refuse adapters that the evaluation could not load onto the recipe's model."""
    earlier = str(cell.settings.get("adapter_name_or_path") or "").split(",")
    if len(earlier) > 1 or (earlier != [""] and finetuning_args.create_new_adapter):
        raise UserError(
            f"cell {cell.name}: an adapter on top of another cannot be scored on {cell.base_model} alone: merge the "
            "earlier one with `llamafactory-cli export` and name the result, or leave `evaluators` out."
        )
    is_plain = finetuning_args.finetuning_type == "lora" and not (
        finetuning_args.use_dora or finetuning_args.additional_target
    )
    vllm = next((each.kind for each in sweep.evaluators.asking if each.engine == "vllm"), None)
    if vllm is not None and not is_plain:
        raise UserError(
            f"cell {cell.name}: vLLM takes plain LoRA adapters only, without use_dora and additional_target: "
            f"write `engine: hf` under `{vllm}`, or leave it out."
        )
