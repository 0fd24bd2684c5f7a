"""Losses that compare distributions: of a pair's responses, of all answers to a prompt, of a micro-batch's pairs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .logistic import smoothed
from .pairs import PairLogps
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("exo_pair", takes_divergence=True)
def exo_pair(pairs: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: KL(q || p) over the two responses, q_w = sigma(beta(D_w - D_l)), p_w = 1 - e, e = label_smoothing > 0.

    The reverse KL divergence, which concentrates on what is preferred, where DPO's is the forward one. Usual beta: as
    DPO's; e = 1e-3.
    Source: arXiv 2402.00856, Eq. 16.
    """
    argument = beta * pairs.margin
    log_chosen, log_rejected = F.logsigmoid(argument), F.logsigmoid(-argument)
    chosen = log_chosen.exp() * (log_chosen - math.log1p(-label_smoothing))
    return chosen + log_rejected.exp() * (log_rejected - math.log(label_smoothing))


@register_loss("pl_dpo", needs_ranking=True, takes_divergence=True)
def pl_dpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """Plackett-Luce DPO: sum over answers k of log(1 + sum over answers j with a lower score of e^(-beta(D_k - D_j))).

    The negative log-likelihood of the ranking of all answers to a prompt. Of two answers, it is DPO. Answers with equal
    scores are not compared. The mean of the values of a row's pairs is the loss of the row. Usual beta: as DPO's.
    Source: arXiv 2305.18290, appendix A.3.
    """
    argument = beta * pairs.margin
    if pairs.winner is None or pairs.group is None:
        return -F.logsigmoid(argument)
    size = 2 * len(argument)  # above every number of a response, known without waiting for the GPU
    highest = argument.new_zeros(size).scatter_reduce(0, pairs.winner, -argument.detach(), "amax")
    shifted = torch.exp(-argument - highest[pairs.winner])
    of_winner = highest + torch.log(torch.exp(-highest).index_add(0, pairs.winner, shifted))
    pairs_of_winner, pairs_of_group = (_counts(each, size) for each in (pairs.winner, pairs.group))
    return of_winner[pairs.winner] * pairs_of_group / pairs_of_winner


def _counts(numbers: Tensor, size: int) -> Tensor:
    """How often each number occurs, at each place where it does, shape `(batch,)`."""
    return numbers.new_zeros(size).index_add(0, numbers, torch.ones_like(numbers))[numbers]


@register_loss("aot", needs_batch=True)
def aot(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT: DPO's loss of m_(k) - r_(k), the k-th smallest margin of the policy and of the reference in the micro-batch.

    Orders the margins of a batch as a whole above the reference's, not pair by pair. Usual beta: as DPO's. Needs
    several pairs in a micro-batch: of one, it is DPO.
    Source: arXiv 2406.05882, the paired variant; label_smoothing as in TRL.
    """
    policy = pairs.policy_chosen - pairs.policy_rejected
    reference = policy - pairs.margin
    return smoothed(beta * (policy - _at_ranks_of(policy, reference)), label_smoothing)


@register_loss("aot_unpaired", needs_batch=True)
def aot_unpaired(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Unpaired AOT: DPO's loss of D_w,(k) - D_l,(k), the k-th smallest log-ratios in the micro-batch.

    Orders all chosen responses of a batch above all rejected ones, whichever belong together. Usual beta: as DPO's.
    Source: arXiv 2406.05882, the unpaired variant; label_smoothing as in TRL.
    """
    chosen = pairs.chosen_logratio
    return smoothed(beta * (chosen - _at_ranks_of(chosen, pairs.rejected_logratio)), label_smoothing)


def _at_ranks_of(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the other value of the same rank, shape `(batch,)`."""
    return others.sort().values[values.argsort().argsort()]
