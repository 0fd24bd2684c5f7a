"""Whose answers a judge compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import UserError
from ..recipe.keys import LOSS_KEYS, REFERENCE_KEYS, split
from .evaluators import Judged
from .spec import BASE, Cell


def baseline_of(judged: Judged, cell: Cell, cells: Sequence[Cell]) -> str | None:
    """The name of the cell, or `base`, that a cell is compared with; None if it is not judged.

    Where the baseline is a loss, it is that loss's cell with the same settings: the recipes agree in all keys, the seed
    included, that are not a loss's own.
    """
    if isinstance(judged.baseline, str):
        return None if judged.baseline == cell.name else judged.baseline
    return next(iter(_fitting(judged.baseline, cell, cells)), None)


def _fitting(baseline: Mapping[str, str], cell: Cell, cells: Sequence[Cell]) -> list[str]:
    loss, wanted = baseline.get(_loss(cell)), _apart_from_the_loss(cell)
    return [each.name for each in cells if _loss(each) == loss and _apart_from_the_loss(each) == wanted]


def check_baselines(judged: Judged, cells: Sequence[Cell]) -> None:
    """
    Raises:
        UserError: if a baseline is no cell or no loss, if the untrained model is one but gives no answers, or if a loss
            is to be compared with one that has no cell with the same settings.
    """
    names, losses = [cell.name for cell in cells], list(dict.fromkeys(map(_loss, cells)))
    if judged.baseline == BASE and not judged.base:
        raise UserError("the judge's baseline is the untrained model: add `base: true` under `judge`.")
    if isinstance(judged.baseline, str):
        if judged.baseline not in (BASE, *names):
            raise UserError(
                f"the judge's baseline {judged.baseline!r} is no cell: write `base`, one of {', '.join(names)}, or a "
                "baseline per loss, such as {sr_dpo: sigmoid}."
            )
        return
    for loss, baseline in judged.baseline.items():
        wrong = next((each for each in (loss, baseline) if each not in losses), None)
        if wrong is not None or loss == baseline:
            raise UserError(
                f"`baseline` of `judge`: {wrong or loss!r} is not another loss of the sweep: {', '.join(losses)}."
            )
        if not any(_loss(cell) == loss and baseline_of(judged, cell, cells) for cell in cells):
            raise UserError(
                f"`baseline` of `judge`: no cell of {loss} has one of {baseline} with the same settings and seed."
            )
    for cell in cells:
        fitting = _fitting(judged.baseline, cell, cells)
        if len(fitting) > 1:
            raise UserError(
                f"`baseline` of `judge`: {cell.name} could be compared with {' or '.join(fitting)}: name one cell as "
                "`baseline`, or sweep them apart."
            )


def _loss(cell: Cell) -> str:
    return ",".join(map(str, split(cell.settings.get("pref_loss", "sigmoid"))))


def _apart_from_the_loss(cell: Cell) -> dict[str, object]:
    return {key: value for key, value in cell.settings.items() if key not in (*LOSS_KEYS, *REFERENCE_KEYS)}
