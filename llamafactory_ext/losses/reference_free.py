"""Losses without a reference, on means per token: l_w and l_l, in nats, for the chosen and the rejected response."""

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
    """ORPO: -l_w - beta log sigma(log odds(l_w) - log odds(l_l)), on means per token l; odds(l) = p / (1 - p), p = e^l.

    SFT on the chosen response, plus an odds-ratio term with the weight beta (the paper's lambda).
    Source: arXiv 2403.07691, Eq. 6 and 7. Unlike LLaMA-Factory's, it stays finite where a mean is close to 0.
    """
    means = pairs.per_token()
    chosen, rejected = means.policy_chosen, means.policy_rejected
    log_odds = (chosen - rejected) - (log_of_rest(chosen) - log_of_rest(rejected))
    return -chosen + beta * -F.logsigmoid(log_odds)


def log_of_rest(logp: Tensor) -> Tensor:
    """log(1 - e^l) of log-probabilities l <= 0, any shape, finite with its gradient also where e^l rounds to 1.

    There (in float32 above l = -3e-8) log1p(-e^l) is -inf and its gradient NaN. At l = 0, the result is the value at
    the closest normal number, without gradient.
    """
    return torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).tiny)))


@register_loss("simpo", needs_reference=False)
def simpo(pairs: PairLogps, *, beta: float, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO: -log sigma(beta(l_w - l_l - gamma / beta)), on means per token l.

    DPO on the length-normalized log-probabilities by which text is generated, with a target margin. Usual beta: 2 to
    10 (github.com/princeton-nlp/SimPO).
    Source: arXiv 2405.14734, Eq. 6.
    """
    means = pairs.per_token()
    return -F.logsigmoid(beta * ((means.policy_chosen - means.policy_rejected) - simpo_gamma / beta))


@register_loss("sft", needs_reference=False)
def sft(pairs: PairLogps) -> Tensor:
    """SFT: -log pi(y_w) / n, n the mean length of the chosen responses in the micro-batch.

    Supervised fine-tuning on the chosen responses: the mean over pairs is the mean over tokens.
    Source: TRL.
    """
    tokens = pairs.chosen_length.sum().clamp(min=1)
    return -pairs.policy_chosen * len(pairs.chosen_length) / tokens
