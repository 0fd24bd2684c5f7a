"""Attention over prefix trees, packed into one row: each is `shared prefix | chosen tail | rejected tail`.

A prefix tree holds the two sequences of a pair: the shared prefix with the chosen tail, and the rejected tail, which
attends to the shared prefix as if it came right after it. Each is one call of transformers' own SDPA attention, the
first without a mask. So no cost is quadratic in the row's length, and the trees need no padding between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from . import flash

if TYPE_CHECKING:
    from torch import Tensor

PREFIX_TREES = "llamafactory_ext_prefix_trees"  # the name under which transformers finds `attend`


def accept_prefix_trees(model: PreTrainedModel) -> Callable[[], None]:
    """Replace a model's SDPA or FlashAttention by ours; other models in the process are not affected.

    Returns:
        A function that undoes it.
    """
    stock = model.config._attn_implementation
    own = stock
    if stock == "sdpa":
        own = PREFIX_TREES
    elif flash.is_flash(stock) and not stock.startswith(PREFIX_TREES):
        own = f"{PREFIX_TREES}_{stock.replace('/', '_')}"  # transformers looks names with a slash up on a hub
        flash.register(own, stock)
    _rename(model, stock, own)
    return partial(_rename, model, own, stock)


def _rename(model: PreTrainedModel, old: str, new: str) -> None:
    """Name another implementation in a model and its parts.

    Not by `set_attn_implementation`, which lets some models have certain names only.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == old:
            module.config._attn_implementation = {"": new}  # in this config alone, not in those of its parts


def tree_lengths(lengths: list[tuple[int, int, int]]) -> Tensor:
    """The model's `attention_mask`: per prefix tree, the tokens of shared prefix, chosen tail and rejected tail.

    Shape `(1, 1, trees, 3)`, int64. transformers passes a mask of four dimensions to its layers unchanged.
    """
    return torch.tensor(lengths, dtype=torch.int64)[None, None]


@dataclass(frozen=True)
class _Trees:
    """`tree_lengths` as numbers, and the masks made from them."""

    lengths: list[list[int]]
    masks: dict[tuple[torch.device, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def tail_masks(self, query: Tensor) -> list[Tensor]:
        """The additive mask of each rejected tail, 0 or -inf: shape `(1, 1, tail, prefix + tail)`.

        Made once per device and dtype, because the backward pass keeps the masks of all layers.
        """
        place = query.device, query.dtype
        if place not in self.masks:
            self.masks[place] = [_tail_mask(shared, rejected, query) for shared, _, rejected in self.lengths]
        return self.masks[place]


def _trees(lengths: Tensor) -> _Trees:
    """Cached on the tensor for one forward pass: if DDP moved it to a GPU, only the first layer waits for it."""
    if not hasattr(lengths, "trees"):
        lengths.trees = _Trees(lengths[0, 0].tolist())  # type: ignore[attr-defined]
    trees: _Trees = lengths.trees  # type: ignore[attr-defined]
    return trees


def _tail_mask(shared: int, rejected: int, query: Tensor) -> Tensor:
    # The row stride is a multiple of 16, as the memory-efficient kernel requires: otherwise it copies in every layer.
    stride = 16 * math.ceil((shared + rejected) / 16)
    return query.new_full((1, 1, rejected, stride), -math.inf).triu(shared + 1)[..., : shared + rejected]


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, which also accepts `tree_lengths` as the mask.

    Args:
        query, key, value: shape `(1, heads, length, head size)`, rotary embedding applied.

    Returns:
        The output, shape `(1, length, heads, head size)`, and None for the weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    return _attend_in_trees(module, query, key, value, attention_mask, **kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the lengths never repeat
def _attend_in_trees(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, **kwargs: Any
) -> Tensor:
    trees, outputs, start = _trees(lengths), [], 0
    with _without_cudnn():
        for (shared, chosen, rejected), mask in zip(trees.lengths, trees.tail_masks(query), strict=True):
            tail, end = start + shared + chosen, start + shared + chosen + rejected
            q, k, v = (tensor[:, :, start:tail] for tensor in (query, key, value))
            outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0])

            k, v = (torch.cat([x[:, :, start : start + shared], x[:, :, tail:end]], dim=2) for x in (key, value))
            outputs.append(sdpa_attention_forward(module, query[:, :, tail:end], k, v, mask, **kwargs)[0])
            start = end
    return torch.cat(outputs, dim=1)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Use torch's own kernels: cuDNN makes a new plan for every length, and lengths differ from tree to tree.

    cuDNN users report 0.02 to 0.5 seconds per plan; not measured here.
    """
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)


AttentionInterface.register(PREFIX_TREES, attend)
AttentionMaskInterface.register(PREFIX_TREES, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
