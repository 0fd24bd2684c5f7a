"""A preference loss of your own: robust DPO, which knows that a share of the labels is flipped.

Train it from this repository with

    llamafactory-cli train examples/custom_loss/smollm2-135m_lora_robust_dpo.yaml model_name_or_path=/path/to/model
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llamafactory_ext import PairLogps, register_loss


def robust_dpo_metrics(pairs: PairLogps, *, beta: float, noise: float = 0.1) -> dict[str, torch.Tensor]:
    """Optional: more curves in the logs, one value per pair."""
    return {"robust_dpo/confidence": torch.sigmoid(beta * pairs.margin.detach())}


@register_loss("robust_dpo", metrics=robust_dpo_metrics)
def robust_dpo(pairs: PairLogps, *, beta: float, noise: float = 0.1) -> torch.Tensor:
    """(-(1-e) log sigma(beta m) + e log sigma(-beta m)) / (1 - 2e), m = D_w - D_l, e = noise (arXiv 2403.00409).

    Its mean over flipped and clean labels is DPO's loss on the clean ones. `beta` comes from `pref_beta`, everything
    else from `pref_loss_args`; the result has one loss per pair, shape `(batch,)`.
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise is {noise}: write a share of flipped labels from 0 to below 0.5.")
    argument = beta * pairs.margin
    return (-(1 - noise) * F.logsigmoid(argument) + noise * F.logsigmoid(-argument)) / (1 - 2 * noise)
