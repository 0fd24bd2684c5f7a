"""The metrics that training logs about its pairs, and their means over all pairs of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..losses.pairs import PairLogps
    from .logps import ResponseLogps


def response_metrics(scored: PairLogps, policy: ResponseLogps) -> dict[str, Tensor]:
    """Log-probabilities and mean logits of the responses, shape `(batch,)` each.

    Args:
        scored: the pairs on the scale that is reported: sums over the response or means per token, in nats.
        policy: the policy's forward pass.
    """
    return {
        "logps/chosen": scored.policy_chosen,
        "logps/rejected": scored.policy_rejected,
        "logits/chosen": policy.chosen_logits,
        "logits/rejected": policy.rejected_logits,
    }


def reward_metrics(pairs: PairLogps, scored: PairLogps, beta: float) -> dict[str, Tensor]:
    """Rewards as LLaMA-Factory reports them, and normalized rewards (log-ratios in nats), shape `(batch,)` each.

    Args:
        pairs: sums over the response.
        scored: the same on the scale that is reported.
        beta: `pref_beta`.
    """
    has_reference = pairs.reference_chosen is not None
    chosen = beta * (scored.chosen_logratio if has_reference else scored.policy_chosen)
    rejected = beta * (scored.rejected_logratio if has_reference else scored.policy_rejected)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
    }
    if not has_reference:
        return metrics
    per_token = pairs.per_token()
    return metrics | {
        "normalized_rewards/chosen": pairs.chosen_logratio,
        "normalized_rewards/rejected": pairs.rejected_logratio,
        "normalized_rewards/margins": pairs.margin,
        "normalized_rewards/chosen_per_token": per_token.chosen_logratio,
        "normalized_rewards/rejected_per_token": per_token.rejected_logratio,
    }


def refinement_metrics(pairs: PairLogps, augmented: PairLogps) -> dict[str, Tensor]:
    """The refinement term, and margins (nats) and accuracies under the augmented prompts, shape `(batch,)` each.

    Source: arXiv 2405.21040.
    """
    margin = augmented.margin
    assert pairs.refinement is not None
    return {
        "sr/refinement": pairs.refinement,
        "sr/augmented_margins": margin,
        "sr/augmented_accuracies": (margin > 0).float(),
    }


class MetricSums:
    """The running sum and count of each metric, kept on the device until they are logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the values of a batch, any shape."""
        for name, values in metrics.items():
            total = values.float().sum()
            batch = torch.stack([total, total.new_full((), values.numel())])
            self.sums[name] = self.sums[name] + batch if name in self.sums else batch

    def take_means(self, accelerator: Any) -> dict[str, float]:
        """The means over all pairs of all ranks since the last call; every rank must hold the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        # One collective for all metrics.
        total = accelerator.reduce(torch.stack([self.sums[name] for name in names]), "sum")
        self.sums.clear()
        return dict(zip(names, (total[:, 0] / total[:, 1]).tolist(), strict=True))
