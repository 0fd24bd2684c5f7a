"""The claims of the two papers, each with a criterion that was settled before the grid was run, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from llamafactory_ext.report.table import Group, shares_solved, sign_flip_p
from llamafactory_ext.report.variants import SIZE, Variant

Verdict = Literal["holds", "does not hold", "cannot tell"]

DPO, DPOP, MINOR_DPO, IPO = map(Variant, ("sigmoid", "dpop", "minor_dpo", "ipo"))
PLAIN = {"sr_dpo": DPO, "sr_ipo": IPO}  # the losses without their refinement term
MINOR, SR = "MinorDPO (2408.09834)", "Sr (2405.21040)"
MOST = 80  # per cent of the settings must agree for a verdict on curves, or at most the rest
SIGNIFICANT = 0.05
LIKE = 0.02  # accuracies that differ by less, and not significantly, are alike


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it.

    Args:
        paper: whose it is.
        claim: in a sentence.
        criterion: when it holds.
        verdict: of this study.
        numbers: what was measured.
    """

    paper: str
    claim: str
    criterion: str
    verdict: Verdict
    numbers: str


@dataclass(frozen=True)
class Study:
    """The groups of the grid, and what they are judged against.

    Args:
        groups: the cells by method, learning rate and beta.
        untrained: the accuracy of the model that all start from.
    """

    groups: Sequence[Group]
    untrained: float

    @property
    def rates(self) -> list[float]:
        return sorted({group.learning_rate for group in self.groups})

    @property
    def betas(self) -> list[float]:
        return sorted({group.beta for group in self.groups})

    def of(self, variant: Variant, rate: float | None = None) -> list[Group]:
        found = [g for g in self.groups if g.variant == variant and rate in (None, g.learning_rate)]
        return sorted(found, key=lambda group: (group.learning_rate, group.beta))

    def one(self, variant: Variant, rate: float, beta: float) -> Group | None:
        return next((group for group in self.of(variant, rate) if group.beta == beta), None)

    def misses(self, *variants: Variant) -> bool:
        """Whether a setting of the variants was not trained: then there is no verdict on all of them."""
        return any(self.one(v, rate, beta) is None for v in variants for rate in self.rates for beta in self.betas)

    def best(self, variant: Variant, rate: float) -> Group | None:
        scored = [group for group in self.of(variant, rate) if group.accuracy is not None]
        return max(scored, key=lambda group: group.accuracy or 0.0, default=None)


def findings(study: Study) -> list[Finding]:
    checks: list[Callable[[Study], Finding]] = [
        dpo_drives_both_down,
        minor_dpo_keeps_chosen_up,
        higher_beta_smaller_margins,
        minor_dpo_survives,
        minor_dpo_scores_best,
        lambda study: refinement_lowers_margins(study, "sr_dpo"),
        lambda study: refinement_lowers_margins(study, "sr_ipo"),
        more_lambda_lower_margins,
        lower_at_every_size,
        overhead,
    ]
    return [check(study) for check in checks]


# --- curves ----------------------------------------------------------------------------------------------------------


def dpo_drives_both_down(study: Study) -> Finding:
    groups = study.of(DPO)
    chosen, rejected = ([_final(group, side) for group in groups] for side in ("chosen", "rejected"))
    below = [c < 0 and r < 0 for c, r in zip(chosen, rejected, strict=True)]
    return Finding(
        MINOR,
        "DPO drives the rewards of chosen and rejected answers alike below 0.",
        f"Both final log-ratios are below 0 in {MOST} % of DPO's settings; it does not hold if in {100 - MOST} %.",
        "cannot tell" if study.misses(DPO) else _share_verdict(below),
        f"Both below 0 in {_count(below)} settings; {_by_rate(study, DPO, 'chosen')}; "
        f"{_by_rate(study, DPO, 'rejected')}.",
    )


def minor_dpo_keeps_chosen_up(study: Study) -> Finding:
    above = [_final(group, "chosen") > 0 for group in study.of(MINOR_DPO)]
    return Finding(
        MINOR,
        "MinorDPO keeps the rewards of chosen answers above 0.",
        f"The final chosen log-ratio is above 0 in {MOST} % of MinorDPO's settings; it does not hold if in "
        f"{100 - MOST} %.",
        "cannot tell" if study.misses(MINOR_DPO) else _share_verdict(above),
        f"Above 0 in {_count(above)} settings; {_by_rate(study, MINOR_DPO, 'chosen')}.",
    )


