"""Tokens of pairs, and the floating-point operations that they cost. Needs nothing beside Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

Result = dict[str, Any]  # of a worker
PairTokens = Sequence[int]  # tokens of the chosen and the rejected answer with their prompts, and of what both share

BINS = 10
# Dense bf16 tensor-core FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first match counts.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def common_prefix(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens that both begin with, at most one short of the shorter: what a shared prefix can hold."""
    both = zip(chosen, rejected, strict=False)
    same = sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both))
    return min(same, len(chosen) - 1, len(rejected) - 1)


def tokens(pair: PairTokens, shared: bool) -> int:
    """Tokens of a pair without padding, what both answers begin with twice or once."""
    chosen, rejected, prefix = pair
    return chosen + rejected - shared * prefix


def prefix_histogram(pairs: Sequence[PairTokens]) -> list[int]:
    """Pairs by the share of their tokens that is the common prefix (in both answers): counts in `BINS` equal bins."""
    counts = [0] * BINS
    for chosen, rejected, prefix in pairs:
        counts[min(int(BINS * 2 * prefix / (chosen + rejected)), BINS - 1)] += 1
    return counts


def padding_share(pairs: Sequence[PairTokens], shared: bool, positions: int) -> float:
    """Share of the positions that a pass over the pairs ran over and that hold no token."""
    return 1 - sum(tokens(pair, shared) for pair in pairs) / positions


def flops(pair: PairTokens, shared: bool, size: Result) -> float:
    """Floating-point operations of the policy's forward and backward pass over a pair, for the MFU.

    6 per parameter and token (2 forward, 2 for the gradient of the activations, 2 for that of trained weights), and in
    each layer 12 per hidden unit and (token, token that it sees). The reference, padding and the augmented pairs of Sr
    are not counted: they are what makes the MFU small.

    Args:
        size: `parameters`, `trained`, `layers`, `hidden`.
    """
    per_token = 4 * size["parameters"] + 2 * size["trained"]
    return per_token * tokens(pair, shared) + 12 * size["layers"] * size["hidden"] * seen(pair, shared)


def seen(pair: PairTokens, shared: bool) -> float:
    """Pairs of a token and one that it sees, half of all that precede or follow."""
    chosen, rejected, prefix = pair
    return (chosen**2 + rejected**2 - shared * prefix**2) / 2


def peak_flops(device: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
