"""Losses without a reference, on means per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .pairs import PairLogps
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("orpo", needs_reference=False)
def orpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """-l_w - beta log sigma(log odds(l_w) - log odds(l_l)), on per-token means l; odds(l) = p / (1 - p), p = e^l.

    Source: arXiv 2403.07691, Eq. 6 and 7. LLaMA-Factory's is not finite where a mean is 0 or close to it.
    """
    means = pairs.per_token()
    chosen, rejected = means.policy_chosen, means.policy_rejected
    log_odds = (chosen - rejected) - (log_of_rest(chosen) - log_of_rest(rejected))
    return -chosen + beta * -F.logsigmoid(log_odds)


def log_of_rest(logp: Tensor) -> Tensor:
    """log(1 - e^l) of a log-probability l <= 0, also where e^l rounds to 1; at 0 of the number next to it, for good.

    log1p(-e^l) is -inf there from l = -3e-8 on (float32), and its gradient is not a number.
    """
    return torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).tiny)))


@register_loss("simpo", needs_reference=False)
def simpo(pairs: PairLogps, *, beta: float, simpo_gamma: float = 0.5) -> Tensor:
    """-log sigma(beta(l_w - l_l - gamma / beta)), on per-token means l. Source: arXiv 2405.14734, Eq. 6."""
    means = pairs.per_token()
    return -F.logsigmoid(beta * ((means.policy_chosen - means.policy_rejected) - simpo_gamma / beta))
