"""What a claim is judged by: the groups of a sweep, and the words in which its numbers are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...evaluation.paired import sign_flip_p
from ..table import Group, shares_solved
from ..variants import SIZE, UNREFINED, Variant

Verdict = Literal["holds", "does not hold", "cannot tell"]

DPO, DPOP, MINOR_DPO, IPO = map(Variant, ("sigmoid", "dpop", "minor_dpo", "ipo"))
PLAIN = {refined: Variant(plain) for refined, plain in UNREFINED.items()}  # the losses without their refinement term
GRID = (DPO, DPOP, MINOR_DPO)  # whose learning rates and betas are the MinorDPO paper's axes
WEIGHT = "sr_lambda"
BETA, LAMBDA = 0.1, 0.3  # where self-refinement is judged, if a sweep has them
MINOR, SR = "MinorDPO (2408.09834)", "Sr (2405.21040)"
MOST = 80  # per cent of the settings must agree for a verdict on curves, or at most the rest
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
        exhibit: of the paper, that it is evidence for.
        is_run: whether the study has measured anything that the claim is about.
    """

    paper: str
    claim: str
    criterion: str
    verdict: Verdict
    numbers: str
    exhibit: str = ""
    is_run: bool = True


class Setting(NamedTuple):
    """Where a refined loss is judged.

    Args:
        rate, beta: learning rate and beta.
        weight: lambda.
    """

    rate: float
    beta: float
    weight: float


@dataclass(frozen=True)
class Study:
    """The groups of the grid, and what they are judged against.

    Args:
        groups: the cells by method, learning rate and beta.
        untrained: the accuracy of the model that all start from; None if it was not scored.
        in_small: whether it is `make reproduce`'s: a pilot has chosen the upper rate as one at which DPO breaks, and
            two trainings share two cores.
    """

    groups: Sequence[Group]
    untrained: float | None
    in_small: bool = True

    @property
    def _grid(self) -> Sequence[Group]:
        """The groups that span the axes: those of the MinorDPO paper's losses, if there are any."""
        losses = [variant.loss for variant in GRID]
        return [g for g in self.groups if g.variant.loss in losses and not g.variant.size] or self.groups

    @property
    def rates(self) -> list[float]:
        return sorted({group.learning_rate for group in self._grid})

    @property
    def betas(self) -> list[float]:
        return sorted({group.beta for group in self._grid})

    @property
    def at_all_rates(self) -> str:
        return {1: "at its rate", 2: "at both rates"}.get(len(self.rates), "at all rates")

    def of(self, variant: Variant, rate: float | None = None) -> list[Group]:
        """The groups with the variant's loss, lambda and number of pairs, by learning rate and beta."""
        found = [g for g in self.groups if is_of(g, variant) and rate in (None, g.learning_rate)]
        return sorted(found, key=lambda group: (group.learning_rate, group.beta))

    def lambdas(self, loss: str) -> list[float]:
        """Those that a refined loss was run with, on all pairs, at the rate and beta where it is judged."""
        rate, beta, _ = self.setting(loss)
        here = [g for g in self._refined(loss) if (g.learning_rate, g.beta) == (rate, beta)]
        return sorted({lambda_of(group) for group in here})

    def sizes(self, loss: str) -> list[int]:
        """The numbers of pairs that are an axis of the loss."""
        return sorted(
            {group.variant.size for group in self.groups if group.variant.loss == loss and group.variant.size}
        )

    def setting(self, loss: str) -> Setting:
        """Where a refined loss is judged: at the lowest learning rate, at `BETA` and `LAMBDA` or what is nearest."""
        groups = self._refined(loss)
        if not groups:
            return Setting(self.rates[0] if self.rates else 0.0, BETA, LAMBDA)
        rate = min(group.learning_rate for group in groups)
        groups = [group for group in groups if group.learning_rate == rate]
        beta = min((group.beta for group in groups), key=lambda value: abs(value - BETA))
        weights = [lambda_of(group) for group in groups if group.beta == beta]
        return Setting(rate, beta, min(weights, key=lambda value: abs(value - LAMBDA)))

    def _refined(self, loss: str) -> list[Group]:
        """The groups of a refined loss, on all pairs if any is."""
        groups = [group for group in self.groups if group.variant.loss == loss]
        return [group for group in groups if not group.variant.size] or groups

    def against_plain(self, loss: str) -> tuple[Group | None, Group | None]:
        """A refined loss where it is judged, and the loss without the refinement term there."""
        rate, beta, weight = self.setting(loss)
        return self.one(with_lambda(loss, weight), rate, beta), self.one(PLAIN[loss], rate, beta)

    def where(self, loss: str) -> str:
        """The place where a refined loss is judged, as criteria begin with it."""
        rate, beta, weight = self.setting(loss)
        at = "At the lower rate" if self.in_small else f"At learning rate {rate:g}"
        return f"{at}, beta {beta:g} and lambda {weight:g}"

    def one(self, variant: Variant, rate: float, beta: float) -> Group | None:
        """The group there; None as well where several fit, because the sweep varies what the papers do not."""
        found = [group for group in self.of(variant, rate) if group.beta == beta]
        return found[0] if len(found) == 1 else None

    def misses(self, *variants: Variant) -> bool:
        """Whether a setting of the variants was not trained: then there is no verdict on all of them."""
        return any(self.one(v, rate, beta) is None for v in variants for rate in self.rates for beta in self.betas)

    def best(self, variant: Variant, rate: float) -> Group | None:
        scored = [group for group in self.of(variant, rate) if group.accuracy is not None]
        return max(scored, key=lambda group: group.accuracy or 0.0, default=None)


# --- helpers ---------------------------------------------------------------------------------------------------------


def is_of(group: Group, variant: Variant) -> bool:
    """Whether loss, lambda and number of pairs are the variant's; what else the sweep varies does not matter."""
    own, values = group.variant, dict(variant.values)
    return (own.loss, lambda_of(group), own.size) == (variant.loss, values.get(WEIGHT, 0.0), values.get(SIZE))


def lambda_of(group: Group) -> float:
    """The refinement's weight, on the sweep's axes or in its recipe; 0 where there is no refinement."""
    recipe = group.cells[0].recipe.get(WEIGHT)
    default = LAMBDA if group.variant.loss in PLAIN else 0.0
    return float(dict(group.variant.values).get(WEIGHT, default if recipe is None else recipe))


def with_lambda(loss: str, weight: float) -> Variant:
    return Variant(loss, ((WEIGHT, weight),))


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
