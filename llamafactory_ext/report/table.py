"""The cells of a sweep, grouped by all but their seed, and paired tests of each group against DPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..evaluation.intervals import mean_95, wilson_95
from ..evaluation.paired import sign_flip_p
from ..recipe.keys import LOSS_KEYS, PREF_BETA, REFERENCE_KEYS
from ..sweep.results import Result
from ..training.monitors import DEGENERATING
from .variants import SEEDS, UNREFINED, Variant, as_written, short_key, variant_of

DEFAULTS = {"pref_beta": PREF_BETA, "learning_rate": 5e-5}  # LLaMA-Factory's and transformers'
BASELINE = "sigmoid"  # DPO
SIGNIFICANT = 0.05
LAST = 0.1  # of a run's logs are averaged for its final numbers

Log = Mapping[str, Any]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seed only.

    Args:
        variant: the loss and its values.
        learning_rate, beta: where it is on the paper's axes.
        cells: one per seed.
    """

    variant: Variant
    learning_rate: float
    beta: float
    cells: tuple[Result, ...]

    @property
    def method(self) -> str:
        """The variant in one line, as the CSV files have it: `Sr-DPO sr_lambda=0.3`."""
        values = (f"{short_key(key)}={as_written(value)}" for key, value in self.variant.values)
        return " ".join([self.variant.name, *values])

    @property
    def scored(self) -> list[Result]:
        return [cell for cell in self.cells if cell.summary is not None]

    @property
    def accuracy(self) -> float | None:
        """Mean strict accuracy of the cells that were scored."""
        return _mean([cell.summary["strict"]["accuracy"] for cell in self.scored if cell.summary])

    @property
    def degenerate(self) -> float | None:
        """Mean share of outputs that are empty, loop or repeat themselves, from 0 to 1."""
        return _mean([cell.summary["degeneration"]["degenerate"] for cell in self.scored if cell.summary])

    @property
    def wilson(self) -> Interval | None:
        """Wilson's 95% interval of the mean accuracy, for one run's number of problems: seeds share the problems, so
        that more of them do not make it narrower."""
        return None if self.accuracy is None else wilson_interval(self.accuracy, len(self.scored[0].correct))

    @property
    def flagged(self) -> int:
        """How many of the runs the monitor found degenerating at their end."""
        return sum(bool(degenerated(cell.log_history)) for cell in self.cells)

    @property
    def held_out(self) -> HeldOut | None:
        scored = [cell.pairs for cell in self.cells if cell.pairs is not None]
        if not scored:
            return None
        shares = [pairs.augmented_accuracy for pairs in scored if pairs.augmented_accuracy is not None]
        margins = _margins_by_pair(self.cells)
        accuracy, augmented = _mean([pairs.accuracy for pairs in scored]), _mean(shares)
        return HeldOut(
            pairs=len(margins),
            margin=_mean([pairs.means["margin"] for pairs in scored if "margin" in pairs.means]),
            margin_interval=t_interval(margins),
            accuracy=accuracy,
            accuracy_interval=wilson_interval(accuracy, len(margins)),
            augmented=augmented,
            augmented_interval=wilson_interval(augmented, len(margins)),
        )

    def final(self, metric: str) -> float | None:
        """A metric of the training's last logs, averaged over them and the seeds."""
        return _mean([value for cell in self.cells if (value := final(cell.log_history, metric)) is not None])


@dataclass(frozen=True)
class HeldOut:
    """What a group's models make of held-out pairs, as means over the seeds.

    Args:
        pairs: the number of pairs that every seed scored.
        margin: in nats.
        accuracy, augmented: share of pairs with a margin above 0, and the same under the augmented prompt.
        margin_interval, accuracy_interval, augmented_interval: 95%, for that number of pairs: seeds share the pairs, so
            that more of them do not make it narrower. Student's for the margin, Wilson's for shares.
    """

    pairs: int
    margin: float | None
    margin_interval: Interval | None
    accuracy: float | None
    accuracy_interval: Interval | None
    augmented: float | None
    augmented_interval: Interval | None


def wilson_interval(share: float | None, count: int) -> Interval | None:
    """Wilson's 95% interval of a share of `count` things; None where there is nothing to tell from."""
    if share is None or not count:
        return None
    low, high = wilson_95(share, count)
    return low, high


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's 95% interval of a mean; None for fewer than two values."""
    found = mean_95(values)
    return None if found is None else (found[0], found[1])


def _margins_by_pair(cells: Sequence[Result]) -> list[float]:
    """Mean over the seeds of each pair's margin in nats, for the pairs that all of them scored."""
    margins = [cell.margins for cell in cells if cell.pairs is not None]
    shared = sorted(set.intersection(*(set(each) for each in margins)))
    return [float(np.mean([each[index] for each in margins])) for index in shared]


def final(history: Sequence[Log], metric: str) -> float | None:
    """Mean of a metric over the last tenth of a run's logs, None if it was never logged."""
    values = [log[metric] for log in history if metric in log]
    return _mean(values[-max(1, round(LAST * len(values))) :])


def degenerated(history: Sequence[Log]) -> bool | None:
    """Whether the monitor found the run degenerating at its end; None if it has no monitor."""
    flags = [log[DEGENERATING] for log in history if DEGENERATING in log]
    return flags[-1] > 0 if flags else None


def groups(cells: Sequence[Result]) -> list[Group]:
    """The cells by variant, learning rate and beta, in the order of the sweep."""
    found: dict[tuple[Variant, float, float], list[Result]] = {}
    for cell in cells:
        found.setdefault((variant_of(cell), learning_rate_of(cell), beta_of(cell)), []).append(cell)
    return [Group(*key, tuple(members)) for key, members in found.items()]


