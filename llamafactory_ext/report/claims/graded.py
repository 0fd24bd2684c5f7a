"""The claims of arXiv 2405.21040 on pairs whose gap in quality is known, with criteria settled before training.

A statement is judged in every setting (a loss, a lambda) by a 95% interval over held-out pairs: it is so where the
interval lies above a smallest value that counts, it is not where it lies below, and it is open where it contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..variants import Variant
from .study import DPO, IPO, MOST, PLAIN, SR, Finding, Verdict, with_lambda

Floats = NDArray[np.float64]
Interval = tuple[float, float, float]  # estimate, lower and upper end

LAMBDAS = (0.3, 1.0, 3.0)
REFINED = {with_lambda(loss, weight): plain for loss, plain in PLAIN.items() for weight in LAMBDAS}
SETTINGS = (DPO, IPO, *REFINED)
SMALL = (0, 1)  # gaps
RESAMPLES = 2_000

STRONG = 0.5  # a rank correlation that deserves to be called an estimate of quality
SOME = 0.1  # one that counts, where the margin is accounted for
BETTER = 0.01  # a gain in rank correlation that counts
LOWER = 0.01  # a change of margins that counts, as a share of the unrefined loss's mean margin


@dataclass(frozen=True)
class Graded:
    """What models make of held-out pairs, pair by pair, as means over the seeds.

    Args:
        gap: how many more wrong results the rejected answer has, shape (pairs,).
        margin: in nats, shape (pairs,).
        delta: Delta = beta (D_w' - D_l'), shape (pairs,).
    """

    gap: Floats
    margin: Floats
    delta: Floats


Study = Mapping[Variant, Graded]


def graded_findings(study: Study, start: Floats, gap: Floats) -> list[Finding]:
    """A finding per claim.

    Args:
        study: by loss and lambda; settings may be missing.
        start: of the model that all start from, by how many nats the rating in front of the query moves its
            log-probability of the chosen answer more than that of the rejected one, shape (pairs,).
        gap: of the same pairs, shape (pairs,).
    """
    return [
        start_knows_ratings(start, gap),
        delta_follows_gap(study),
        delta_knows_more_than_margin(study),
        *(refinement_lowers_small_gaps(study, loss) for loss in PLAIN),
        refined_margin_follows_gap(study),
    ]


# --- claims ----------------------------------------------------------------------------------------------------------


def start_knows_ratings(start: Floats, gap: Floats) -> Finding:
    found = bootstrap(spearman, start, gap)
    return Finding(
        SR,
        "(Precondition, no claim of the paper.) The starting model knows what the rating in `sr_prompt` means.",
        f"Over held-out pairs, the rank correlation of the gap with how much the rating favours the chosen answer is "
        f"above {STRONG:g} (95 % interval); it is not met if the interval is below.",
        _verdict([_against(found, STRONG)]),
        f"{_words(found)}; mean by gap in nats: {by_gap(start, gap)}.",
    )


def delta_follows_gap(study: Study) -> Finding:
    found = {variant: bootstrap(spearman, g.delta, g.gap) for variant, g in study.items()}
    return Finding(
        SR,
        "Delta estimates the gap in quality: it orders held-out pairs by their gap.",
        f"The rank correlation of Delta and gap is above {STRONG:g} (95 % interval) in {MOST} % of the settings, DPO "
        f"and IPO among them; it does not hold if it is below in {MOST} %.",
        _verdict([_against(found.get(variant), STRONG) for variant in SETTINGS]),
        f"{_all(found)}. Mean Delta by gap: "
        f"{'; '.join(f'{_name(v)} {by_gap(g.delta, g.gap)}' for v, g in study.items())}.",
    )


def delta_knows_more_than_margin(study: Study) -> Finding:
    found = {variant: bootstrap(partial_spearman, g.delta, g.gap, g.margin) for variant, g in study.items()}
    return Finding(
        SR,
        "Delta says more about the gap than the margin does.",
        f"The partial rank correlation of Delta and gap, given the margin, is above {SOME:g} (95 % interval) in {MOST} "
        f"% of the settings; it does not hold if it is below in {MOST} %.",
        _verdict([_against(found.get(variant), SOME) for variant in SETTINGS]),
        f"{_all(found)}.",
    )


def refinement_lowers_small_gaps(study: Study, loss: str) -> Finding:
    refined, plain = Variant(loss).name, PLAIN[loss]
    baseline = study.get(plain)
    sides: list[bool | None] = []
    words = []
    for weight in LAMBDAS:
        found = falls(study.get(with_lambda(loss, weight)), baseline)
        counts = LOWER * abs(float(baseline.margin.mean())) if baseline else 0.0
        sides += [_against(found.get(gap), counts) for gap in SMALL]
        words.append(f"lambda {weight:g}: {', '.join(map(_words, found.values())) or 'missing'}")
    means = by_gap(baseline.margin, baseline.gap) if baseline else "missing"
    return Finding(
        SR,
        f"{refined} lowers the margins of pairs with a small gap.",
        f"On held-out pairs with a gap of 0 and of 1, at each lambda, {refined}'s mean margin is lower than "
        f"{plain.name}'s by more than {LOWER:.0%} of {plain.name}'s mean margin (95 % interval of paired differences) "
        f"in {MOST} % of these cases; it does not hold if it is not in {MOST} %.",
        _verdict(sides),
        f"{plain.name}'s mean margins by gap, in nats: {means}. {plain.name} minus {refined} by gap, from 0 to 3: "
        f"{'; '.join(words)}.",
    )


def falls(refined: Graded | None, plain: Graded | None) -> dict[int, Interval]:
    """By gap, by how many nats the refinement lowers the mean margin; empty where a side is missing."""
    if refined is None or plain is None:
        return {}
    fall = plain.margin - refined.margin
    by = {int(gap): fall[plain.gap == gap] for gap in np.unique(plain.gap)}
    return {gap: bootstrap(mean, own) for gap, own in by.items()}


def refined_margin_follows_gap(study: Study) -> Finding:
    found = {
        variant: bootstrap(gain, study[variant].margin, study[plain].margin, study[plain].gap)
        for variant, plain in REFINED.items()
        if variant in study and plain in study
    }
    alone = {
        plain: float(spearman(study[plain].margin, study[plain].gap)) for plain in PLAIN.values() if plain in study
    }
    return Finding(
        SR,
        "With the refinement, margins follow the gap better.",
        f"The rank correlation of margin and gap rises by more than {BETTER:g} over the unrefined loss's (95 % "
        f"interval, paired) in {MOST} % of the settings; it does not hold if it does not in {MOST} %.",
        _verdict([_against(found.get(variant), BETTER) for variant in REFINED]),
        f"{', '.join(f'{plain.name} {value:.3f}' for plain, value in alone.items())}; change: {_all(found)}.",
    )


# --- statistics ------------------------------------------------------------------------------------------------------


def spearman(a: Floats, b: Floats) -> Floats:
    """Spearman's rank correlation along the last axis, with mean ranks for ties; 0 if a side is constant."""
    from scipy.stats import rankdata

    centred = [ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (rankdata(a, axis=-1), rankdata(b, axis=-1))]
    size = np.sqrt(np.prod([(ranks**2).sum(axis=-1) for ranks in centred], axis=0))
    return _ratio(np.prod(centred, axis=0).sum(axis=-1), size)


