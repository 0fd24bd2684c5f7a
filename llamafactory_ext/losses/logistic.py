"""Losses -log sigma(argument): DPO and what changes its argument.

D_w, D_l: the chosen and rejected logratio (`PairLogps.chosen_logratio`, `.rejected_logratio`); sigma: the logistic
function; relu'(0) = 0. The gradient of each has the factor beta * sigma(-argument), its coefficient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .pairs import PairLogps, refinement_term
from .registry import LossFunction, MetricsFunction, register_loss

if TYPE_CHECKING:
    from torch import Tensor


def coefficient(argument: Tensor, *, beta: float) -> Tensor:
    """beta sigma(-argument), detached: the factor before the gradient of D_w (arXiv 2408.09834, Figure 1)."""
    return beta * torch.sigmoid(-argument.detach())


def register_argument(name: str, metrics: MetricsFunction | None = None) -> Callable[[LossFunction], LossFunction]:
    """Decorate a function that computes an argument to register -log sigma(argument), with its signature and docstring.

    Args:
        name: of the loss.
        metrics: what to log beside the coefficient.
    """

    def register(argument: LossFunction) -> LossFunction:
        @functools.wraps(argument)
        def loss(pairs: PairLogps, **hyperparameters: Any) -> Tensor:
            return -F.logsigmoid(argument(pairs, **hyperparameters))

        # A partial of named functions, unlike a function within this one, can be pickled with the recipe.
        return register_loss(name, metrics=functools.partial(_measure, loss, metrics))(loss)

    return register


def _measure(
    loss: LossFunction, metrics: MetricsFunction | None, pairs: PairLogps, *, beta: float, **others: Any
) -> dict[str, Tensor]:
    argument = loss.__wrapped__(pairs, beta=beta, **others)  # type: ignore[attr-defined]
    found = {"dpo/coefficient": coefficient(argument, beta=beta)}
    return found | (metrics(pairs, **others) if metrics else {})


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo_argument(pairs: PairLogps, *, beta: float) -> Tensor:
    """beta (D_w - D_l), the argument of DPO's log-sigmoid (arXiv 2305.18290, Eq. 7)."""
    return beta * pairs.margin


def sigmoid_metrics(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    return {"dpo/coefficient": coefficient(dpo_argument(pairs, beta=beta), beta=beta)}


@register_loss("sigmoid", metrics=sigmoid_metrics)
def sigmoid(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigma(beta(D_w-D_l)) - e log sigma(-beta(D_w-D_l)), e = label_smoothing.

    Source: arXiv 2305.18290, Eq. 7; with e > 0 the conservative DPO of TRL and LLaMA-Factory.
    """
    argument = dpo_argument(pairs, beta=beta)
    return -(1 - label_smoothing) * F.logsigmoid(argument) - label_smoothing * F.logsigmoid(-argument)


# --- MinorDPO ---------------------------------------------------------------------------------------------------------


def minor_dpo_metrics(pairs: PairLogps, **_: float) -> dict[str, Tensor]:
    return {"minor_dpo/rejected_active": (pairs.rejected_logratio.detach() > 0).float()}


@register_argument("minor_dpo", minor_dpo_metrics)
def minor_dpo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0) -> Tensor:
    """MinorDPO: -log sigma(beta D_w - beta relu(D_l)); with sr_lambda > 0 refined as sr_dpo is.

    The rejected response is pushed down only while it is likelier than under the reference.
    Source: arXiv 2408.09834, Eq. 6.
    """
    # relu and not clamp: at D_l = 0 clamp would pass the gradient that the paper stops there (section 3.4).
    unrefined = beta * (pairs.chosen_logratio - torch.relu(pairs.rejected_logratio))
    return unrefined - refinement_term(pairs, sr_lambda=sr_lambda)


# --- DPOP -------------------------------------------------------------------------------------------------------------

DPOP_LAMBDA = 50.0


def dpop_penalty(pairs: PairLogps, *, dpop_lambda: float) -> Tensor:
    """lambda relu(-D_w), in nats: how far the chosen response fell below the reference (arXiv 2402.13228)."""
    return dpop_lambda * torch.relu(-pairs.chosen_logratio)


def dpop_metrics(pairs: PairLogps, *, dpop_lambda: float = DPOP_LAMBDA, **_: float) -> dict[str, Tensor]:
    return {
        "dpop/penalty": dpop_penalty(pairs, dpop_lambda=dpop_lambda).detach(),
        "dpop/penalty_active": (pairs.chosen_logratio.detach() < 0).float(),
    }


@register_argument("dpop", dpop_metrics)
def dpop(pairs: PairLogps, *, beta: float, dpop_lambda: float = DPOP_LAMBDA, sr_lambda: float = 0.0) -> Tensor:
    """DPO-Positive: -log sigma(beta(D_w - D_l - lambda relu(-D_w))); with sr_lambda > 0 refined as sr_dpo is.

    Source: arXiv 2402.13228; lambda = 50 where arXiv 2408.09834 (Eq. 5) compares with it.
    """
    # The penalty is inside the log-sigmoid and multiplied by beta.
    unrefined = beta * (pairs.margin - dpop_penalty(pairs, dpop_lambda=dpop_lambda))
    return unrefined - refinement_term(pairs, sr_lambda=sr_lambda)


# --- Sr-DPO -----------------------------------------------------------------------------------------------------------


@register_argument("sr_dpo")
def sr_dpo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.3) -> Tensor:
    """Sr-DPO: -log sigma(beta(D_w - D_l) - lambda sg[Delta]), Delta = beta(D_w' - D_l') under the augmented prompt.

    A pair whose responses differ much in quality, by the model's own judgement, is asked for a larger margin.
    Source: arXiv 2405.21040, Eq. 13 and Alg. 1.
    """
    return dpo_argument(pairs, beta=beta) - refinement_term(pairs, sr_lambda=sr_lambda)
