"""f-divergences in place of the KL divergence to the reference (arXiv 2309.16240, Theorem 1).

DPO's log-ratio D = log t, t = pi / pi_ref, is f'(t) of the reverse KL divergence, up to a constant. Another divergence
gives each response the score f'(t), and a loss of the scores' difference the same way as of the log-ratios'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .pairs import PairLogps

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 80.0  # in float32, e^80 times a few thousand is finite


def _exponential(exponent: Tensor) -> Tensor:
    """e^x, from `LARGEST_EXPONENT` on constant and without gradient."""
    return exponent.clamp(max=LARGEST_EXPONENT).exp()


def forward_kl_score(logratio: Tensor) -> Tensor:
    """f'(t) = 1 - 1/t, f(t) = -log t, same shape as the log-ratios in nats: bounded above, steep below 0."""
    return 1 - _exponential(-logratio)


def js_score(logratio: Tensor) -> Tensor:
    """f'(t) = log(2t / (1 + t)) of the Jensen-Shannon divergence, same shape: below log 2 = 0.69."""
    return math.log(2) + F.logsigmoid(logratio)


def alpha_score(logratio: Tensor, alpha: float) -> Tensor:
    """f'(t) = (t^(a-1) - 1) / (a - 1), a = alpha, same shape; its limit log t at a = 1.

    As TRL 1.16 has it: a towards 1 is the reverse KL divergence, a = 0 the forward one.
    """
    if alpha == 1:
        return logratio
    exponent = ((alpha - 1) * logratio).clamp(max=LARGEST_EXPONENT)
    return torch.expm1(exponent) / (alpha - 1)


def squared_score(logratio: Tensor) -> Tensor:
    """f'(t) = log t / t, f(t) = (log t)^2 / 2, same shape (arXiv 2602.06788): largest, 1/e, at D = 1."""
    bounded = logratio.clamp(min=-LARGEST_EXPONENT)
    return bounded * torch.exp(-bounded)


@dataclass(frozen=True)
class Divergence:
    """A choice of `f_divergence`.

    Args:
        name: `reverse_kl`, which changes nothing, `forward_kl`, `js` or `alpha`.
        alpha: of the alpha-divergence.
    """

    name: str = "reverse_kl"
    alpha: float = 0.5

    def of(self, pairs: PairLogps) -> PairLogps:
        """The pairs with scores in place of log-ratios: all of the policy, with a reference of 0.

        Raises:
            ValueError: if the pairs carry no reference log-probabilities.
        """
        if self.name == "reverse_kl":
            return pairs
        return in_scores(pairs, DIVERGENCES[self.name](self))

    def __str__(self) -> str:
        return f"alpha({self.alpha})" if self.name == "alpha" else self.name


def in_scores(pairs: PairLogps, score: Callable[[Tensor], Tensor]) -> PairLogps:
    """The pairs with `score(D)` in place of each log-ratio D."""
    chosen, rejected = score(pairs.chosen_logratio), score(pairs.rejected_logratio)
    zero = torch.zeros_like(chosen)
    scores = {"policy_chosen": chosen, "policy_rejected": rejected}
    return replace(pairs, **scores, reference_chosen=zero, reference_rejected=zero)


DIVERGENCES: dict[str, Callable[[Divergence], Callable[[Tensor], Tensor]]] = {
    "reverse_kl": lambda _: lambda logratio: logratio,
    "forward_kl": lambda _: forward_kl_score,
    "js": lambda _: js_score,
    "alpha": lambda divergence: lambda logratio: alpha_score(logratio, divergence.alpha),
}
