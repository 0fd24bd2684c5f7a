"""Losses that compare the chosen and the rejected response each with a baseline, not with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .pairs import PairLogps
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("kto_pair")
def kto_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """Pairwise KTO: the mean of 1 - sigma(beta(D_w - KL_l)) and 1 - sigma(beta(KL_w - D_l)).

    A bounded loss: pairs that the model does not learn lose their influence. Beta in the authors' example: 0.1
    (github.com/ContextualAI/HALOs).
    KL_w = relu(mean D_w) and KL_l = relu(mean D_l) over the micro-batch, with gradient, as in TRL <= 0.9, from which
    LLaMA-Factory has this loss. TRL returns `2 * batch` losses with the same mean. Source: arXiv 2402.01306, Eq. 7.
    """
    chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
    chosen_kl, rejected_kl = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    undesirable = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return (desirable + undesirable) / 2


def bco(pairs: PairLogps, *, beta: float, baseline: float) -> Tensor:
    """BCO: -log sigma(beta D_w - delta) - log sigma(-(beta D_l - delta)), shape `(batch,)`.

    delta = baseline, the running mean of the rewards. Not a `pref_loss`: `pref_bco_weight` adds it to one.
    Source: arXiv 2404.04656.
    """
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen - baseline) - F.logsigmoid(-(rejected - baseline))