def higher_beta_smaller_margins(study: Study) -> Finding:
    falls, words = [], []
    for variant in (DPO, DPOP, MINOR_DPO):
        for rate in study.rates:
            margins = [_final(group, "margins") for group in study.of(variant, rate)]
            falls += [later < earlier for earlier, later in pairwise(margins)]
            words.append(f"{variant.name} at {rate:g}: {', '.join(f'{margin:.2f}' for margin in margins)}")
    return Finding(
        MINOR,
        "A higher beta gives smaller margins.",
        f"The final margin (log-ratios) is smaller at the next higher beta in {MOST} % of the steps along beta; it "
        f"does not hold if in {100 - MOST} %.",
        "cannot tell" if study.misses(DPO, DPOP, MINOR_DPO) else _share_verdict(falls),
        f"Smaller in {_count(falls)} steps. Margins in nats by beta: {'; '.join(words)}.",
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def minor_dpo_survives(study: Study) -> Finding:
    rate, beta = study.rates[-1], study.betas[0]
    minor, dpo = study.one(MINOR_DPO, rate, beta), study.one(DPO, rate, beta)
    p, difference = _test(minor, dpo)
    half = study.untrained / 2
    verdict: Verdict = "cannot tell"
    if minor is not None and minor.accuracy is not None:
        if minor.accuracy <= half or (difference < 0 and p < SIGNIFICANT):
            verdict = "does not hold"
        elif difference > 0 and p < SIGNIFICANT:
            verdict = "holds"
    variants = (DPO, DPOP, MINOR_DPO)
    accuracies = [f"{v.name} {', '.join(_percent(study.one(v, rate, b)) for b in study.betas)}" for v in variants]
    return Finding(
        MINOR,
        "At the high rate and a low beta DPO degenerates and MinorDPO does not.",
        f"At {rate:g} and beta {beta:g}, MinorDPO solves more than half of what the untrained model solves, and more "
        "than DPO (paired test over problems, p < 0.05). That DPO breaks there is how the rate was chosen: no finding.",
        verdict,
        f"Accuracy at {rate:g} by beta (untrained {study.untrained:.1%}): {'; '.join(accuracies)}; MinorDPO against "
        f"DPO at beta {beta:g}: {difference:+.1%}, p = {p:.2g}. Empty, looping or repetitive outputs there: DPO "
        f"{_share(dpo and dpo.degenerate)}, MinorDPO {_share(minor and minor.degenerate)}.",
    )


def minor_dpo_scores_best(study: Study) -> Finding:
    verdicts, words = [], []
    for rate in study.rates:
        best = {variant: study.best(variant, rate) for variant in (DPO, DPOP, MINOR_DPO)}
        rival = max((best[v] for v in (DPO, DPOP) if best[v]), key=lambda g: g.accuracy or 0.0, default=None)
        p, difference = _test(best[MINOR_DPO], rival)
        verdicts.append("cannot tell" if p >= SIGNIFICANT else "holds" if difference > 0 else "does not hold")
        scores = ", ".join(f"{v.name} {_percent(g)} (beta {g.beta:g})" for v, g in best.items() if g)
        words.append(f"at {rate:g}: {scores}, MinorDPO minus the better of the others {difference:+.1%}, p = {p:.2g}")
    verdict: Verdict = "cannot tell"
    if "does not hold" in verdicts:
        verdict = "does not hold"
    elif set(verdicts) == {"holds"}:
        verdict = "holds"
    return Finding(
        MINOR,
        "MinorDPO's best score tops those of DPO and DPOP at both rates.",
        "The best of MinorDPO's betas solves more than the best of the others' at both rates, each with p < 0.05 "
        "(paired test over problems); it does not hold if it solves fewer at one, with p < 0.05.",
        verdict,
        f"Best of each: {'; '.join(words)}.",
    )


# --- refinement ------------------------------------------------------------------------------------------------------


def refinement_lowers_margins(study: Study, loss: str) -> Finding:
    rate, beta = study.rates[0], 0.1
    refined, plain = _refined(loss, 0.3), PLAIN[loss]
    group, baseline = study.one(refined, rate, beta), study.one(plain, rate, beta)
    p, difference = _test(group, baseline)
    ours, theirs = _held_out(group), _held_out(baseline)
    scored = group is not None and baseline is not None and None not in (group.accuracy, baseline.accuracy)
    alike = scored and abs(difference) < LIKE and p >= SIGNIFICANT
    verdict: Verdict = "cannot tell"
    if None not in (ours, theirs):
        verdict = "does not hold" if ours >= theirs else "holds" if alike else "cannot tell"
    return Finding(
        SR,
        f"{refined.name} has lower margins than {plain.name} at like accuracy.",
        f"At the lower rate, beta 0.1 and lambda 0.3, the mean margin of held-out pairs is lower than {plain.name}'s, "
        f"and the accuracies on problems differ by less than {LIKE:.0%}, not significantly.",
        verdict,
        f"Margins {_nats(ours)} against {_nats(theirs)}; accuracy {_percent(group)} against {_percent(baseline)} "
        f"({difference:+.1%}, p = {p:.2g}).",
    )


def more_lambda_lower_margins(study: Study) -> Finding:
    falls, words = [], []
    lambdas = (0.1, 0.3, 0.5, 1.0)
    for loss, plain in PLAIN.items():
        variants = [plain, *(_refined(loss, value) for value in lambdas)]
        margins = [_held_out(study.one(variant, study.rates[0], 0.1)) for variant in variants]
        known = [margin for margin in margins if margin is not None]
        falls += [later < earlier for earlier, later in pairwise(known)]
        at = f"{plain.name}, {Variant(loss).name} at {', '.join(map(str, lambdas))}"
        words.append(f"{at}: {', '.join(map(_nats, margins))}")
    return Finding(
        SR,
        "The larger lambda, the lower the margin.",
        f"The mean margin of held-out pairs is lower at the next larger lambda, from 0 on, in {MOST} % of the steps; "
        f"it does not hold if in {100 - MOST} %.",
        "cannot tell" if len(falls) < 8 else _share_verdict(falls),
        f"Lower in {_count(falls)} steps. {'; '.join(words)}.",
    )


def lower_at_every_size(study: Study) -> Finding:
    rate = study.rates[0]
    sizes = (256, 512, 1024)
    lower, words = [], []
    for size in sizes:
        refined, plain = (_sized(variant, size) for variant in (_refined("sr_dpo", 0.3), DPO))
        ours, theirs = (_held_out(study.one(variant, rate, 0.1)) for variant in (refined, plain))
        if ours is not None and theirs is not None:
            lower.append(ours < theirs)
        scores = f"{_percent(study.one(refined, rate, 0.1))} and {_percent(study.one(plain, rate, 0.1))}"
        words.append(f"{size:,} pairs: margins {_nats(ours)} and {_nats(theirs)}, accuracy {scores}")
    return Finding(
        SR,
        "Sr-DPO's margins are lower than DPO's however many pairs there are.",
        "The mean margin of held-out pairs is lower with every number of pairs; it does not hold if with none.",
        "cannot tell" if len(lower) < len(sizes) else _all_verdict(lower),
        f"Sr-DPO and DPO with {'; '.join(words)}.",
    )


def overhead(study: Study) -> Finding:
    rate = study.rates[0]
    refined, plain = (_seconds(study.one(variant, rate, 0.1)) for variant in (_refined("sr_dpo", 0.3), DPO))
    ratio = refined / plain if refined and plain else None
    return Finding(
        SR,
        "The refinement costs little: a second forward pass without gradient.",
        "Sr-DPO's training takes at most 1.5 times as long as DPO's, both with the plugin (two cells at a time on two "
        "cores, so a coarse figure; `make bench` measures it alone).",
        "cannot tell" if ratio is None else "holds" if ratio <= 1.5 else "does not hold",
        "not measured" if ratio is None else f"{refined:.0f} s against {plain:.0f} s: {ratio:.2f} times.",
    )


# --- helpers ---------------------------------------------------------------------------------------------------------


def _refined(loss: str, weight: float) -> Variant:
    return Variant(loss, (("sr_lambda", weight),))


def _sized(variant: Variant, size: int) -> Variant:
    return Variant(variant.loss, (*variant.values, (SIZE, size)))


def _final(group: Group, curve: str) -> float:
    value = group.final(f"normalized_rewards/{curve}")
    return float("nan") if value is None else value


def _share_verdict(agree: Sequence[bool]) -> Verdict:
    if not agree:
        return "cannot tell"
    share = 100 * sum(agree)
    if share >= MOST * len(agree):
        return "holds"
    return "does not hold" if share <= (100 - MOST) * len(agree) else "cannot tell"


def _all_verdict(agree: Sequence[bool]) -> Verdict:
    return "holds" if all(agree) else "cannot tell" if any(agree) else "does not hold"


def _test(group: Group | None, other: Group | None) -> tuple[float, float]:
    """p-value and mean difference, problem by problem; no difference where one is missing."""
    if group is None or other is None:
        return 1.0, 0.0
    ours, theirs = shares_solved(group, other)
    return (sign_flip_p(ours - theirs), float((ours - theirs).mean())) if len(ours) else (1.0, 0.0)


def _held_out(group: Group | None) -> float | None:
    return group.held_out.margin if group and group.held_out else None


def _seconds(group: Group | None) -> float | None:
    times = [cell.train_seconds for cell in group.cells if cell.train_seconds] if group else []
    return sum(times) / len(times) if times else None


def _by_rate(study: Study, variant: Variant, curve: str) -> str:
    parts = []
    for rate in study.rates:
        values = [_final(group, curve) for group in study.of(variant, rate)]
        parts.append(f"{min(values):.2f} to {max(values):.2f} at {rate:g}" if values else f"(missing) at {rate:g}")
    return f"{curve} from {' and '.join(parts)} (nats)"


def _count(agree: Sequence[bool]) -> str:
    return f"{sum(agree)} of {len(agree)}"


def _percent(group: Group | None) -> str:
    return _share(group and group.accuracy)


def _share(value: float | None) -> str:
    return "missing" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    return "missing" if value is None else f"{value:.3f}"
