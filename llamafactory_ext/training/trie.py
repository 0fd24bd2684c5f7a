"""Prefix trees in one row: which of its tokens each response's sequence consists of.

A tree holds the sequences (prompt and response) that have a prefix in common; each distinct prefix stands in the row
once. The first sequence stands there whole. Each further one branches off an earlier one, its parent: it shares the
parent's first tokens and adds its own tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Branch(NamedTuple):
    """A sequence of a tree.

    Args:
        parent: the number of the sequence that it branches off; its own if it shares nothing with another one.
        shared: how many of the parent's first tokens it shares.
        tail: its own tokens after these, at least 1; they follow the previous sequence's in the row.
    """

    parent: int
    shared: int
    tail: int


def branches(sequences: Sequence[tuple[Tensor, Tensor]]) -> list[Branch]:
    """The tree of some sequences, each the longest prefix that it has in common with an earlier one shared.

    A shared prefix ends before the first differing token, and at least one token before the end of the shorter
    sequence, so that both keep a tail.

    Args:
        sequences: token ids and labels, shape `(tokens,)` each; none is empty.
    """
    tree = [Branch(0, 0, len(sequences[0][0]))]
    for number in range(1, len(sequences)):
        common = [_common(sequences[earlier], sequences[number]) for earlier in range(number)]
        shared = max(common)
        tree.append(Branch(common.index(shared), shared, len(sequences[number][0]) - shared))
    return tree


def _common(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> int:
    end = min(len(first[0]), len(second[0])) - 1
    differs = (first[0][:end] != second[0][:end]) | (first[1][:end] != second[1][:end])
    return int(differs.nonzero()[0]) if differs.any() else end


def paths(row: Sequence[Branch]) -> list[list[tuple[int, int]]]:
    """Where each sequence's tokens stand in the row: stretches from a token to one before another, in their order.

    Args:
        row: the sequences of all trees of a row; a parent's number is its place in this list.
    """
    found: list[list[tuple[int, int]]] = []
    start = 0
    for branch in row:
        end = start + branch.tail
        prefix = _first(found[branch.parent], branch.shared) if branch.shared else []
        found.append([*prefix, (start, end)])
        start = end
    return found


def _first(path: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The first tokens of a path."""
    kept = []
    for start, end in path:
        kept.append((start, min(end, start + tokens)))
        tokens -= end - start
        if tokens <= 0:
            break
    return kept


def places(path: Sequence[tuple[int, int]]) -> Tensor:
    """The places in the row of a path's tokens, int64, shape `(tokens,)`."""
    return torch.cat([torch.arange(start, end) for start, end in path])


def in_row(trees: Sequence[Sequence[Branch]]) -> list[Branch]:
    """The sequences of several trees, one tree after the other, numbered through."""
    sizes = [0]
    for tree in trees:
        sizes.append(sizes[-1] + len(tree))
    return [
        branch._replace(parent=branch.parent + start)
        for tree, (start, _) in zip(trees, pairwise(sizes), strict=True)
        for branch in tree
    ]


def as_tensor(trees: Sequence[Sequence[Branch]]) -> Tensor:
    """The sequences of a row, int64, shape `(sequences, 3)`; `from_tensor` reads them."""
    return torch.tensor(in_row(trees), dtype=torch.int64)


def from_tensor(row: Tensor) -> list[Branch]:
    """The sequences of a row, from `as_tensor`; waits for a GPU if they are there."""
    return [Branch(*each) for each in row.tolist()]


def pair_tree(shared: int, chosen: int, rejected: int) -> list[Branch]:
    """The tree of a pair: the tokens of the shared prefix and of both tails."""
    return [Branch(0, 0, shared + chosen), Branch(0, shared, rejected)]
