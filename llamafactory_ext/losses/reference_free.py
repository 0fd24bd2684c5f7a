"""Losses without a reference: l_w and l_l are means per token of the chosen and the rejected response, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .pairs import PairLogps
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("orpo", needs_reference=False, on_means=True)
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


@register_loss("simpo", needs_reference=False, on_means=True)
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


@register_loss("rrhf", needs_reference=False)
def rrhf(pairs: PairLogps, *, rrhf_weight: float = 1.0) -> Tensor:
    """RRHF: c relu(l_l - l_w) - log pi(y_w), on means per token l; c = rrhf_weight.

    SFT on the chosen response, and a push where the rejected one is more likely per token.
    Source: arXiv 2304.05302, for two responses, c = 1. The authors' code (github.com/GanjinZero/RRHF) has a mean in
    place of the sum log pi(y_w), and c = 100: c should grow with the responses' length.
    """
    means = pairs.per_token()
    return rrhf_weight * torch.relu(means.policy_rejected - means.policy_chosen) - pairs.policy_chosen


def cringe_gate(pairs: PairLogps, *, cringe_bias: float, cringe_tau: float) -> Tensor:
    """sigma((b - M) / tau), shape `(batch,)`: 1 is open."""
    return torch.sigmoid((cringe_bias - (pairs.policy_chosen - pairs.policy_rejected)) / cringe_tau)


def cringe_metrics(pairs: PairLogps, *, cringe_bias: float, cringe_tau: float, **_: float) -> dict[str, Tensor]:
    """The gate, shape `(batch,)`: where it is 0, the pair is not trained on."""
    return {"cringe/gate": cringe_gate(pairs, cringe_bias=cringe_bias, cringe_tau=cringe_tau).detach()}


@register_loss("cringe", needs_reference=False, needs_contrast=True, metrics=cringe_metrics)
def cringe(
    pairs: PairLogps,
    *,
    cringe_alpha: float = 1.0,
    cringe_bias: float = 0.0,
    cringe_tau: float = 1.0,
    cringe_top_k: int = 5,
) -> Tensor:
    """Pairwise CRINGE: sigma((b - M) / tau) (-log pi(y_w) + alpha C), M = log pi(y_w) - log pi(y_l).

    SFT on the chosen response, and a contrast C of each rejected token with one that the model itself finds likely:
    C = sum_t log(1 + e^(s_t - s*_t)), s_t the token's logit, s*_t that of another token, drawn from the policy's
    cringe_top_k most likely. The gate in front closes as the margin M exceeds b nats.
    Source: arXiv 2312.16682 (the gate) and 2211.05826 (C). The gradient flows through the gate, too. The defaults of
    alpha, b and tau are ours: choose them by M, which is a sum over the response.
    """
    if pairs.contrast is None:
        raise ValueError("these pairs carry no contrast of the rejected tokens: set `contrast`.")
    gate = cringe_gate(pairs, cringe_bias=cringe_bias, cringe_tau=cringe_tau)
    return gate * (cringe_alpha * pairs.contrast - pairs.policy_chosen)
