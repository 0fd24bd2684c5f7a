"""FlashAttention's contract in plain torch, for machines without a GPU: slow, in any precision, and differentiable."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import torch
from transformers import modeling_flash_attention_utils as flash_utils


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    s_aux=None,
):
    """Attention of sequences that stand one after the other, as flash_attn 2.1 and later (and the hub's FA3) define it.

    Args:
        q: shape `(queries, heads, size)`; k, v: shape `(keys, key-value heads, size)`.
        cu_seqlens_q, cu_seqlens_k: where the sequences end, from 0, int32, shape `(sequences + 1,)`.
        causal, window_size: the last query attends to the last key; a window counts from a query's own key.
        s_aux: a logit per head that takes part in the softmax and stands for no key.
    """
    assert q.ndim == k.ndim == v.ndim == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == len(q)
    assert int(cu_seqlens_k[-1]) == len(k) == len(v)
    assert dropout_p == 0
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    group, outputs = q.shape[1] // k.shape[1], []
    for queries, keys in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        query = q[slice(*queries)]
        key, value = (x[slice(*keys)].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        own = torch.arange(len(query))[:, None] + len(key) - len(query)  # the key that stands at the query's place
        distance = own - torch.arange(len(key))[None]
        left, right = window_size
        hidden = (distance < 0) & causal | (distance > left) & (left >= 0) | (-distance > right) & (right >= 0)
        scores = scores.masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, len(query), 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : len(key)]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, **kwargs):
    """The same of sequences of one length, shape `(batch, length, heads, size)`."""
    ends = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flat, *ends, q.shape[1], k.shape[1], **kwargs).view(*q.shape[:3], -1)


# Whether transformers finds its kernels as it is done here.
IS_POSSIBLE = hasattr(flash_utils, "_flash_with_kvcache_fn")


@contextmanager
def installed():
    """transformers takes these functions for every kernel."""

    def found(*args, **kwargs):
        return flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input

    with (
        mock.patch.object(flash_utils, "_lazy_imports", found),
        mock.patch.object(flash_utils, "_loaded_implementation", None),
    ):
        yield


def switch_on(model, kernel="flash_attention_2"):
    """Let a text model use a kernel, which transformers refuses on a CPU."""
    if not model._supports_flash_attn:
        raise ValueError(f"{type(model).__name__} has no FlashAttention")
    model.config._attn_implementation = kernel
