"""Stage `attention`: attention over tries in one row, beside a row per answer, and the kernels that it runs in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from gpu_runs import DEVICE
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from training_worker import now

from llamafactory_ext import attention
from llamafactory_ext.attention import attend, trie_lengths

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

    one_row, mask = tensors(1, total), trie_lengths([lengths] * TRIES)
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
    for one, other in (("tries", "a row per answer"), ("a tail aligned at its end", "a tail under a mask")):
        if one in times and other in times:
            record(f"{total} tokens, {one} to {other}", times[one] / times[other])


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
