"""Attention over prefix trees, packed into one row (`trie.py`): a pair's is `prefix | chosen tail | rejected tail`.

A tree's first sequence stands in the row whole. The tail of each further one attends to the prefix that it shares as if
it came right after it. Each is one call of transformers' own SDPA attention, the first without a mask. So no cost is
quadratic in the row's length, and the trees need no padding between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from . import flash
from .trie import Branch, as_tensor, from_tensor, paths

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


def tree_mask(trees: Sequence[Sequence[Branch]]) -> Tensor:
    """The model's `attention_mask`: the sequences of a row of prefix trees, as `trie.in_row` numbers them.

    Shape `(1, 1, sequences, 3)`, int64. transformers passes a mask of four dimensions to its layers unchanged.
    """
    return as_tensor(trees)[None, None]


@dataclass(frozen=True)
class _Trees:
    """A `tree_mask` as numbers, and the masks made from them.

    Args:
        branches: the sequences.
        paths: where their tokens stand in the row.
    """

    branches: list[Branch]
    paths: list[list[tuple[int, int]]]
    masks: dict[tuple[torch.device, torch.dtype], list[Tensor | None]] = field(default_factory=dict)

    def tail_masks(self, query: Tensor) -> list[Tensor | None]:
        """The additive mask of each tail, 0 or -inf: shape `(1, 1, tail, prefix + tail)`; None: nothing is shared.

        Made once per device and dtype, because the backward pass keeps the masks of all layers.
        """
        place = query.device, query.dtype
        if place not in self.masks:
            self.masks[place] = [
                _tail_mask(each.shared, each.tail, query) if each.parent != number else None
                for number, each in enumerate(self.branches)
            ]
        return self.masks[place]


def _trees(mask: Tensor) -> _Trees:
    """Cached on the tensor for one forward pass: if DDP moved it to a GPU, only the first layer waits for it."""
    if not hasattr(mask, "trees"):
        row = from_tensor(mask[0, 0])
        mask.trees = _Trees(row, paths(row))  # type: ignore[attr-defined]
    trees: _Trees = mask.trees  # type: ignore[attr-defined]
    return trees


def _tail_mask(shared: int, tail: int, query: Tensor) -> Tensor:
    # The row stride is a multiple of 16, as the memory-efficient kernel requires: otherwise it copies in every layer.
    stride = 16 * math.ceil((shared + tail) / 16)
    return query.new_full((1, 1, tail, stride), -math.inf).triu(shared + 1)[..., : shared + tail]


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, which also accepts a `tree_mask`.

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
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> Tensor:
    trees, outputs = _trees(mask), []
    with _without_cudnn():
        for path, tail_mask in zip(trees.paths, trees.tail_masks(query), strict=True):
            start, end = path[-1]
            k, v = (_along(path, x) for x in (key, value))
            outputs.append(sdpa_attention_forward(module, query[:, :, start:end], k, v, tail_mask, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def _along(path: list[tuple[int, int]], x: Tensor) -> Tensor:
    parts = [x[:, :, start:end] for start, end in path]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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
