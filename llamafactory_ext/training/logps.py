"""Log-probabilities of the responses in a batch, summed over their tokens.

The language-model head runs only on the hidden states that predict a scored token. If their logits would still be
large, it runs in chunks and keeps only log-probabilities; the backward pass computes the logits again, chunk by chunk.
So the logits take the memory of one chunk, however large the batch.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.train.trainer_utils import nested_detach
from torch.utils.checkpoint import checkpoint

from .head import HeadOutput, head_output
from .layout import Layout, inner_model
from .ranking import LD_ALPHA

if TYPE_CHECKING:
    from torch import Tensor

# More to compute of a token: of logits and their log_softmax, `(scored, vocabulary)`, and the tokens, `(scored,)`.
TokenTerm = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]

# The most logits held at once: 256 MiB in float32, three times that in the backward pass. With Qwen's vocabulary of
# 151,936 that is 441 tokens, enough to keep a matrix product busy.
CHUNK = 2**26


# Micro-batches of an optimizer step in one pass without gradient: no activations are kept for backward, so more fit.
MICRO_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class ResponseLogps:
    """The log-probabilities that a model gives the responses of a batch of pairs.

    Args:
        responses: log-probability summed over each response, float32 or wider, shape `(responses,)`, in nats.
        chosen: that of each pair's chosen response, shape `(batch,)`.
        rejected: the same for the rejected response.
        chosen_length: number of tokens in the chosen response, int64, shape `(batch,)`.
        rejected_length: the same for the rejected response.
        chosen_logits: mean of the logits over response tokens and vocabulary, detached, shape `(batch,)`; 0 for an
            empty response.
        rejected_logits: the same for the rejected response.
        sums: of each term that was asked for, the sums over the chosen and over the rejected response, shape
            `(batch,)` each.
        router_loss: the load-balancing loss that a mixture of experts returns, a scalar; None if it returns none.
    """

    responses: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    router_loss: Tensor | None = None


def response_logps(
    model: torch.nn.Module,
    layout: Layout,
    ld_alpha: float | None = None,
    terms: Mapping[str, TokenTerm] | None = None,
) -> ResponseLogps:
    """Run the model once over a batch and sum the log-probabilities of each response.

    Args:
        model: a causal language model, possibly wrapped for distributed training.
        layout: the batch, from `layout.padded` or `layout.shared_prefix`.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter response (LD-DPO, arXiv 2409.06411); for
            pairs only.
        terms: more to compute of each response token, by name.

    Raises:
        ValueError: for `ld_alpha` with more than two responses to a prompt.
    """
    if ld_alpha is not None and layout.ranking is not None:
        raise ValueError(LD_ALPHA)
    terms = terms or {}
    (logps, logit_means, *others), router_loss = _scored(model, layout, tuple(terms.values()))

    def per_response(values: Tensor) -> Tensor:
        # Summed row by row: index_add on a GPU adds in no fixed order, so the same pair would round differently.
        return _in_rows(values, layout).sum(dim=1)

    lengths = per_response(torch.ones_like(layout.response))
    summands = logps[layout.entry]
    if ld_alpha is not None:
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        summands = torch.where(layout.ordinal < shorter[layout.response], summands, ld_alpha * summands)
    totals = per_response(summands)
    mean_logits = per_response(logit_means[layout.entry]) / lengths.clamp(min=1)
    sums = {name: layout.sides(per_response(values[layout.entry])) for name, values in zip(terms, others, strict=True)}
    chosen, rejected = layout.sides(totals)
    return ResponseLogps(
        totals, chosen, rejected, *layout.sides(lengths), *layout.sides(mean_logits), sums=sums, router_loss=router_loss
    )


def token_logps(model: torch.nn.Module, layout: Layout) -> Tensor:
    """The log-probability of each token of each response, in nats, float32 or wider; 0 beyond a response's end.

    Args:
        model: a causal language model, possibly wrapped for distributed training.
        layout: the batch.

    Returns:
        Shape `(responses, longest)`.
    """
    return _in_rows(_scored(model, layout)[0][0][layout.entry], layout)


def _in_rows(values: Tensor, layout: Layout) -> Tensor:
    """A value per entry of a layout, a row per response."""
    return values.new_zeros(layout.responses, layout.longest).index_put((layout.response, layout.ordinal), values)


def _scored(
    model: torch.nn.Module, layout: Layout, terms: Sequence[TokenTerm] = ()
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Of each scored token its log-probability, the mean of its logits (detached) and the terms; and the router's loss.

    Float32 or wider, shape `(scored,)` each.
    """
    # Copies: some multimodal models change their inputs in place, and a second model reads the same batch.
    inputs = nested_detach(layout.inputs, clone=True)
    final = head_output(model, layout.target.device)
    with _head_on(model, layout, final, terms) as head:
        output = model(**inputs, return_dict=True, use_cache=False)
    logits = output.logits
    if head.gives_logps:
        assert final is not None
        scored = final.received(logits[0])
    else:
        scored = _scores_of(logits[0] if head.is_narrowed else logits[layout.row, layout.column], layout.target, terms)
    logps, logit_means, *others = scored.unbind(dim=-1)
    return (logps, logit_means.detach(), *others), _router_loss(output)


