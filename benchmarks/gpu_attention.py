"""Stage `attention`: attention over tries in one row, beside a row per answer, and the kernels that it runs in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from gpu_runs import DEVICE
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from training_watch import now

from llamafactory_ext.training import attention
from llamafactory_ext.training.attention import attend, tree_mask
from llamafactory_ext.training.trie import pair_tree

TRIES = 4
HEADS, HEAD_SIZE = 32, 128  # Qwen1.5-7B's
SHARED = 0.6  # of a trie's tokens; the rest are two tails
REPEATS = 10
# What torch calls its ways, of which each runs kernels of its own.
KERNELS = {"flash_attention": "flash", "efficient_attention": "memory-efficient", "cudnn_attention": "cuDNN"}
Run = Callable[[], torch.Tensor]


def measure(record: Any, folder: Path, rehearse: bool) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    heads, size = (2, 8) if rehearse else (HEADS, HEAD_SIZE)
    for total in (64, 128) if rehearse else (512, 2048, 8192):
        with record.going_on(f"{total} tokens"):
            of_length(record, total, heads, size, dtype)


def of_length(record: Any, total: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """Forward and backward, once over tries of `total` tokens, and over rows that hold the same answers whole."""
    trie = total // TRIES
    shared = int(SHARED * trie)
    tail = (trie - shared) // 2
    lengths = (shared, trie - shared - tail, tail)

    def tensors(rows: int, length: int) -> list[torch.Tensor]:
        return [torch.randn(rows, heads, length, size, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(3)]

    one_row, mask = tensors(1, total), tree_mask([pair_tree(*lengths)] * TRIES)
    rows = tensors(2 * TRIES, shared + max(lengths[1:]))
    query, key, value = tensors(1, shared + tail)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)

    seen = torch.ones(tail, shared + tail, dtype=torch.bool, device=DEVICE).tril(shared)

    def with_cudnn() -> torch.Tensor:
        with mock.patch.object(attention, "_without_cudnn", nullcontext):
            return attend(module, *one_row, mask)[0]

    ways: dict[str, Run] = {
        "tries": lambda: attend(module, *one_row, mask)[0],
        "tries, cuDNN allowed": with_cudnn,
        "a row per answer": lambda: scaled_dot_product_attention(*rows, is_causal=True),
        "a tail under a mask": lambda: scaled_dot_product_attention(query[:, :, shared:], key, value, seen),
        "a tail aligned at its end": lambda: scaled_dot_product_attention(
            query[:, :, shared:], key, value, causal_lower_right(tail, shared + tail)
        ),
    }
    sequences = Sequences([lengths] * TRIES)
    ways["tries in one call"] = lambda: sequences.attend(*one_row)
    with record.going_on(f"{total} tokens, tries in one call and tries"), torch.no_grad():
        apart = (ways["tries in one call"]() - ways["tries"]()).abs().max().item()
        record(
            f"{total} tokens, tries in one call: largest absolute difference from tries",
            apart,
            at_most=0.02 if DEVICE == "cuda" else 1e-5,
        )
    if importlib.util.find_spec("flash_attn") and DEVICE == "cuda":
        from flash_attn import flash_attn_func

        turned = [tensor.transpose(1, 2) for tensor in rows]
        ways["a row per answer, FlashAttention 2"] = lambda: flash_attn_func(*turned, causal=True)

    times = {}
    for name, run in ways.items():
        with record.going_on(f"{total} tokens, {name}"):
            start = now()
            forward_and_backward(run)
            record(f"{total} tokens, {name}: the first time", 1000 * (now() - start), "ms")
            times[name] = milliseconds(run)
            record(f"{total} tokens, {name}", times[name], "ms")
            if DEVICE == "cuda":
                record(f"{total} tokens, {name}: kernels", kernels(run))
    compared = [("tries", "a row per answer"), ("tries in one call", "tries")]
    for one, other in [*compared, ("a tail aligned at its end", "a tail under a mask")]:
        if one in times and other in times:
            record(f"{total} tokens, {one} beside {other}", times[one] / times[other], "of its time, below 1 is faster")


class Sequences:
    """Tries as `attention.attend` might take them one day: as many sequences of many lengths, in one call.

    The queries of a trie are two sequences, prefix with chosen tail and rejected tail, as they stand in the row. The
    second one's keys are the prefix, once more, and the rejected tail: causal, aligned at their ends.

    Args:
        tries: of each the tokens of its prefix, chosen tail and rejected tail.
    """

    def __init__(self, tries: list[tuple[int, int, int]]) -> None:
        places, start = [], 0
        queries, keys = [], []
        for shared, chosen, rejected in tries:
            tail, end = start + shared + chosen, start + shared + chosen + rejected
            places += [*range(start, tail), *range(start, start + shared), *range(tail, end)]
            queries += [shared + chosen, rejected]
            keys += [shared + chosen, shared + rejected]
            start = end
        self.places = torch.tensor(places, device=DEVICE)
        self.longest = max(queries), max(keys)
        self.ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=DEVICE) for each in (queries, keys)]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of tensors `(1, heads, length, head size)`, shape `(1, length, heads, head size)` as that of `attend`."""
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return sequences_attention(q, k[self.places], v[self.places], *self.ends, *self.longest)[None]


def sequences_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
) -> torch.Tensor:
    """Causal attention of sequences that stand one after the other; on the CPU, where torch has none, one by one."""
    if DEVICE == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        ends = (query_ends, key_ends, longest_query, longest_key)
        return varlen_attn(query.contiguous(), key, value, *ends, window_size=(-1, 0))
    outputs = []
    for rows, columns in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        q, k, v = (x[slice(*at)].transpose(0, 1) for x, at in ((query, rows), (key, columns), (value, columns)))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(scaled_dot_product_attention(q, k, v, seen).transpose(0, 1))
    return torch.cat(outputs)


def forward_and_backward(run: Run) -> None:
    run().sum().backward()


def milliseconds(run: Run) -> float:
    for _ in range(3):
        forward_and_backward(run)
    start = now()
    for _ in range(REPEATS):
        forward_and_backward(run)
    return 1000 * (now() - start) / REPEATS


def kernels(run: Run) -> str:
    """Which kinds of attention kernels ran, in words."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        forward_and_backward(run)
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profiled.key_averages() if event.key.startswith("aten::_"))
    return ", ".join(dict.fromkeys(kind for part, kind in KERNELS.items() if part in names)) or "plain products"
