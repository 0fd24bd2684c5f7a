"""Losses that compare the chosen and the rejected response each with a baseline, not with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .pairs import PairLogps
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("kto_pair", needs_batch=True)
def kto_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """Pairwise KTO: the mean of 1 - sigma(beta(D_w - KL_l)) and 1 - sigma(beta(KL_w - D_l)).

    A bounded loss: pairs that the model does not learn lose their influence. Beta in the authors' example: 0.1
    (github.com/ContextualAI/HALOs).
    KL_w = relu(mean D_w) and KL_l = relu(mean D_l) over the micro-batch, with gradient, as in TRL <= 0.9, from which
    LLaMA-Factory has this loss. TRL returns `2 * batch` losses with the same mean.
    Source: arXiv 2402.01306, Eq. 7.
    """
    chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
    chosen_kl, rejected_kl = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    undesirable = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return (desirable + undesirable) / 2


@register_loss("nca_pair")
def nca_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """NCA: -log sigma(beta D_w) - (log sigma(-beta D_w) + log sigma(-beta D_l)) / 2.

    Keeps the chosen response from falling below the reference, where DPO looks at the margin only.
    Source: arXiv 2402.05369, for pairs.
    """
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@register_loss("sppo_hard")
def sppo_hard(pairs: PairLogps, *, beta: float) -> Tensor:
    """SPPO: (D_w - 1/(2 beta))^2 + (D_l + 1/(2 beta))^2.

    Moves the chosen response 1/(2 beta) nats above the reference and the rejected one as far below, and no further.
    Beta in the paper: 0.001, a distance of 500 nats.
    Source: arXiv 2405.00675, Eq. 4.7, with certain labels: P = 1 for the chosen response and 0 for the rejected one.
    """
    return (pairs.chosen_logratio - 1 / (2 * beta)) ** 2 + (pairs.rejected_logratio + 1 / (2 * beta)) ** 2


@register_loss("apo_zero")
def apo_zero(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-zero: 1 - sigma(beta D_w) + sigma(beta D_l).

    For chosen responses that are better than the model's own: raises them and lowers the rejected ones. Usual beta:
    0.1.
    Source: arXiv 2408.06266, Eq. 7.
    """
    return torch.sigmoid(-beta * pairs.chosen_logratio) + torch.sigmoid(beta * pairs.rejected_logratio)


@register_loss("apo_down")
def apo_down(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-down: sigma(beta D_w) + 1 - sigma(beta(D_w - D_l)).

    For chosen responses that are worse than the model's own: lowers both, the rejected one more. Usual beta: 0.1.
    Source: arXiv 2408.06266, Eq. 8.
    """
    return torch.sigmoid(beta * pairs.chosen_logratio) + torch.sigmoid(-beta * pairs.margin)


@register_loss("minor_sft")
def minor_sft(pairs: PairLogps, *, beta: float) -> Tensor:
    """MinorSFT: -2 log sigma(beta D_w) / (beta n), n the number of tokens of the chosen response.

    SFT on the chosen response whose force, 2 sigma(-beta D_w), fades as the response rises above the reference; there,
    it is SFT's mean per token. The rejected response is not trained on.
    Source: arXiv 2408.10642, which gives the gradient -(2/n) sigma(-beta D_w) grad log pi(y_w), by MinorDPO's authors.
    """
    return -2 / beta * F.logsigmoid(beta * pairs.chosen_logratio) / pairs.chosen_length.clamp(min=1)


@register_loss("bco_pair")
def bco_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """BCO: -log sigma(beta D_w) - log sigma(-beta D_l).

    A classifier of each response by itself, chosen or rejected, whose logit is its reward. Usual beta: 0.1.
    Source: arXiv 2404.04656, without its shift of rewards, as in TRL 1.16. `pref_bco_weight` has the shift.
    """
    return bco(pairs, beta=beta, baseline=0.0)


def bco(pairs: PairLogps, *, beta: float, baseline: float) -> Tensor:
    """BCO: -log sigma(beta D_w - delta) - log sigma(-(beta D_l - delta)), shape `(batch,)`.

    delta = baseline, the running mean of the rewards. Not a `pref_loss`: `pref_bco_weight` adds it to one.
    Source: arXiv 2404.04656.
    """
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen - baseline) - F.logsigmoid(-(rejected - baseline))
