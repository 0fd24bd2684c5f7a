"""What a loss may need of each response token besides its log-probability, and the weights made of it.

A term is computed where the logits are (`logps.py`), so that they need not be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .columns import WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

    from ..losses.objective import Objective
    from .logps import ResponseLogps, TokenTerm

ALIGNMENT, CONTRAST = "alignment", "contrast"


@torch.no_grad()
def alignment(logits: Tensor, logps: Tensor, target: Tensor) -> Tensor:
    """log p(y_t) - log sum_v p(v)^2, shape `(scored,)`: how likely a token is beside what the policy would draw.

    Source: arXiv 2406.11827 (WPO), Eq. 2.
    """
    return logps.gather(-1, target[:, None])[:, 0] - torch.logsumexp(2 * logps, dim=-1)


@dataclass(frozen=True)
class Contrast:
    """log(1 + e^(s - s*)): s is the token's logit, s* that of another one, shape `(scored,)`, with gradient.

    The other one is drawn from the `top_k` most likely, by their probabilities: another in every step, and the same
    when activations are recomputed. Without gradients, as in evaluation, the draw is the same every time, and leaves
    the training's random numbers alone. Source: arXiv 2211.05826 (CRINGE).
    """

    top_k: int

    def __call__(self, logits: Tensor, logps: Tensor, target: Tensor) -> Tensor:
        own = logits.gather(-1, target[:, None])
        others = logits.scatter(-1, target[:, None], -torch.inf)
        likely = others.topk(min(self.top_k, others.shape[-1] - 1), dim=-1).values
        # The largest after Gumbel noise is a draw by softmax; unlike `multinomial`, it lets a NaN pass.
        drawn = (likely.detach() - _exponential_noise(likely).log()).argmax(dim=-1, keepdim=True)
        return F.softplus(own - likely.gather(-1, drawn))[:, 0]


def _exponential_noise(like: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return torch.empty_like(like).exponential_()
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty_like(like).exponential_(generator=generator)


def terms_of(objective: Objective, is_weighted: bool) -> dict[str, TokenTerm]:
    """The terms that an objective needs, by name.

    Args:
        objective: what is trained.
        is_weighted: whether pairs get WPO's weights.
    """
    terms: dict[str, TokenTerm] = {ALIGNMENT: alignment} if is_weighted else {}
    if objective.contrast is not None:
        terms[CONTRAST] = Contrast(objective.contrast.hyperparameters["cringe_top_k"])
    return terms


def pair_weights(policy: ResponseLogps, columns: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors of a pair's loss by name, shape `(batch,)` each: the data's, and WPO's.

    WPO's is w(y_w) w(y_l), w(y) = exp(mean over tokens of `alignment`), in units of 1, without gradient.
    """
    weights = {"data": columns[WEIGHT]} if WEIGHT in columns else {}
    if ALIGNMENT in policy.sums:
        lengths = (policy.chosen_length, policy.rejected_length)
        means = [total / length.clamp(min=1) for total, length in zip(policy.sums[ALIGNMENT], lengths, strict=True)]
        weights["wpo"] = (means[0] + means[1]).exp()
    return weights
