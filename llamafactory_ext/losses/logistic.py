"""The preference losses: pure functions of `PairLogps`, each under its equation.

D_w, D_l: the chosen and rejected logratio (`PairLogps.chosen_logratio`, `.rejected_logratio`); sigma: the logistic
function; relu'(0) = 0. Every loss returns one value per pair, shape `(batch,)`, in the dtype of the log-probabilities.
The `*_metrics` functions return what is worth watching while a loss trains, per pair and detached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .pairs import PairLogps
from .registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


# --- log-sigmoid losses: -log sigma(argument), whose gradient has the coefficient beta * sigma(-argument) -----------


def dpo_argument(pairs: PairLogps, *, beta: float) -> Tensor:
    """beta (D_w - D_l), the argument of DPO's log-sigmoid (arXiv 2305.18290, Eq. 7)."""
    return beta * pairs.margin


def refinement_term(pairs: PairLogps, *, sr_lambda: float) -> Tensor | float:
    """lambda sg[Delta] (arXiv 2405.21040, Eq. 13); exactly 0.0, and no refinement needed, where lambda is 0.

    Raises:
        ValueError: if lambda is not 0 and the pairs carry no refinement.
    """
    if sr_lambda == 0:
        return 0.0
    if pairs.refinement is None:
        raise ValueError("these pairs carry no refinement: compute it, or call the loss with sr_lambda=0.")
    return sr_lambda * pairs.refinement.detach()


def minor_dpo_argument(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0) -> Tensor:
    """beta D_w - beta relu(D_l) - lambda_sr sg[Delta] (arXiv 2408.09834, Eq. 6, refined as arXiv 2405.21040 does DPO).

    relu and not clamp: at D_l = 0 clamp would pass the gradient that the paper stops there (section 3.4).
    """
    unrefined = beta * (pairs.chosen_logratio - torch.relu(pairs.rejected_logratio))
    return unrefined - refinement_term(pairs, sr_lambda=sr_lambda)


def dpop_penalty(pairs: PairLogps, *, dpop_lambda: float) -> Tensor:
    """lambda relu(-D_w), in nats: how far the chosen response fell below the reference (arXiv 2402.13228)."""
    return dpop_lambda * torch.relu(-pairs.chosen_logratio)


def dpop_argument(pairs: PairLogps, *, beta: float, dpop_lambda: float, sr_lambda: float = 0.0) -> Tensor:
    """beta (D_w - D_l - lambda relu(-D_w)) - lambda_sr sg[Delta] (arXiv 2402.13228; arXiv 2408.09834, Eq. 5).

    The penalty is inside the log-sigmoid and multiplied by beta.
    """
    unrefined = beta * (pairs.margin - dpop_penalty(pairs, dpop_lambda=dpop_lambda))
    return unrefined - refinement_term(pairs, sr_lambda=sr_lambda)


def sr_dpo_argument(pairs: PairLogps, *, beta: float, sr_lambda: float) -> Tensor:
    """beta (D_w - D_l) - lambda sg[Delta] (arXiv 2405.21040, Eq. 13)."""
    return dpo_argument(pairs, beta=beta) - refinement_term(pairs, sr_lambda=sr_lambda)


def coefficient(argument: Tensor, *, beta: float) -> Tensor:
    """beta sigma(-argument), detached: the factor before the gradient of D_w (arXiv 2408.09834, Figure 1)."""
    return beta * torch.sigmoid(-argument.detach())


