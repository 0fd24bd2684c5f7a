"""What a recipe trains: a loss with its hyper-parameters, or the weighted sum of several (MPO, arXiv 2411.10442)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .divergence import Divergence
from .pairs import PairLogps, delta
from .registry import Loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A loss of an objective.

    Args:
        loss: a registered loss.
        hyperparameters: a value for each of its parameters.
        weight: its factor in the sum.
    """

    loss: Loss
    hyperparameters: Mapping[str, Any]
    weight: float = 1.0

    @property
    def is_refined(self) -> bool:
        """Whether it has a refinement term (arXiv 2405.21040)."""
        return bool(self.hyperparameters.get("sr_lambda"))

    @property
    def compares_means(self) -> bool:
        return self.loss.compares_means(self.hyperparameters)

    def __str__(self) -> str:
        """Like `dpop(beta=0.1, dpop_lambda=50.0)`."""
        values = ", ".join(f"{name}={value}" for name, value in self.hyperparameters.items())
        return f"{self.loss.name}({values})"


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses, mostly of one.

    Args:
        parts: the losses, each name once. The first sets the scale on which rewards are reported.
        beta: `pref_beta`.
        divergence: whose scores the losses compare.
    """

    parts: tuple[Part, ...]
    beta: float
    divergence: Divergence = field(default_factory=Divergence)

    def values(self, pairs: PairLogps, augmented: PairLogps | None = None) -> dict[str, Tensor]:
        """Each loss by name, without its weight, shape `(batch,)`.

        Args:
            pairs: the batch.
            augmented: the same responses under the augmented prompts, for losses with a refinement term.
        """
        return {
            part.loss.name: part.loss(self.seen_by(part, pairs, augmented), **part.hyperparameters)
            for part in self.parts
        }

    def values_alone(self, pairs: PairLogps, augmented: PairLogps | None = None) -> dict[str, Tensor]:
        """The same, of each pair as if it were alone in its micro-batch."""
        ones = [1] * len(pairs.policy_chosen)
        augmented_ones = augmented.split(ones) if augmented is not None else [None] * len(ones)
        found = [self.values(*each) for each in zip(pairs.split(ones), augmented_ones, strict=True)]
        return {name: torch.cat([values[name] for values in found]) for name in found[0]}

    def sum_of(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `values`, shape `(batch,)`."""
        first, *others = (values[part.loss.name] * part.weight for part in self.parts)
        return sum(others, start=first)

    def measure(self, pairs: PairLogps, augmented: PairLogps | None = None) -> dict[str, Tensor]:
        """The metrics of all losses, shape `(batch,)` each; a name that is taken gets the loss's appended."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            measured = part.loss.measure(self.seen_by(part, pairs, augmented), **part.hyperparameters)
            for name, values in measured.items():
                found[f"{name}_{part.loss.name}" if name in found else name] = values
        return found

    def seen_by(self, part: Part, pairs: PairLogps, augmented: PairLogps | None) -> PairLogps:
        """The pairs as a loss gets them: with its refinement, and with the scores of the divergence."""
        if augmented is not None and part.is_refined:
            refinement = delta(augmented, beta=self.beta, on_means=part.compares_means)
            pairs = replace(pairs, refinement=refinement)
        return self.divergence.of(pairs) if part.loss.takes_divergence else pairs

    @property
    def name(self) -> str:
        """The losses' names, as `pref_loss` names them."""
        return ",".join(part.loss.name for part in self.parts)

    @property
    def losses(self) -> list[Loss]:
        return [part.loss for part in self.parts]

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses)

    @property
    def refined(self) -> Part | None:
        """The first loss with a refinement term."""
        return next((part for part in self.parts if part.is_refined), None)

    @property
    def contrast(self) -> Part | None:
        """The loss that needs `PairLogps.contrast`."""
        return next((part for part in self.parts if part.loss.needs_contrast), None)

    @property
    def reports_means(self) -> bool:
        """Whether rewards and log-probabilities are reported as means per token: for losses that use them."""
        first = self.parts[0]
        return not self.needs_reference or bool(first.hyperparameters.get("length_normalize", False))

    def __str__(self) -> str:
        """Like `minor_dpo(beta=0.1, sr_lambda=0.0) + 0.1 * sft()`."""
        described = [str(part) if part.weight == 1 else f"{part.weight:g} * {part}" for part in self.parts]
        scores = "" if self.divergence.name == "reverse_kl" else f", f_divergence={self.divergence}"
        return " + ".join(described) + scores