def _router_loss(output: Any) -> Tensor | None:
    loss = getattr(output, "aux_loss", None)
    return loss if isinstance(loss, torch.Tensor) else None  # GraniteMoe: 0


def _scores_of(logits: Tensor, target: Tensor, terms: Sequence[TokenTerm]) -> Tensor:
    """Log-probability, mean logit (detached) and terms of each token, shape `(scored, 2 + terms)`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Not cross_entropy: Liger replaces it with a kernel that writes into the logits.
    logps = logits.log_softmax(dim=-1)
    own = logps.gather(-1, target[:, None])[:, 0]
    return torch.stack([own, logits.detach().mean(dim=-1), *(term(logits, logps, target) for term in terms)], dim=-1)


@dataclass
class _Head:
    """What takes the place of a language-model head's forward, and what it did in a forward pass.

    Of the hidden states it passes on those that predict a scored token, as one row. It is done inside the head's call,
    so that weight gathering (ZeRO-3, FSDP), LoRA and tied weights keep working.

    Args:
        layout: the batch.
        final: what the model does to its head's logits. The head then returns `_scores_of` these, shape
            `(1, scored, 2 + terms)`; None: it returns logits, to which the model may do anything.
        vocabulary: how many logits it returns.
        terms: more to compute of each token.
        forward: the head's own; None: the model has no head.
        is_narrowed: whether it saw scored tokens only; not if the model does not call it.
        gives_logps: whether it returned log-probabilities.
    """

    layout: Layout
    final: HeadOutput | None
    vocabulary: int
    terms: Sequence[TokenTerm]
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

        def score(hidden: Tensor, target: Tensor) -> Tensor:
            return _scores_of(final(forward(hidden)), target, self.terms)

        return final.sent(_in_chunks(score, scored, self.layout.target, self.vocabulary))


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
def _head_on(
    model: torch.nn.Module, layout: Layout, final: HeadOutput | None, terms: Sequence[TokenTerm]
) -> Iterator[_Head]:
    """Put a `_Head` in the place of a model's head, if it has one, inside the with block."""
    inner = inner_model(model)
    head = _Head(layout, final, inner.config.get_text_config().vocab_size, terms)
    module = inner.get_output_embeddings()
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


def _in_chunks(score: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, target: Tensor, vocabulary: int) -> Tensor:
    """What `score` makes of hidden states `(scored, width)` and tokens, a chunk at a time, with an axis in front."""
    chunks = math.ceil(len(target) * vocabulary / CHUNK)
    if chunks <= 1:
        return score(hidden, target)[None]
    parts = zip(hidden.chunk(chunks), target.chunk(chunks), strict=True)
    return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])[None]
