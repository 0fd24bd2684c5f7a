"""Losses that bring the margin D_w - D_l to a value: hinge and squared ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .pairs import PairLogps, refinement_term
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("hinge")
def hinge(pairs: PairLogps, *, beta: float) -> Tensor:
    """relu(1 - beta(D_w - D_l)). Source: SLiC, arXiv 2305.10425, on the margin of DPO."""
    return torch.relu(1 - beta * pairs.margin)


@register_loss("ipo")
def ipo(pairs: PairLogps, *, beta: float, length_normalize: bool = True) -> Tensor:
    """(D_w - D_l - 1/(2 beta))^2, on per-token means (TRL's and LLaMA-Factory's convention) or on sums.

    Source: arXiv 2310.12036, Eq. 17, which is on sums: `length_normalize=False`.
    """
    scored = pairs.per_token() if length_normalize else pairs
    return (scored.margin - 1 / (2 * beta)) ** 2


@register_loss("sr_ipo")
def sr_ipo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.3, length_normalize: bool = False) -> Tensor:
    """Sr-IPO: (D_w - D_l - lambda sg[Delta] - 1/(2 beta))^2, on sums or on per-token means.

    Source: arXiv 2405.21040, Alg. 2, which is on sums.
    """
    scored = pairs.per_token() if length_normalize else pairs
    return (scored.margin - refinement_term(pairs, sr_lambda=sr_lambda) - 1 / (2 * beta)) ** 2