def learning_rate_of(cell: Result) -> float:
    return float(cell.recipe.get("learning_rate", DEFAULTS["learning_rate"]))


def beta_of(cell: Result) -> float:
    return float(cell.recipe.get("pref_beta", DEFAULTS["pref_beta"]))


def check_problems(cells: Sequence[Result]) -> None:
    """Refuse scores that cannot be compared.

    Raises:
        UserError: if two cells' answers were read by different versions of the extractor, or given to different
            problems, as after a change of the data's file.
    """
    scored = [(cell, cell.summary) for cell in cells if cell.summary is not None]
    for (first, a), (second, b) in pairwise(scored):
        if a.get("extractor") != b.get("extractor"):
            raise UserError(
                f"The answers of {first.name} and {second.name} were read by different versions of the extractor "
                f"({a.get('extractor')} and {b.get('extractor')}): score both again with gsm8k.py --score-only."
            )
        if (a.get("problems_sha256"), first.correct.keys()) != (b.get("problems_sha256"), second.correct.keys()):
            raise UserError(
                f"{first.name} and {second.name} were scored on different problems ({len(first.correct)} and "
                f"{len(second.correct)} of them): remove the scores that used the wrong ones, and run the sweep again."
            )


# --- tests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A group against DPO with the same settings, on the same problems.

    Args:
        group, baseline: what is compared.
        accuracy, baseline_accuracy: with the seeds that both have.
        better, worse: problems that the group solves more often than DPO over the seeds, and less often.
        p: two-sided, of the hypothesis that swapping the two methods changes nothing for any problem.
        p_holm: corrected over all comparisons (Holm).
    """

    group: Group
    baseline: Group
    accuracy: float
    baseline_accuracy: float
    better: int
    worse: int
    p: float
    p_holm: float

    @property
    def difference(self) -> float:
        return self.accuracy - self.baseline_accuracy


def compare_with_dpo(found: Sequence[Group]) -> list[Comparison]:
    """Every group against the group of DPO that differs in the loss only, seed by seed and problem by problem.

    The unit is a problem: the difference between the shares of seeds that solve it. Under the hypothesis, its sign is
    random. With one seed that is McNemar's exact test.
    """
    from statsmodels.stats.multitest import multipletests

    pairs = [(group, baseline) for group in found if (baseline := _baseline(group, found)) is not None]
    rows = [(group, baseline, *shares_solved(group, baseline)) for group, baseline in pairs]
    rows = [row for row in rows if len(row[2])]
    if not rows:
        return []
    p_values = [sign_flip_p(ours - theirs) for _, _, ours, theirs in rows]
    corrected = multipletests(p_values, method="holm")[1]
    return [
        Comparison(
            group,
            baseline,
            accuracy=float(ours.mean()),
            baseline_accuracy=float(theirs.mean()),
            better=int((ours > theirs).sum()),
            worse=int((ours < theirs).sum()),
            p=p,
            p_holm=float(p_holm),
        )
        for (group, baseline, ours, theirs), p, p_holm in zip(rows, p_values, corrected, strict=True)
    ]


def _baseline(group: Group, found: Sequence[Group], loss: str = BASELINE) -> Group | None:
    """The group of a loss, without refinement, that differs from this one in the loss only."""
    if _is_plain(group, loss):
        return None
    wanted = apart_from_the_loss(group.cells[0])
    return next((g for g in found if _is_plain(g, loss) and apart_from_the_loss(g.cells[0]) == wanted), None)


def _is_plain(group: Group, loss: str) -> bool:
    """Whether it is the loss itself: many take `sr_lambda`, which adds a refinement term."""
    return group.cells[0].loss == loss and not group.cells[0].recipe.get("sr_lambda")


def unrefined(group: Group, found: Sequence[Group]) -> Group | None:
    """What a group is measured against in the Sr paper: the loss without its refinement term, or DPO where it has none,
    with the same settings."""
    return _baseline(group, found, UNREFINED.get(group.variant.loss, BASELINE))


def apart_from_the_loss(cell: Result) -> dict[str, Any]:
    """The recipe without the keys that belong to losses, and without seed and folder."""
    settings = {**DEFAULTS, **cell.recipe}
    return {
        key: value for key, value in settings.items() if key not in (*LOSS_KEYS, *REFERENCE_KEYS, *SEEDS, "output_dir")
    }


def shares_solved(group: Group, other: Group) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per problem, the shares of seeds with which the two solve it: of the seeds that both have."""
    pairs = same_seeds(group.scored, other.scored)
    if not pairs:
        return np.zeros(0), np.zeros(0)
    problems = sorted(group.scored[0].correct)
    ours, theirs = ([[cell.correct[i] for i in problems] for cell in side] for side in zip(*pairs, strict=True))
    return np.mean(np.array(ours, dtype=np.float64), axis=0), np.mean(np.array(theirs, dtype=np.float64), axis=0)


def same_seeds(cells: Sequence[Result], others: Sequence[Result]) -> list[tuple[Result, Result]]:
    """The cells, each with the other one that has its seed; without those that have none."""
    seeds = {_seed(cell): cell for cell in others}
    return [(cell, seeds[_seed(cell)]) for cell in cells if _seed(cell) in seeds]


def _seed(cell: Result) -> tuple[Any, ...]:
    return tuple(cell.recipe.get(key) for key in SEEDS)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
