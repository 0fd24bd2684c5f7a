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

LARGEST_EXPONENT = 15.0  # e^15 is 3e6


def exponential(exponent: Tensor) -> Tensor:
    """e^x, continued as a straight line from `LARGEST_EXPONENT` on, same shape.

    So losses, their squares and norms of their gradients are finite in float32 for any log-ratio of a training, and
    what lies far out is still pulled back.
    """
    largest = torch.full_like(exponent, LARGEST_EXPONENT)
    # minimum and maximum share the gradient at a tie, which is then that of e^x.
    beyond = torch.maximum(exponent, largest) - largest
    return torch.minimum(exponent, largest).exp() + math.exp(LARGEST_EXPONENT) * beyond


def forward_kl_score(logratio: Tensor) -> Tensor:
    """f'(t) = 1 - 1/t, f(t) = -log t, same shape as the log-ratios in nats: bounded above, steep below 0."""
    return 1 - exponential(-logratio)


def js_score(logratio: Tensor) -> Tensor:
    """f'(t) = log(2t / (1 + t)) of the Jensen-Shannon divergence, same shape: below log 2 = 0.69."""
    return math.log(2) + F.logsigmoid(logratio)


def alpha_score(logratio: Tensor, alpha: float) -> Tensor:
    """f'(t) = (t^(a-1) - 1) / (a - 1), a = alpha, same shape; its limit log t at a = 1.

    As TRL 1.16 has it: a towards 1 is the reverse KL divergence, a = 0 the forward one.
    """
    if alpha == 1:
        return logratio
    exponent = (alpha - 1) * logratio
    is_small = exponent < 1  # where expm1 keeps the digits
    power = torch.where(is_small, torch.expm1(exponent.clamp(max=1)), exponential(exponent) - 1)
    return power / (alpha - 1)


def squared_score(logratio: Tensor) -> Tensor:
    """f'(t) = log t / t, f(t) = (log t)^2 / 2, same shape (arXiv 2602.06788): largest, 1/e, at D = 1.

    Continued as a straight line below D = -`LARGEST_EXPONENT`, like `exponential`.
    """
    least = torch.full_like(logratio, -LARGEST_EXPONENT)
    inside, below = torch.maximum(logratio, least), torch.minimum(logratio, least) - least
    slope = (1 + LARGEST_EXPONENT) * math.exp(LARGEST_EXPONENT)
    return inside * torch.exp(-inside) + slope * below


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
