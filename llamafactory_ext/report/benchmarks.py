"""Benchmarks of lm-evaluation-harness: means over seeds, and paired tests against the loss without refinement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..evaluation.harness_results import HarnessResults, TaskScore
from ..evaluation.paired import sign_flip_p
from ..sweep.results import Result
from .table import Group, Interval, same_seeds, t_interval, unrefined, wilson_interval

AVERAGE = "average"
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A mean over examples, or over tasks.

    Args:
        value: in the task's own unit, mostly a share from 0 to 1.
        interval: 95%, for the number of examples of one run; None for a single example.
    """

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class BenchmarkComparison:
    """A group against its loss without refinement, or DPO, in a task or on the average, with the seeds that both have.

    Args:
        group, baseline: what is compared.
        task: its name, or `AVERAGE`.
        ours, theirs: the two means.
        difference: ours minus theirs; its interval is over examples.
        better, worse: examples in which the group's value is higher, or lower, as means over the seeds.
        p: two-sided, of a sign-flip test over examples; in a task with values of 0 and 1 and one seed, McNemar's.
        p_holm: by Holm's method, over all comparisons of the sweep.
    """

    group: Group
    baseline: Group
    task: str
    ours: float
    theirs: float
    difference: Measured
    better: int
    worse: int
    p: float
    p_holm: float


def check_benchmarks(cells: Sequence[Result]) -> None:
    """Refuse benchmarks that cannot be compared.

    Raises:
        UserError: if two cells were asked different tasks, or one task with other examples, prompts or metrics.
    """
    measured = [(cell.name, cell.benchmarks.tasks) for cell in cells if cell.benchmarks is not None]
    for (first, a), (second, b) in pairwise(measured):
        if a.keys() != b.keys():
            task = sorted(a.keys() ^ b.keys())[0]
            raise UserError(
                f"Only one of {first} and {second} was asked {task}: remove the scores with the wrong tasks, and run "
                "the sweep again."
            )
        for task in a:
            if _asked(a[task]) != _asked(b[task]):
                raise UserError(
                    f"{first} and {second} were not asked the same in {task} (examples, shots, metric or the task's "
                    "definition differ): remove the scores that are wrong, and run the sweep again."
                )


def _asked(score: TaskScore) -> tuple[object, ...]:
    return score.metric, score.hash, score.rows.keys()


# --- means -----------------------------------------------------------------------------------------------------------


def results_of(cells: Sequence[Result]) -> list[HarnessResults]:
    return [cell.benchmarks for cell in cells if cell.benchmarks is not None]


def by_example(results: Sequence[HarnessResults], task: str) -> Values:
    """The mean over runs of each example's value, shape (examples,), in the order of the first run."""
    rows = [each.tasks[task].rows for each in results]
    return mean_rows(rows, list(rows[0]))


def mean_rows(rows: Sequence[Mapping[str, float]], examples: Sequence[str]) -> Values:
    """The mean over runs of each of these examples' values, shape (examples,)."""
    values: Values = np.array([[run[example] for example in examples] for run in rows], dtype=np.float64)
    return np.asarray(values.mean(axis=0))


def measured(results: Sequence[HarnessResults], task: str) -> Measured:
    """A task's mean over runs: Wilson's interval where all values are 0 or 1, otherwise Student's.

    Runs share the examples, so that more of them do not make it narrower.
    """
    values = by_example(results, task)
    mean = float(values.mean())
    if all(set(each.tasks[task].rows.values()) <= {0.0, 1.0} for each in results):
        return Measured(mean, wilson_interval(mean, len(values)))
    return Measured(mean, t_interval(values.tolist()))


def average(results: Sequence[HarnessResults]) -> Measured:
    """The mean of the tasks' means, over runs; of one task, its own."""
    tasks = list(results[0].tasks)
    if len(tasks) == 1:
        return measured(results, tasks[0])
    return mean_of_means([by_example(results, task) for task in tasks])


def mean_of_means(samples: Sequence[Values]) -> Measured:
    """The mean of k samples' means m, with Student's 95% interval and Welch's and Satterthwaite's degrees of freedom.

    v = s^2 / n,  m -+ t sqrt(sum v) / k,  degrees of freedom (sum v)^2 / sum(v^2 / (n - 1))
    """
    from scipy.stats import t

    mean = float(np.mean([sample.mean() for sample in samples]))
    if min(map(len, samples)) < 2:
        return Measured(mean, None)
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    if not variances.any():
        return Measured(mean, (mean, mean))
    freedom = variances.sum() ** 2 / sum(v**2 / (len(each) - 1) for v, each in zip(variances, samples, strict=True))
    half = float(t.ppf(0.975, freedom) * np.sqrt(variances.sum()) / len(samples))
    return Measured(mean, (mean - half, mean + half))


# --- tests -----------------------------------------------------------------------------------------------------------


def compare_benchmarks(found: Sequence[Group]) -> list[BenchmarkComparison]:
    """Every group against its loss without refinement, or DPO, with the same settings: task by task and on average."""
    from statsmodels.stats.multitest import multipletests

    rows = [
        (group, baseline, *row)
        for group in found
        if (baseline := unrefined(group, found)) is not None
        for row in _compared(group, baseline)
    ]
    if not rows:
        return []
    corrected = multipletests([p for *_, p in rows], method="holm")[1]
    return [BenchmarkComparison(*row, p_holm=float(p)) for row, p in zip(rows, corrected, strict=True)]


def _compared(group: Group, baseline: Group) -> list[tuple[str, float, float, Measured, int, int, float]]:
    """Task, the two means, their difference, examples better and worse, and p: of each task, then of the average."""
    ours, theirs = paired(group, baseline)
    if not ours:
        return []
    differences = differences_of(ours, theirs)
    rows = [
        (
            task,
            measured(ours, task).value,
            measured(theirs, task).value,
            Measured(float(values.mean()), t_interval(values.tolist())),
            int((values > 0).sum()),
            int((values < 0).sum()),
            sign_flip_p(values),
        )
        for task, values in differences.items()
    ]
    samples = list(differences.values())
    everything = np.concatenate(samples)
    # An example counts for as much as it does in the average: 1 / examples of its task.
    p = sign_flip_p(np.concatenate([sample / len(sample) for sample in samples]))
    better, worse = int((everything > 0).sum()), int((everything < 0).sum())
    return [
        *rows,
        (AVERAGE, average(ours).value, average(theirs).value, mean_of_means(samples), better, worse, p),
    ]


def paired(group: Group, baseline: Group) -> tuple[list[HarnessResults], list[HarnessResults]]:
    """The results of both, seed by seed; of the seeds that both have."""
    sides = [[cell for cell in each.cells if cell.benchmarks is not None] for each in (group, baseline)]
    pairs = same_seeds(*sides)
    return results_of([ours for ours, _ in pairs]), results_of([theirs for _, theirs in pairs])


def differences_of(ours: Sequence[HarnessResults], theirs: Sequence[HarnessResults]) -> dict[str, Values]:
    """Task -> ours minus theirs, example by example, as means over the runs."""
    found = {}
    for task, score in ours[0].tasks.items():
        sides = ([each.tasks[task].rows for each in runs] for runs in (ours, theirs))
        a, b = (mean_rows(rows, list(score.rows)) for rows in sides)
        found[task] = a - b
    return found
