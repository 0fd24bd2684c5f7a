"""Sequence log-probabilities of responses: what a model makes of a batch of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from llamafactory.train.trainer_utils import get_batch_logps, nested_detach

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ResponseLogps:
    """A model's view of a batch of pairs.

    Args:
        chosen: sum of the response tokens' log-probabilities, float32, shape `(batch,)`, in nats.
        rejected: the same for the rejected responses.
        chosen_length: number of response tokens, int64, shape `(batch,)`.
        rejected_length: the same for the rejected responses.
        chosen_logits: mean of the logits over positions (padding included) and vocabulary, shape `(batch,)`, detached.
        rejected_logits: the same for the rejected responses.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor


def response_logps(model: torch.nn.Module, batch: dict[str, Tensor], ld_alpha: float | None = None) -> ResponseLogps:
    """Run the model once over all answers of the batch and sum up the log-probability of each response.

    Args:
        model: a causal language model, possibly wrapped for distributed training.
        batch: what LLaMA-Factory's pairwise collator gives: the chosen answers in the first half of the rows, the
            rejected ones in the second; `labels` of shape `(2 * batch, length)` is -100 outside the responses.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter response (LD-DPO, arXiv 2409.06411).
    """
    # Copies, because some multimodal models change their inputs in place and a second model reads the same batch.
    inputs = nested_detach({key: value for key, value in batch.items() if key != "labels"}, clone=True)
    logits = model(**inputs, return_dict=True, use_cache=False).logits.to(torch.float32)
    sums, lengths = get_batch_logps(logits, batch["labels"], ld_alpha=ld_alpha)
    mean_logits = logits.detach().mean(dim=(1, 2))
    return ResponseLogps(*sums.chunk(2), *lengths.chunk(2), *mean_logits.chunk(2))
