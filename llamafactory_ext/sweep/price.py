"""What the trainings of a sweep cost in GPU hours, before they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..planning.cost import Gpu, reference_operations, training_operations
from ..planning.model_shape import read_model
from ..planning.schedule import Schedule
from ..recipe.keys import split
from .spec import Cell

REFINED = ("sr_dpo", "sr_ipo")


@dataclass(frozen=True)
class Pricing:
    """What is priced.

    Args:
        gpu: what the trainings run on.
        tokens: of a sequence, prompt and response; None: each recipe's `cutoff_len`, which is more than there will be.
    """

    gpu: Gpu
    tokens: int | None = None


@dataclass(frozen=True)
class Price:
    """What a sweep's trainings cost.

    Args:
        cells: GPU hours of each cell's training, by its name; None where something is not known.
        reference: GPU hours of the reference's log-probabilities, which all cells share.
        unknown: why something is not known; empty if all is.
    """

    cells: Mapping[str, float | None]
    reference: float
    unknown: str = ""

    @property
    def total(self) -> float:
        """GPU hours of what is known."""
        return self.reference + sum(hours or 0.0 for hours in self.cells.values())


def price(cells: Sequence[Cell], schedules: Mapping[str, Schedule], pricing: Pricing) -> Price:
    """The price of cells that are to be trained; `schedules` by their names."""
    gpu = pricing.gpu
    hours: dict[str, float | None] = {}
    references: dict[tuple[object, ...], float] = {}
    unknown = ""
    for cell in cells:
        schedule, length = schedules[cell.name], pricing.tokens or int(cell.settings.get("cutoff_len", 2048))
        try:
            hours[cell.name] = _training(cell, schedule, gpu, length)
            for key, needed in _reference(cell, schedule, gpu, length).items():
                references[key] = max(needed, references.get(key, 0.0))  # augmented pairs come on top of plain ones
        except UserError as error:
            hours[cell.name], unknown = None, str(error)
    return Price(hours, sum(references.values()), unknown)


def _training(cell: Cell, schedule: Schedule, gpu: Gpu, length: int) -> float:
    if schedule.steps is None:
        raise UserError("the number of pairs is unknown: make the data first, or set max_steps.")
    operations = training_operations(
        read_model(cell.base_model, bool(cell.settings.get("trust_remote_code"))),
        schedule.steps * schedule.global_batch,
        length,
        full=cell.settings.get("finetuning_type", "lora") == "full",
        checkpointing=not cell.settings.get("disable_gradient_checkpointing", False),
        refined=_is_refined(cell),
    )
    # Other stages have one answer a row, not two.
    return gpu.hours(operations) / (1 if cell.settings.get("stage") in ("dpo", "rm") else 2)


def _reference(cell: Cell, schedule: Schedule, gpu: Gpu, length: int) -> dict[tuple[object, ...], float]:
    """The hours of a cell's reference, by what it depends on: cells that agree in it share them."""
    if not cell.has_reference or schedule.pairs is None:
        return {}
    model = str(cell.settings.get("ref_model") or cell.base_model)
    operations = reference_operations(read_model(model), schedule.pairs, length, refined=_is_refined(cell))
    key = (model, *cell.datasets, cell.settings.get("max_samples"), length)
    return {key: gpu.hours(operations)}


def _is_refined(cell: Cell) -> bool:
    names = split(cell.settings.get("pref_loss", "sigmoid"))
    return cell.is_preference and (bool(cell.settings.get("sr_lambda")) or any(name in REFINED for name in names))
