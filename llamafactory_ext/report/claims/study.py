"""What a claim is judged by: the groups of a sweep, and the words in which its numbers are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...evaluation.paired import sign_flip_p
from ..table import Group, shares_solved
from ..variants import SIZE, Variant

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


# --- helpers ---------------------------------------------------------------------------------------------------------


def with_lambda(loss: str, weight: float) -> Variant:
    return Variant(loss, (("sr_lambda", weight),))


def with_size(variant: Variant, size: int) -> Variant:
    return Variant(variant.loss, (*variant.values, (SIZE, size)))


def final_log_ratio(group: Group, curve: str) -> float:
    value = group.final(f"normalized_rewards/{curve}")
    return float("nan") if value is None else value


def verdict_of_most(agree: Sequence[bool]) -> Verdict:
    if not agree:
        return "cannot tell"
    share = 100 * sum(agree)
    if share >= MOST * len(agree):
        return "holds"
    return "does not hold" if share <= (100 - MOST) * len(agree) else "cannot tell"


def verdict_of_all(agree: Sequence[bool]) -> Verdict:
    return "holds" if all(agree) else "cannot tell" if any(agree) else "does not hold"


def paired_test(group: Group | None, other: Group | None) -> tuple[float, float]:
    """p-value and mean difference, problem by problem; no difference where one is missing."""
    if group is None or other is None:
        return 1.0, 0.0
    ours, theirs = shares_solved(group, other)
    return (sign_flip_p(ours - theirs), float((ours - theirs).mean())) if len(ours) else (1.0, 0.0)


def held_out_margin(group: Group | None) -> float | None:
    return group.held_out.margin if group and group.held_out else None


def mean_seconds(group: Group | None) -> float | None:
    times = [cell.train_seconds for cell in group.cells if cell.train_seconds] if group else []
    return sum(times) / len(times) if times else None


def ends_by_rate(study: Study, variant: Variant, curve: str) -> str:
    parts = []
    for rate in study.rates:
        values = [final_log_ratio(group, curve) for group in study.of(variant, rate)]
        parts.append(f"{min(values):.2f} to {max(values):.2f} at {rate:g}" if values else f"(missing) at {rate:g}")
    return f"{curve} from {' and '.join(parts)} (nats)"


def so_many(agree: Sequence[bool]) -> str:
    return f"{sum(agree)} of {len(agree)}"


def accuracy_of(group: Group | None) -> str:
    return percent(group.accuracy if group else None)


def percent(value: float | None) -> str:
    return "missing" if value is None else f"{value:.1%}"


def nats(value: float | None) -> str:
    return "missing" if value is None else f"{value:.3f}"
