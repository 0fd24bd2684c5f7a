"""Log-probabilities of the responses in a batch of pairs, summed over their tokens.

The language-model head runs only on the hidden states that predict a scored token. If their logits would still be
large, it runs in chunks and keeps only log-probabilities; the backward pass computes the logits again, chunk by chunk.
So the logits take the memory of one chunk, however large the batch.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.train.trainer_utils import nested_detach
from torch.utils.checkpoint import checkpoint

from .head import HeadOutput, head_output
from .layout import Layout, inner_model

if TYPE_CHECKING:
    from torch import Tensor

# The most logits held at once: 256 MiB in float32, three times that in the backward pass. With Qwen's vocabulary of
# 151,936 that is 441 tokens, enough to keep a matrix product busy.
CHUNK = 2**26


# Micro-batches of an optimizer step in one pass without gradient: no activations are kept for backward, so more fit.
MICRO_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class ResponseLogps:
    """The log-probabilities that a model gives the responses of a batch of pairs.

    Args:
        chosen: log-probability summed over the chosen response, float32 or wider, shape `(batch,)`, in nats.
        rejected: the same for the rejected response.
        chosen_length: number of tokens in the chosen response, int64, shape `(batch,)`.
        rejected_length: the same for the rejected response.
        chosen_logits: mean of the logits over response tokens and vocabulary, detached, shape `(batch,)`; 0 for an
            empty response.
        rejected_logits: the same for the rejected response.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor


def response_logps(model: torch.nn.Module, layout: Layout, ld_alpha: float | None = None) -> ResponseLogps:
    """Run the model once over a batch and sum the log-probabilities of each response.

    Args:
        model: a causal language model, possibly wrapped for distributed training.
        layout: the batch, from `layout.padded` or `layout.shared_prefix`.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter response (LD-DPO, arXiv 2409.06411).
    """
    logps, logit_means = _scored(model, layout)

    def per_response(values: Tensor) -> Tensor:
        # Summed row by row: index_add on a GPU adds in no fixed order, so the same pair would round differently.
        return _in_rows(values, layout).sum(dim=1)

    lengths = per_response(torch.ones_like(layout.response))
    terms = logps[layout.entry]
    if ld_alpha is not None:
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        terms = torch.where(layout.ordinal < shorter[layout.response], terms, ld_alpha * terms)
    mean_logits = per_response(logit_means[layout.entry]) / lengths.clamp(min=1)
    return ResponseLogps(*per_response(terms).chunk(2), *lengths.chunk(2), *mean_logits.chunk(2))


def token_logps(model: torch.nn.Module, layout: Layout) -> Tensor:
    """The log-probability of each token of each response, in nats, float32 or wider; 0 beyond a response's end.

    Args:
        model: a causal language model, possibly wrapped for distributed training.
        layout: the batch.

    Returns:
        Shape `(2 * pairs, longest)`, the chosen responses first.
    """
    return _in_rows(_scored(model, layout)[0][layout.entry], layout)


def _in_rows(values: Tensor, layout: Layout) -> Tensor:
    """A value per entry of a layout, a row per response."""
    return values.new_zeros(2 * layout.pairs, layout.longest).index_put((layout.response, layout.ordinal), values)


def _scored(model: torch.nn.Module, layout: Layout) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token, and the mean of its logits over the vocabulary (detached).

    Float32 or wider, shape `(scored,)` each.
    """
    # Copies: some multimodal models change their inputs in place, and a second model reads the same batch.
    inputs = nested_detach(layout.inputs, clone=True)
    final = head_output(model, layout.target.device)
    with _head_on(model, layout, final) as head:
        output = model(**inputs, return_dict=True, use_cache=False).logits
    if head.gives_logps:
        assert final is not None
        logps, logit_means = final.received(output[0]).unbind(dim=-1)
        return logps, logit_means.detach()
    return _logps_of(output[0] if head.is_narrowed else output[layout.row, layout.column], layout.target)


def _logps_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Not cross_entropy: Liger replaces it with a kernel that writes into the logits.
    logps = logits.log_softmax(dim=-1).gather(-1, target[:, None])[:, 0]
    return logps, logits.detach().mean(dim=-1)


@dataclass
class _Head:
    """What takes the place of a language-model head's forward, and what it did in a forward pass.

    Of the hidden states it passes on those that predict a scored token, as one row. It is done inside the head's call,
    so that weight gathering (ZeRO-3, FSDP), LoRA and tied weights keep working.

    Args:
        layout: the batch.
        final: what the model does to its head's logits. The head then returns `_logps_of` these, shape
            `(1, scored, 2)`; None: it returns logits, to which the model may do anything.
        vocabulary: how many logits it returns.
        forward: the head's own; None: the model has no head.
        is_narrowed: whether it saw scored tokens only; not if the model does not call it.
        gives_logps: whether it returned log-probabilities.
    """

    layout: Layout
    final: HeadOutput | None
    vocabulary: int
    forward: Callable[..., Tensor] | None = None
    is_narrowed: bool = False
    gives_logps: bool = False

    def __call__(self, hidden: Tensor, *others: Any) -> Tensor:
        final, forward = self.final, self.forward
        assert forward is not None
        self.is_narrowed, self.gives_logps = True, final is not None
        scored = hidden[self.layout.row, self.layout.column]
        if final is None:
            return forward(scored[None], *others)
        logps = _in_chunks(lambda part: final(forward(part)), scored, self.layout.target, self.vocabulary)
        return final.sent(logps)


# Per head one function: a compiled model would be compiled again for another.
_CALLS: weakref.WeakKeyDictionary[torch.nn.Module, _Call] = weakref.WeakKeyDictionary()


class _Call:
    """Calls the `_Head` of the forward pass, which a compiled model leaves uncompiled: its lengths never repeat."""

    def __init__(self) -> None:
        self.head: _Head | None = None
        self.forward = torch.compiler.disable(self._forward)

    def _forward(self, *args: Any) -> Tensor:
        assert self.head is not None
        return self.head(*args)


@contextmanager
def _head_on(model: torch.nn.Module, layout: Layout, final: HeadOutput | None) -> Iterator[_Head]:
    """Put a `_Head` in the place of a model's head, if it has one, inside the with block."""
    inner = inner_model(model)
    head, module = _Head(layout, final, inner.config.get_text_config().vocab_size), inner.get_output_embeddings()
    if module is None:
        yield head
        return
    call, own = _CALLS.setdefault(module, _Call()), vars(module).get("forward")
    call.head, head.forward = head, module.forward
    module.forward = call.forward
    try:
        yield head
    finally:
        call.head = None
        del module.forward
        if own is not None:
            module.forward = own


def _in_chunks(head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, vocabulary: int) -> Tensor:
    """`_logps_of` the head's logits for hidden states `(scored, width)`, stacked into shape `(1, scored, 2)`."""

    def score(hidden: Tensor, target: Tensor) -> Tensor:
        return torch.stack(_logps_of(head(hidden), target), dim=-1)

    chunks = math.ceil(len(target) * vocabulary / CHUNK)
    if chunks <= 1:
        return score(hidden, target)[None]
    parts = zip(hidden.chunk(chunks), target.chunk(chunks), strict=True)
    return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])[None]
