"""Losses of the form -log sigma(argument): DPO and the losses that change its argument.

D_w, D_l: log-ratio of the chosen and of the rejected response, in nats (`PairLogps.chosen_logratio`,
`.rejected_logratio`); sigma: the logistic function; sg: stop-gradient; relu'(0) = 0. The gradient of each loss has the
factor beta * sigma(-argument), its coefficient; but `robust` and `discopop` are sums of two terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .divergence import in_scores, squared_score
from .pairs import PairLogps, refinement_term
from .registry import LossFunction, MetricsFunction, register_loss

if TYPE_CHECKING:
    from torch import Tensor


def coefficient(argument: Tensor, *, beta: float) -> Tensor:
    """beta sigma(-argument), detached, same shape: the factor of D_w's gradient (arXiv 2408.09834, Figure 1)."""
    return beta * torch.sigmoid(-argument.detach())


def smoothed(argument: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log sigma(argument) - e log sigma(-argument), e = label_smoothing, same shape."""
    return -(1 - label_smoothing) * F.logsigmoid(argument) - label_smoothing * F.logsigmoid(-argument)


def register_argument(
    name: str, metrics: MetricsFunction | None = None, **about: bool
) -> Callable[[LossFunction], LossFunction]:
    """Register -log sigma(argument) as a loss; the decorated function computes the argument, shape `(batch,)`.

    The loss keeps the function's signature and docstring.

    Args:
        name: the loss's name.
        metrics: computes what to log besides the coefficient.
        about: more for `register_loss`.
    """

    def register(argument: LossFunction) -> LossFunction:
        @functools.wraps(argument)
        def loss(pairs: PairLogps, **hyperparameters: Any) -> Tensor:
            return -F.logsigmoid(argument(pairs, **hyperparameters))

        # A partial of named functions can be pickled with the recipe; a nested function cannot.
        return register_loss(name, metrics=functools.partial(_measure, loss, metrics), **about)(loss)

    return register


def _measure(
    loss: LossFunction, metrics: MetricsFunction | None, pairs: PairLogps, *, beta: float, **others: Any
) -> dict[str, Tensor]:
    argument = loss.__wrapped__(pairs, beta=beta, **others)  # type: ignore[attr-defined]
    found = {"dpo/coefficient": coefficient(argument, beta=beta)}
    return found | (metrics(pairs, **others) if metrics else {})


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo_argument(pairs: PairLogps, *, beta: float) -> Tensor:
    """beta (D_w - D_l), shape `(batch,)`: the argument of DPO's log-sigmoid (arXiv 2305.18290, Eq. 7)."""
    return beta * pairs.margin


def refined_argument(pairs: PairLogps, *, beta: float, sr_lambda: float) -> Tensor:
    """beta (D_w - D_l) - lambda sg[Delta], shape `(batch,)` (arXiv 2405.21040, Eq. 13)."""
    return dpo_argument(pairs, beta=beta) - refinement_term(pairs, sr_lambda=sr_lambda)


def sigmoid_metrics(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0, **_: float) -> dict[str, Tensor]:
    """The coefficient, shape `(batch,)`."""
    return {"dpo/coefficient": coefficient(refined_argument(pairs, beta=beta, sr_lambda=sr_lambda), beta=beta)}


@register_loss("sigmoid", metrics=sigmoid_metrics, takes_divergence=True)
def sigmoid(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0, sr_lambda: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigma(beta(D_w-D_l)) - e log sigma(-beta(D_w-D_l)), e = label_smoothing.

    Widens the margin between chosen and rejected, with a force that fades as the margin grows. Usual beta: 0.1 to 0.5
    (github.com/eric-mitchell/direct-preference-optimization). sr_lambda > 0 adds sr_dpo's refinement term.
    Source: arXiv 2305.18290, Eq. 7; with e > 0 the conservative DPO of TRL and LLaMA-Factory.
    """
    return smoothed(refined_argument(pairs, beta=beta, sr_lambda=sr_lambda), label_smoothing)


@register_loss("robust", takes_divergence=True)
def robust(pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0, sr_lambda: float = 0.0) -> Tensor:
    """Robust DPO: ((1-e) (-log sigma(beta(D_w-D_l))) - e (-log sigma(-beta(D_w-D_l)))) / (1 - 2e), e = label_smoothing.

    DPO's loss without the bias of labels that are swapped with probability e. Usual beta: as DPO's. sr_lambda > 0 adds
    sr_dpo's refinement term.
    Source: arXiv 2403.00409 (rDPO). Unlike DPO's label smoothing, it can be negative.
    """
    argument = refined_argument(pairs, beta=beta, sr_lambda=sr_lambda)
    clean, swapped = -F.logsigmoid(argument), -F.logsigmoid(-argument)
    return ((1 - label_smoothing) * clean - label_smoothing * swapped) / (1 - 2 * label_smoothing)


@register_loss("discopop", takes_divergence=True)
def discopop(pairs: PairLogps, *, beta: float, discopop_tau: float = 0.05, sr_lambda: float = 0.0) -> Tensor:
    """DiscoPOP: (1-m) (-log sigma(rho)) + m exp(-rho), rho = beta(D_w-D_l), m = sigma(rho / tau), tau = discopop_tau.

    DPO's loss where a pair is ordered wrongly, an exponential one where it is ordered rightly. Usual beta: 0.05, like
    tau. sr_lambda > 0 adds sr_dpo's refinement term to rho.
    Source: arXiv 2406.08414, Eq. 5. Unlike TRL's, it stays finite where rho is far below 0; with tau > 1 it grows there
    like exp(-(1-1/tau) rho), and overflows.
    """
    argument = refined_argument(pairs, beta=beta, sr_lambda=sr_lambda)
    mixing = argument / discopop_tau
    # exp(-rho) alone overflows where m is 0. As one power, m exp(-rho) goes to 0 there, for tau < 1.
    exponential = torch.exp(F.logsigmoid(mixing) - argument)
    return torch.sigmoid(-mixing) * -F.logsigmoid(argument) + exponential


@register_argument("sigmoid_norm", on_means=True, takes_divergence=True)
def sigmoid_norm(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0) -> Tensor:
    """Length-normalized DPO: -log sigma(beta(D_w - D_l)), on means per token.

    DPO in which a long response counts as much as a short one. Usual beta: 5 (Tulu 3), far above DPO's on sums.
    sr_lambda > 0 adds sr_dpo's refinement term, on means, too. Source: arXiv 2411.15124 (Tulu 3).
    """
    return refined_argument(pairs.per_token(), beta=beta, sr_lambda=sr_lambda)


@register_argument("odpo", needs_scores=True, takes_divergence=True)
def odpo(pairs: PairLogps, *, beta: float, odpo_alpha: float = 1.0, sr_lambda: float = 0.0) -> Tensor:
    """ODPO: -log sigma(beta(D_w - D_l) - alpha log(r_w - r_l)), r_w > r_l the data's scores (`pref_margin_column`).

    DPO with a margin that each pair must exceed: the larger, the better the chosen response was found. Usual alpha: 0.5
    to 1 (github.com/rycolab/odpo); beta as DPO's. sr_lambda > 0 adds sr_dpo's refinement term.
    Source: arXiv 2402.10571, with the logarithm as its scaling function, as in the authors' code.
    """
    argument = refined_argument(pairs, beta=beta, sr_lambda=sr_lambda)
    if pairs.score_gap is None:
        raise ValueError("these pairs carry no scores: set `score_gap`.")
    return argument - odpo_alpha * pairs.score_gap.log()


@register_argument("squared_po")
def squared_po(pairs: PairLogps, *, beta: float) -> Tensor:
    """SquaredPO: -log sigma(beta(s_w - s_l)), s = D e^(-D): f-DPO with f(t) = (log t)^2 / 2.

    A chosen response that falls below the reference is pulled up ever harder, so that its probability does not fall
    with the rejected one's; nothing is won above e times the reference's.
    Source: arXiv 2602.06788. Below D = -15 nats, s goes on as a straight line.
    """
    return dpo_argument(in_scores(pairs, squared_score), beta=beta)


# --- MinorDPO ---------------------------------------------------------------------------------------------------------


def minor_dpo_metrics(pairs: PairLogps, **_: float) -> dict[str, Tensor]:
    """1 where the rejected response is more likely than under the reference, else 0, shape `(batch,)`."""
    return {"minor_dpo/rejected_active": (pairs.rejected_logratio.detach() > 0).float()}


@register_argument("minor_dpo", minor_dpo_metrics)
def minor_dpo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.0) -> Tensor:
    """MinorDPO: -log sigma(beta D_w - beta relu(D_l)); sr_lambda > 0 adds sr_dpo's refinement term.

    Lowers the rejected response only while it is more likely than under the reference.
    Source: arXiv 2408.09834, Eq. 6.
    """
    # relu, not clamp: at D_l = 0 clamp passes the gradient, and the paper stops it (section 3.4).
    unrefined = beta * (pairs.chosen_logratio - torch.relu(pairs.rejected_logratio))
    return unrefined - refinement_term(pairs, sr_lambda=sr_lambda)


# --- DPOP -------------------------------------------------------------------------------------------------------------

DPOP_LAMBDA = 50.0


def dpop_penalty(pairs: PairLogps, *, dpop_lambda: float) -> Tensor:
    """lambda relu(-D_w), in nats, shape `(batch,)`: lambda times the chosen response's fall below the reference."""
    return dpop_lambda * torch.relu(-pairs.chosen_logratio)


def dpop_metrics(pairs: PairLogps, *, dpop_lambda: float = DPOP_LAMBDA, **_: float) -> dict[str, Tensor]:
    """The penalty in nats, and 1 where it is active, else 0, shape `(batch,)` each."""
    return {
        "dpop/penalty": dpop_penalty(pairs, dpop_lambda=dpop_lambda).detach(),
        "dpop/penalty_active": (pairs.chosen_logratio.detach() < 0).float(),
    }


@register_argument("dpop", dpop_metrics)
def dpop(pairs: PairLogps, *, beta: float, dpop_lambda: float = DPOP_LAMBDA, sr_lambda: float = 0.0) -> Tensor:
    """DPO-Positive: -log sigma(beta(D_w - D_l - lambda relu(-D_w))); sr_lambda > 0 adds sr_dpo's refinement term.

    DPO with a penalty where the chosen response is less likely than under the reference.
    Source: arXiv 2402.13228; lambda = 50 as in arXiv 2408.09834, Eq. 5.
    """
    # The penalty is inside the log-sigmoid, so beta multiplies it.
    unrefined = beta * (pairs.margin - dpop_penalty(pairs, dpop_lambda=dpop_lambda))
    return unrefined - refinement_term(pairs, sr_lambda=sr_lambda)


# --- Sr-DPO -----------------------------------------------------------------------------------------------------------


@register_argument("sr_dpo", takes_divergence=True)
def sr_dpo(pairs: PairLogps, *, beta: float, sr_lambda: float = 0.3) -> Tensor:
    """Sr-DPO: -log sigma(beta(D_w - D_l) - lambda sg[Delta]), Delta = beta(D_w' - D_l') under the augmented prompt.

    Asks for a larger margin where the model itself sees a larger difference in quality.
    Source: arXiv 2405.21040, Eq. 13 and Alg. 1.
    """
    return refined_argument(pairs, beta=beta, sr_lambda=sr_lambda)
