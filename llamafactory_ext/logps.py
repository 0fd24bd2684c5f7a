"""Sequence log-probabilities of responses: what a model makes of a batch of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from llamafactory.train.trainer_utils import nested_detach

from .layout import Layout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ResponseLogps:
    """A model's view of a batch of pairs.

    Args:
        chosen: sum of the response tokens' log-probabilities, float32 or wider, shape `(batch,)`, in nats.
        rejected: the same for the rejected responses.
        chosen_length: number of response tokens, int64, shape `(batch,)`.
        rejected_length: the same for the rejected responses.
        chosen_logits: mean of the logits over response tokens and vocabulary, shape `(batch,)`, detached.
        rejected_logits: the same for the rejected responses.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor


def response_logps(model: torch.nn.Module, layout: Layout, ld_alpha: float | None = None) -> ResponseLogps:
    """Run the model once over all answers of a batch and sum up the log-probability of each response.

    Args:
        model: a causal language model, possibly wrapped for distributed training.
        layout: the batch, as `layout.padded` or `layout.shared_prefix` lays it out.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter response (LD-DPO, arXiv 2409.06411).
    """
    logits = _scored_logits(model, layout)
    logps = -F.cross_entropy(logits, layout.target, reduction="none")

    def per_response(values: Tensor) -> Tensor:
        return values.new_zeros(2 * layout.pairs).index_add(0, layout.response, values)

    lengths = per_response(torch.ones_like(layout.response))
    terms = logps[layout.entry]
    if ld_alpha is not None:
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        terms = torch.where(layout.ordinal < shorter[layout.response], terms, ld_alpha * terms)
    mean_logits = per_response(logits.detach().mean(dim=1)[layout.entry]) / lengths
    return ResponseLogps(*per_response(terms).chunk(2), *lengths.chunk(2), *mean_logits.chunk(2))


def _scored_logits(model: torch.nn.Module, layout: Layout) -> Tensor:
    """The logits that predict the scored tokens, in float32 or wider, shape `(scored, vocabulary)`."""
    # Copies, because some multimodal models change their inputs in place and a second model reads the same batch.
    inputs = nested_detach(layout.inputs, clone=True)
    with _head_on(model, layout.row, layout.column) as was_narrowed:
        logits = model(**inputs, return_dict=True, use_cache=False).logits
    logits = logits[0] if was_narrowed() else logits[layout.row, layout.column]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _head_on(model: torch.nn.Module, row: Tensor, column: Tensor) -> Iterator[Any]:
    """Lets the language-model head see only the given hidden states, as one row; yields whether it was called so.

    By a hook, so that what belongs to the head stays with it: ZeRO-3's and FSDP's gathering, LoRA, tied weights, and
    what the model does to its logits afterwards. A model that reads its head in another way gives all its logits.
    """
    calls = []

    def narrow(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = args
        calls.append(module)
        return (hidden[row, column][None], *others)

    head = _unwrapped(model).get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(narrow, prepend=True)
    try:
        yield lambda: bool(calls)
    finally:
        if hook is not None:
            hook.remove()


def _unwrapped(model: Any) -> Any:
    """The model inside of DDP's or DeepSpeed's wrapper."""
    return _unwrapped(model.module) if hasattr(model, "module") else model
