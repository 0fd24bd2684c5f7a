"""Attention over tries that stand in one row: what `shared prefix | chosen tail | rejected tail` must see, and no more.

A trie is two plain sequences: the shared prefix with the chosen tail, and the rejected tail, which sees the shared
prefix as if it stood right before it. Each is one call of transformers' own SDPA attention, the first without any mask,
so that nothing costs the square of the row and tries need no padding between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TRIES = "llamafactory_ext_tries"  # the name that transformers knows `attend` by


def take_tries(model: PreTrainedModel) -> None:
    """Let a model's layers compute SDPA attention by `attend`; no other model in the process is touched."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(TRIES)


def trie_lengths(lengths: list[tuple[int, int, int]]) -> Tensor:
    """What a model is given in place of a mask: per trie, tokens of its prefix, chosen tail and rejected tail.

    Shape `(1, 1, tries, 3)`, int64. transformers hands a mask of four dimensions to its layers as it is.
    """
    return torch.tensor(lengths, dtype=torch.int64)[None, None]


@dataclass(frozen=True)
class _Tries:
    """`trie_lengths` as numbers, and the masks that follow from them."""

    lengths: list[list[int]]
    masks: dict[tuple[torch.device, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def tail_masks(self, query: Tensor) -> list[Tensor]:
        """What is added to the scores of each rejected tail, 0 or -inf: shape `(1, 1, tail, prefix + tail)`.

        Made once, because the backward pass needs those of all layers; layers may be spread over devices.
        """
        place = query.device, query.dtype
        if place not in self.masks:
            self.masks[place] = [_tail_mask(shared, rejected, query) for shared, _, rejected in self.lengths]
        return self.masks[place]


def _tries(lengths: Tensor) -> _Tries:
    """Kept with the tensor, so for one forward pass: where DDP has moved it to a GPU, only the first layer waits."""
    if not hasattr(lengths, "tries"):
        lengths.tries = _Tries(lengths[0, 0].tolist())  # type: ignore[attr-defined]
    tries: _Tries = lengths.tries  # type: ignore[attr-defined]
    return tries


def _tail_mask(shared: int, rejected: int, query: Tensor) -> Tensor:
    # Rows a multiple of 16 apart, as the memory-efficient kernel wants them: it would copy another mask in every layer.
    apart = 16 * math.ceil((shared + rejected) / 16)
    return query.new_full((1, 1, rejected, apart), -math.inf).triu(shared + 1)[..., : shared + rejected]


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, which also takes `trie_lengths` for a mask.

    Args:
        query, key, value: of shape `(1, heads, length, head size)`, rotary positions applied.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    tries, outputs, start = _tries(attention_mask), [], 0
    with _without_cudnn():
        for (shared, chosen, rejected), mask in zip(tries.lengths, tries.tail_masks(query), strict=True):
            tail, end = start + shared + chosen, start + shared + chosen + rejected
            q, k, v = (tensor[:, :, start:tail] for tensor in (query, key, value))
            outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0])

            k, v = (torch.cat([x[:, :, start : start + shared], x[:, :, tail:end]], dim=2) for x in (key, value))
            outputs.append(sdpa_attention_forward(module, query[:, :, tail:end], k, v, mask, **kwargs)[0])
            start = end
    return torch.cat(outputs, dim=1), None


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Attention by torch's own kernels: cuDNN's plans anew for every length, and each trie has lengths of its own.

    Reports of its users name 0.02 to 0.5 seconds a plan; not measured here.
    """
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)


AttentionInterface.register(TRIES, attend)
AttentionMaskInterface.register(TRIES, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
