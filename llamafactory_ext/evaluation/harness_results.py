"""Results of `eval harness`: what a run's results.json holds, and paired tests between two runs.

Needs no lm_eval: reports read results where models are trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import UserError
from .intervals import mean_95, wilson_95
from .paired import sign_flip_p

RESULTS = "results.json"
AGAIN = "run `eval harness` again with another --output"

Interval = tuple[float, float]


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches in one task.

    Args:
        metric: its name, such as `acc_norm`.
        value: the mean of the metric over the examples.
        interval: 95% interval of the mean, see `interval_95`.
        shots: solved examples in the prompt; None if the tasks of a group differ in it.
        version: of the task's definition.
        hash: of what the model was asked and how its replies were scored; equal if two values can be compared.
        rows: id of the example -> the metric's value.
    """

    metric: str
    value: float
    interval: Interval | None
    shots: int | None
    version: str | float | None
    hash: str
    rows: Mapping[str, float]


@dataclass(frozen=True)
class HarnessResults:
    """What a model reaches in the tasks of a run.

    Args:
        source: the file, for messages.
        tasks: by name, in the order of the command.
        average: the mean of the tasks' values.
    """

    source: Path
    tasks: Mapping[str, TaskScore]
    average: float


@dataclass(frozen=True)
class TaskComparison:
    """Two models in one task, example by example.

    Args:
        metric: its name.
        examples: number of examples.
        baseline, value: means of the first and the second model.
        difference: the second minus the first.
        interval: 95% interval of the difference, Student's over the examples; None for a single example.
        better, worse: examples in which the second model's value is higher, or lower.
        p: two-sided: McNemar's exact test if all values are 0 or 1, otherwise a sign-flip test.
        p_holm: p by Holm's method, over the tasks that are compared together.
    """

    metric: str
    examples: int
    baseline: float
    value: float
    difference: float
    interval: Interval | None
    better: int
    worse: int
    p: float
    p_holm: float


def interval_95(values: Sequence[float]) -> Interval | None:
    """95% interval of the mean: Wilson's if all values are 0 or 1, otherwise Student's; None for one such value."""
    if set(values) <= {0.0, 1.0}:
        low, high = wilson_95(fmean(values), len(values))
        return low, high
    return student_95(values)


def student_95(values: Sequence[float]) -> Interval | None:
    """Student's 95% interval of the mean, mean +- t s / sqrt(n); None for a single value."""
    found = mean_95(values)
    return None if found is None else (found[0], found[1])


def read_harness(folder: Path) -> HarnessResults:
    """The results of a run of `eval harness`.

    Args:
        folder: of one model or adapter, such as runs/benchmarks/base.

    Raises:
        UserError: if there are none, or they are damaged.
    """
    file = folder / RESULTS
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): name the folder of a finished run, such as "
            "runs/benchmarks/base."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, then run the same command again.") from error
    if not _is_harness(content):
        raise UserError(f"{file} is not of `eval harness`: name the folder of one of its runs.")
    try:
        summary, rows = content["summary"], content["rows"]
        tasks = {name: _task(about, rows[name]) for name, about in summary["tasks"].items()}
        if not tasks or not _is_close(summary["average"], fmean(each.value for each in tasks.values())):
            raise ValueError("its average is not that of its tasks")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}): remove it, then run the same command again."
        ) from error
    return HarnessResults(file, tasks, float(summary["average"]))


def is_of_harness(folder: Path) -> bool:
    """Whether a folder has results of a run of `eval harness`."""
    try:
        return _is_harness(json.loads((folder / RESULTS).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False


def _is_harness(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("summary"), dict) and "tasks" in content["summary"]


def _task(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> TaskScore:
    """A task's score.

    Raises:
        ValueError, TypeError, KeyError: if summary and rows are not such, or do not agree.
    """
    values = {str(row["id"]): float(row["value"]) for row in rows}
    if not values or not len(values) == len(rows) == about["examples"]:
        raise ValueError("the number of examples is not that of the rows")
    if not _is_close(about["value"], fmean(values.values())):  # also where a value is not a number
        raise ValueError("a value is not the mean of its rows")
    interval = about["interval_95"]
    return TaskScore(
        metric=str(about["metric"]),
        value=float(about["value"]),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
        shots=about["shots"],
        version=about["version"],
        hash=str(about["hash"]),
        rows=values,
    )


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def compare_tasks(baseline: HarnessResults, other: HarnessResults) -> dict[str, TaskComparison]:
    """Two runs, task by task and example by example, in the tasks that both have.

    Raises:
        UserError: if no task is in both, or a task was not the same: other examples, prompts, metric or definition.
    """
    shared = [name for name in baseline.tasks if name in other.tasks]
    if not shared:
        raise UserError(
            f"{baseline.source} and {other.source} have no task in common: name runs with the same --tasks."
        )
    for name in shared:
        a, b = baseline.tasks[name], other.tasks[name]
        if a.metric != b.metric:
            raise UserError(
                f"{baseline.source} and {other.source} have {a.metric} and {b.metric} of {name}: {AGAIN} and the same "
                "metric."
            )
        if a.hash != b.hash or a.rows.keys() != b.rows.keys():
            raise UserError(
                f"{baseline.source} and {other.source} were not asked the same in {name} (examples, shots, --limit or "
                f"the task's definition differ): {AGAIN} and the same --tasks, --limit and --seed."
            )
    found = with_holm([_compared(baseline.tasks[name], other.tasks[name]) for name in shared])
    return dict(zip(shared, found, strict=True))


def _compared(a: TaskScore, b: TaskScore) -> TaskComparison:
    import numpy as np

    differences = np.array([b.rows[example] - a.rows[example] for example in a.rows])
    p = sign_flip_p(differences)
    return TaskComparison(
        metric=a.metric,
        examples=len(differences),
        baseline=a.value,
        value=b.value,
        difference=b.value - a.value,
        interval=student_95(differences.tolist()),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        p=p,
        p_holm=p,
    )


def with_holm(found: Sequence[TaskComparison]) -> list[TaskComparison]:
    """The same comparisons, with p-values by Holm's method over all of them."""
    from statsmodels.stats.multitest import multipletests

    corrected = multipletests([each.p for each in found], method="holm")[1]
    return [replace(each, p_holm=float(p)) for each, p in zip(found, corrected, strict=True)]
