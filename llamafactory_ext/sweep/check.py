"""Checks that every cell of a sweep must pass before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..planning.schedule import count_pairs, make_schedule, training_args_of
from ..recipe.reading import check_folders, parse_recipe
from .spec import BASE, Cell, Sweep

# The keys that decide how many pairs there are.
DATA = ("dataset", "dataset_dir", "max_samples", "val_size", "streaming", "mix_strategy", "tokenized_path")


def check(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, int | None]:
    """Parse every cell's recipe and look up its data; its optimizer steps by its name, None if they are not known.

    Raises:
        UserError: for the first cell that is wrong, with its name.
    """
    _check_baselines(sweep)
    counted: dict[str, int | None] = {}
    steps: dict[str, int | None] = {}
    for cell in cells:
        try:
            _, data_args, finetuning_args = parse_recipe(cell.recipe)
            check_folders("model_name_or_path", cell.base_model, also=["outputs/"])
            training_args = training_args_of(cell.recipe)
            data = repr([cell.recipe.get(key) for key in DATA])
            if data not in counted:
                counted[data] = count_pairs(data_args, [])
            schedule = make_schedule(training_args, counted[data], max(1, sweep.gpus_per_cell), data_args.cutoff_len)
        except ValueError as error:
            raise UserError(f"cell {cell.name}: {error}") from error
        if cell.is_adapter and sweep.evaluators.any:
            _check_adapter(sweep, cell, finetuning_args)
        steps[cell.name] = schedule.steps
    return steps


def _check_baselines(sweep: Sweep) -> None:
    """Refuse a baseline of the judge's that is no cell, and the untrained model where it gives no answers."""
    judged = sweep.evaluators.judge
    if judged is None:
        return
    names = [cell.name for cell in sweep.cells()]
    for baseline in dict.fromkeys([judged.baseline] if isinstance(judged.baseline, str) else judged.baseline.values()):
        if baseline == BASE and not judged.base:
            raise UserError("the judge's baseline is the untrained model: add `base: true` under `judge`.")
        if baseline not in (BASE, *names):
            raise UserError(
                f"the judge's baseline {baseline!r} is no cell: write `base`, or one of {', '.join(names)}."
            )
    if not any(judged.baseline_of(name) for name in names):
        raise UserError(f"no cell fits the patterns under `baseline` of `judge`; the cells are {', '.join(names)}.")


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
