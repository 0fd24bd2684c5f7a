"""Losses that train the margin D_w - D_l (in nats) toward a target: hinge and squared losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .pairs import PairLogps, refinement_term
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("hinge", takes_divergence=True)
def hinge(pairs: PairLogps, *, beta: float) -> Tensor:
    """Hinge: relu(1 - beta(D_w - D_l)).

    Constant force until the margin reaches 1/beta nats, then none.
    Source: SLiC, arXiv 2305.10425, on DPO's margin.
    """
    return torch.relu(1 - beta * pairs.margin)


@register_loss("ipo", takes_divergence=True)
def ipo(pairs: PairLogps, *, beta: float, length_normalize: bool = True) -> Tensor:
    """IPO: (D_w - D_l - 1/(2 beta))^2, on means per token (as in TRL and LLaMA-Factory) or on sums.

    Pulls the margin to 1/(2 beta) nats, so it does not grow without end. On means, the best beta from 0.01 to 0.9 was
    0.01 in huggingface.co/blog/pref-tuning.
    Source: arXiv 2310.12036, Eq. 17, which uses sums: `length_normalize=False`.
    """
    scored = pairs.per_token() if length_normalize else pairs
    return (scored.margin - 1 / (2 * beta)) ** 2


@register_loss("sr_ipo", takes_divergence=True)
def sr_ipo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.3, length_normalize: bool = False) -> Tensor:
    """Sr-IPO: (D_w - D_l - lambda sg[Delta] - 1/(2 beta))^2, on sums or on means per token.

    IPO with a target per pair: larger where the model itself sees a larger difference in quality.
    Source: arXiv 2405.21040, Alg. 2, which uses sums.
    """
    scored = pairs.per_token() if length_normalize else pairs
    return (scored.margin - refinement_term(pairs, sr_lambda=sr_lambda) - 1 / (2 * beta)) ** 2
