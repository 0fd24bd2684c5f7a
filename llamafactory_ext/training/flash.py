"""FlashAttention over prefix trees, packed into one row: one variable-length call for all trees.

The queries are the sequences' own tails, as they stand in the row; the first sequence of a tree is all its own. The
keys of each are the prefix that it shares, once more, and its tail. FlashAttention 2.1 and later align a causal mask to
the lower right, so a tail attends as if it came right after its prefix, also in a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask

from .trie import Branch, from_tensor, paths, places

if TYPE_CHECKING:
    from torch import Tensor


def is_flash(attention: str) -> bool:
    """Whether an attention implementation, by transformers' name, is FlashAttention: a hub's kernels are, too."""
    return "flash" in attention


def register(name: str, kernel: str) -> None:
    """Let transformers find `attend` with a kernel under a name, which has to contain `flash`.

    Args:
        kernel: transformers' name of it, such as `flash_attention_2`.
    """
    AttentionInterface.register(name, partial(attend, kernel=kernel))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' FlashAttention, which also accepts an `attention.tree_mask`.

    Args:
        query, key, value: shape `(batch, heads, length, head size)`, rotary embedding applied; one row of prefix trees.
        kernel: transformers' name of it.

    Returns:
        The output, shape `(batch, length, heads, head size)`, and None for the weights.
    """
    attend_to = _attend_in_trees if attention_mask is not None and attention_mask.ndim == 4 else _attend
    return attend_to(module, query, key, value, attention_mask, kernel=kernel, **kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the lengths never repeat
def _attend_in_trees(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> Tensor:
    sequences = _sequences(mask, query.device)
    key, value = key[:, :, sequences.keys], value[:, :, sequences.keys]
    # Without position_ids, which transformers would look for sequences in.
    return _attend(module, query, key, value, None, **kwargs | sequences.in_words | {"position_ids": None})


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `flash_attention_forward`, but that takes the kernel's name from the config, where ours is."""
    if s_aux is not None:  # attention sinks, a logit per head
        kwargs["s_aux"] = s_aux.to(query.dtype)
    output: Tensor = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        use_top_left_mask=flash_attn_supports_top_left_mask(),
        target_dtype=_half_precision(query, module),
        attn_implementation=kernel,
        **kwargs,
    )
    return output


def _half_precision(query: Tensor, module: torch.nn.Module) -> torch.dtype | None:
    """The dtype to cast float32 to, which the kernels do not take: autocast's, or the weights'; None: leave it."""
    if query.dtype != torch.float32:
        return None
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    config: Any = module.config
    linear = next((each for each in module.modules() if isinstance(each, torch.nn.Linear)), None)
    if linear is not None and not hasattr(config, "quantization_config"):
        return linear.weight.dtype
    dtype: torch.dtype = config.dtype if hasattr(config, "dtype") else config.torch_dtype  # transformers before 4.56
    return dtype


@dataclass(frozen=True)
class _Sequences:
    """Prefix trees as sequences of queries and of keys.

    Args:
        keys: where in the row each key stands, int64, shape `(keys,)`.
        in_words: the ends of the sequences and the longest of them, as transformers names them.
    """

    keys: Tensor
    in_words: dict[str, Any]


def _sequences(mask: Tensor, device: torch.device) -> _Sequences:
    """Made once per forward pass and kept on the tensor, for all layers."""
    if not hasattr(mask, "sequences"):
        mask.sequences = _as_sequences(from_tensor(mask[0, 0]), device)  # type: ignore[attr-defined]
    sequences: _Sequences = mask.sequences  # type: ignore[attr-defined]
    return sequences


def _as_sequences(row: list[Branch], device: torch.device) -> _Sequences:
    keys = torch.cat([places(path) for path in paths(row)])
    query_lengths, key_lengths = [each.tail for each in row], [each.shared + each.tail for each in row]
    ends = [
        torch.tensor([0, *accumulate(each)], dtype=torch.int32).to(device, non_blocking=True)
        for each in (query_lengths, key_lengths)
    ]
    in_words = {"cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1]}
    longest = {"max_length_q": max(query_lengths), "max_length_k": max(key_lengths)}
    return _Sequences(keys.to(device, non_blocking=True), in_words | longest)