def sigmoid_metrics(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    return {"dpo/coefficient": coefficient(dpo_argument(pairs, beta=beta), beta=beta)}


@register_loss("sigmoid", metrics=sigmoid_metrics)
def sigmoid(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigma(beta(D_w-D_l)) - e log sigma(-beta(D_w-D_l)), e = label_smoothing.

    Source: arXiv 2305.18290, Eq. 7; with e > 0 the conservative DPO of TRL and LLaMA-Factory.
    """
    argument = dpo_argument(pairs, beta=beta)
    return -(1 - label_smoothing) * F.logsigmoid(argument) - label_smoothing * F.logsigmoid(-argument)


def minor_dpo_metrics(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0) -> dict[str, Tensor]:
    return {
        "dpo/coefficient": coefficient(minor_dpo_argument(pairs, beta=beta, sr_lambda=sr_lambda), beta=beta),
        "minor_dpo/rejected_active": (pairs.rejected_logratio.detach() > 0).float(),
    }


@register_loss("minor_dpo", metrics=minor_dpo_metrics)
def minor_dpo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0) -> Tensor:
    """MinorDPO: -log sigma(beta D_w - beta relu(D_l)); with sr_lambda > 0 refined as sr_dpo is.

    The rejected response is pushed down only while it is likelier than under the reference.
    Source: arXiv 2408.09834, Eq. 6.
    """
    return -F.logsigmoid(minor_dpo_argument(pairs, beta=beta, sr_lambda=sr_lambda))


def dpop_metrics(
    pairs: PairLogps, *, beta: float, dpop_lambda: float = 50.0, sr_lambda: float = 0.0
) -> dict[str, Tensor]:
    argument = dpop_argument(pairs, beta=beta, dpop_lambda=dpop_lambda, sr_lambda=sr_lambda)
    return {
        "dpo/coefficient": coefficient(argument, beta=beta),
        "dpop/penalty": dpop_penalty(pairs, dpop_lambda=dpop_lambda).detach(),
        "dpop/penalty_active": (pairs.chosen_logratio.detach() < 0).float(),
    }


@register_loss("dpop", metrics=dpop_metrics)
def dpop(pairs: PairLogps, *, beta: float, dpop_lambda: float = 50.0, sr_lambda: float = 0.0) -> Tensor:
    """DPO-Positive: -log sigma(beta(D_w - D_l - lambda relu(-D_w))); with sr_lambda > 0 refined as sr_dpo is.

    Source: arXiv 2402.13228; lambda = 50 where arXiv 2408.09834 (Eq. 5) compares with it.
    """
    return -F.logsigmoid(dpop_argument(pairs, beta=beta, dpop_lambda=dpop_lambda, sr_lambda=sr_lambda))


def sr_dpo_metrics(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.3) -> dict[str, Tensor]:
    return {"dpo/coefficient": coefficient(sr_dpo_argument(pairs, beta=beta, sr_lambda=sr_lambda), beta=beta)}


@register_loss("sr_dpo", metrics=sr_dpo_metrics)
def sr_dpo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.3) -> Tensor:
    """Sr-DPO: -log sigma(beta(D_w - D_l) - lambda sg[Delta]), Delta = beta(D_w' - D_l') under the augmented prompt.

    A pair whose answers differ much in quality, by the model's own judgement, is asked for a larger margin.
    Source: arXiv 2405.21040, Eq. 13 and Alg. 1.
    """
    return -F.logsigmoid(sr_dpo_argument(pairs, beta=beta, sr_lambda=sr_lambda))


# --- other losses with a reference ---------------------------------------------------------------------------------


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


@register_loss("kto_pair")
def kto_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """Pairwise KTO: the mean of 1 - sigma(beta(D_w - KL_l)) and 1 - sigma(beta(KL_w - D_l)).

    KL_w = relu(mean D_w) and KL_l = relu(mean D_l) over the micro-batch: each half is measured against the other's
    estimate. As in TRL <= 0.9, from which LLaMA-Factory has this loss, they pass gradient; TRL's batch of `2 * batch`
    losses has the mean of this one. Source: arXiv 2402.01306, Eq. 7.
    """
    chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
    chosen_kl, rejected_kl = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    undesirable = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return (desirable + undesirable) / 2


def bco(pairs: PairLogps, *, beta: float, baseline: float) -> Tensor:
    """-log sigma(beta D_w - delta) - log sigma(-(beta D_l - delta)), delta = baseline, the rewards' running mean.

    Not a `pref_loss`: `pref_bco_weight` adds it to one. Source: arXiv 2404.04656.
    """
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen - baseline) - F.logsigmoid(-(rejected - baseline))


# --- losses without a reference: LLaMA-Factory's numbers ------------------------------------------------------------


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
