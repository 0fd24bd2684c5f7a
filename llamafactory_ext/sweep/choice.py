"""Values of an axis that an earlier sweep chooses: `sr_lambda: {best_of: lambda.yaml, by: margin}`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..errors import UserError
from ..recipe.reading import Settings
from .evaluators import Benchmarks, Problems, Strict
from .files import SWEEP_FILE, check_unchanged
from .records import Step
from .results import Result, read_results
from .spec import Sweep, as_list, first_error, read_sweep, written
from .tasks import Agenda

By = Literal["margin", "accuracy", "augmented_accuracy", "gsm8k", "lm_eval"]

# What a cell is chosen by; None where it was not measured.
MEASURES: dict[By, Callable[[Result], float | None]] = {
    "margin": lambda cell: cell.pairs.means.get("margin") if cell.pairs else None,
    "accuracy": lambda cell: cell.pairs.accuracy if cell.pairs else None,
    "augmented_accuracy": lambda cell: cell.pairs.augmented_accuracy if cell.pairs else None,
    "gsm8k": lambda cell: cell.summary["strict"]["accuracy"] if cell.summary else None,
    "lm_eval": lambda cell: cell.benchmarks.average if cell.benchmarks else None,
}


STEPS: dict[By, Step] = {  # whose results these are
    "margin": "pairs",
    "accuracy": "pairs",
    "augmented_accuracy": "pairs",
    "gsm8k": Problems.step,
    "lm_eval": Benchmarks.step,
}


class BestOf(Strict):
    """Where a value comes from.

    Args:
        best_of: the file of the earlier sweep.
        by: `margin`, `accuracy` or `augmented_accuracy` of its held-out pairs, accuracy on its problems (`gsm8k`), or
            the average of its benchmarks (`lm_eval`). The highest is the best; of equal ones, the first.
    """

    best_of: Path
    by: By


@dataclass(frozen=True)
class Choice:
    """A value that was chosen.

    Args:
        key: of the recipe.
        of: the file of the sweep that it was chosen from.
        by: what by.
        place: the values on other axes that it is for.
        value: the chosen one.
        measured: value, as text -> what it was chosen by, the mean over its cells; empty while nothing is measured.
    """

    key: str
    of: str
    by: By
    place: dict[str, Any]
    value: Any
    measured: dict[str, float]

    @property
    def is_preliminary(self) -> bool:
        """Whether it is the first value only, because the earlier sweep is not finished."""
        return not self.measured

    @property
    def told(self) -> str:
        """What was chosen and why, in a sentence."""
        where = ", ".join(f"{key} {written(value)}" for key, value in self.place.items())
        what = f"{self.key} for {where}" if where else self.key
        if self.is_preliminary:
            return f"{what} will be chosen by {self.of}, which is not finished: {written(self.value)} stands for it."
        measured = ", ".join(f"{value}: {number:.4g}" for value, number in self.measured.items())
        return f"{what} is {written(self.value)}, the best by {self.by} of {self.of} ({measured})."


def choose(sweep: Sweep, *, preliminary: bool = False) -> tuple[Sweep, list[Choice]]:
    """The sweep with the values that earlier sweeps choose, and how they were chosen.

    A value is chosen among the cells of the earlier sweep that have the same values on all other axes that both have.

    Args:
        sweep: as its file describes it.
        preliminary: whether an earlier sweep that is not finished is no error: its first value is taken.

    Raises:
        UserError: if an earlier sweep is wrong, not finished, or has not measured what is to be chosen by.
    """
    grids: list[Settings] = []
    choices: list[Choice] = []
    for grid in as_list(sweep.axes):
        asked = {key: _best_of(key, value) for key, value in grid.items() if _is_asked(value)}
        if not asked:
            grids.append(grid)
            continue
        for point in _points({key: value for key, value in grid.items() if key not in asked}):
            made = [_choice(key, best_of, point, preliminary) for key, best_of in asked.items()]
            values = {choice.key: choice.value for choice in made}
            grids.append({key: [values.get(key, point.get(key))] for key in grid})
            choices += [choice for choice in made if choice not in choices]
    return sweep.model_copy(update={"axes": grids}), choices


def _is_asked(value: Any) -> bool:
    return isinstance(value, Mapping) and "best_of" in value


def _best_of(key: str, value: Any) -> BestOf:
    try:
        return BestOf(**value)
    except ValidationError as error:
        raise UserError(
            f"the axis `{key}`: {first_error(error)}: write {{best_of: SWEEP.yaml, by: {'|'.join(MEASURES)}}}."
        ) from error


def _points(axes: Settings) -> Iterator[Settings]:
    values = [value if isinstance(value, list) else [value] for value in axes.values()]
    for point in itertools.product(*values):
        yield dict(zip(axes, point, strict=True))


def _choice(key: str, asked: BestOf, point: Settings, preliminary: bool) -> Choice:
    earlier = read_sweep(asked.best_of)
    if any(_is_asked(value) for grid in as_list(earlier.axes) for value in grid.values()):
        raise UserError(
            f"{asked.best_of} chooses values itself, so `{key}` cannot be chosen from it: name another sweep."
        )
    candidates = {cell.name: cell.place for cell in earlier.cells() if key in cell.place}
    shared = {axis for place in candidates.values() for axis in place} & point.keys()
    place = {axis: point[axis] for axis in point if axis in shared}
    # A cell without one of the axes, because its loss does not take the key, fits every value of it.
    fitting = {
        name: each[key]
        for name, each in candidates.items()
        if all(each.get(axis, value) == value for axis, value in place.items())
    }
    if not fitting:
        where = ", ".join(f"{axis} {written(value)}" for axis, value in place.items())
        raise UserError(
            f"{asked.best_of} has no cell with `{key}`{f' at {where}' if where else ''}: name a sweep over it."
        )
    measured = _measured(earlier, fitting, asked, preliminary)
    best = max(measured, key=lambda value: measured[value]) if measured else written(next(iter(fitting.values())))
    value = next(value for value in fitting.values() if written(value) == best)
    return Choice(key, str(asked.best_of), asked.by, place, value, measured)


def _measured(earlier: Sweep, fitting: Mapping[str, Any], asked: BestOf, preliminary: bool) -> dict[str, float]:
    """The mean over the cells of each value; empty if not all are measured and the choice may be preliminary."""
    found = {name: value for name, value in _current(earlier, asked.by).items() if isfinite(value)}
    missing = [name for name in fitting if name not in found]
    if missing and preliminary:
        return {}
    if missing and STEPS[asked.by] not in earlier.evaluators.steps:
        raise UserError(
            f"{asked.best_of} does not measure `{asked.by}`: add the evaluator to it, or write another `by`, of "
            f"{', '.join(MEASURES)}."
        )
    if missing:
        raise UserError(
            f"{asked.best_of} has no `{asked.by}` of {missing[0]}, or one that is not a number: run `llamafactory-ext "
            f"sweep {asked.best_of}`, or name other values."
        )
    values: dict[str, list[float]] = {}
    for name, value in fitting.items():
        values.setdefault(written(value), []).append(found[name])
    return {value: sum(of_cells) / len(of_cells) for value, of_cells in values.items()}


def _current(earlier: Sweep, by: By) -> dict[str, float]:
    """What each cell of the earlier sweep reached, as far as it was trained and measured as its file says now."""
    if not (earlier.output / SWEEP_FILE).is_file():
        return {}
    agenda = Agenda(earlier, earlier.cells())
    check_unchanged(agenda)
    trained = agenda.trained(agenda.cells)
    tasks = [*(task for cell in trained for task in agenda.cell_tasks(cell)), *agenda.adapter_tasks(trained)]
    done = [task for task in tasks if task.step == STEPS[by] and task.record().state == "done"]
    names = {name for task in done for name in (task.name, *(path.parent.name for path in task.results))}
    measured = {cell.name: MEASURES[by](cell) for cell in read_results(earlier.output).cells if cell.name in names}
    return {name: value for name, value in measured.items() if value is not None}