def partial_spearman(a: Floats, b: Floats, given: Floats) -> Floats:
    """Rank correlation of a and b with that of a third taken out:

    r_ab.c = (r_ab - r_ac r_bc) / sqrt((1 - r_ac^2)(1 - r_bc^2)); 0 if the third determines one of them.
    """
    ab, ac, bc = spearman(a, b), spearman(a, given), spearman(b, given)
    return _ratio(ab - ac * bc, np.sqrt(np.clip((1 - ac**2) * (1 - bc**2), 0, None)))


def gain(ours: Floats, theirs: Floats, gap: Floats) -> Floats:
    """By how much one margin's rank correlation with the gap exceeds another's."""
    return spearman(ours, gap) - spearman(theirs, gap)


def mean(values: Floats) -> Floats:
    """Along the last axis."""
    return np.asarray(values.mean(axis=-1))


def bootstrap(statistic: Callable[..., Floats], *columns: Floats) -> Interval:
    """A statistic of columns along their last axis, and its 95% interval: percentiles over draws of as many rows."""
    count = len(columns[0])
    rows = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(statistic(*(column[rows] for column in columns)), [2.5, 97.5])
    return float(statistic(*columns)), float(low), float(high)


def _ratio(over: Floats, under: Floats) -> Floats:
    """0 where nothing is left below."""
    return np.where(under > 1e-6, over / np.where(under > 1e-6, under, 1), 0.0)


# --- verdicts and words ----------------------------------------------------------------------------------------------


def _against(found: Interval | None, counts: float) -> bool | None:
    """Whether an interval lies above a value (True) or below it (False); None if it contains it or is missing."""
    if found is None:
        return None
    _, low, high = found
    return True if low > counts else False if high < counts else None


def _verdict(sides: Sequence[bool | None]) -> Verdict:
    """By most of the settings; a missing one counts for neither side."""

    def most(side: bool) -> bool:
        return 100 * sum(each is side for each in sides) >= MOST * len(sides)

    return "holds" if most(True) else "does not hold" if most(False) else "cannot tell"


def by_gap(values: Floats, gap: Floats) -> str:
    """The mean of the pairs with each gap, the smallest gap first."""
    return " ".join(f"{values[gap == each].mean():.3f}" for each in np.unique(gap))


def _all(found: Mapping[Variant, Interval]) -> str:
    return "; ".join(f"{_name(variant)} {_words(interval)}" for variant, interval in found.items()) or "missing"


def _name(variant: Variant) -> str:
    return " ".join([variant.name, *(f"{value:g}" for _, value in variant.values)])


def _words(interval: Interval) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*interval)
