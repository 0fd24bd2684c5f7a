"""A step does not wait for a GPU between its layout and its metrics: seen on tensors that have shapes but no values."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_layout import collate, model_of
from torch.utils._python_dispatch import TorchDispatchMode

from llamafactory_ext import get_loss
from llamafactory_ext.losses.pairs import PairLogps
from llamafactory_ext.training import attention
from llamafactory_ext.training.attention import tree_mask
from llamafactory_ext.training.layout import Layout, shared_prefix
from llamafactory_ext.training.logps import response_logps
from llamafactory_ext.training.metrics import MetricSums
from llamafactory_ext.training.trie import pair_tree

BATCH = collate([([1, 2, 3], [4, 5, 6], [4, 7]), ([8], [9], [10, 11])])


class NoTransfers(TorchDispatchMode):
    """Refuses what moves a tensor from one device to another; what asks a `meta` tensor for a value fails anyway."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            assert result.device == args[0].device, f"{function} moves a tensor"
        return result


def without_values(layout):
    """The layout on the `meta` device, but for what is a number anyway."""

    def moved(value):
        if isinstance(value, dict):
            return {name: moved(each) for name, each in value.items()}
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return Layout(**{each.name: moved(getattr(layout, each.name)) for each in dataclasses.fields(layout)})


@pytest.mark.parametrize("chunk", [60, 2**26])
def test_from_layout_to_metrics(chunk, monkeypatch):
    """Of shared prefixes: with a row per response, transformers asks once a pass how the rows are masked."""
    layout = shared_prefix(BATCH)
    trees = attention._trees(layout.inputs["attention_mask"])
    monkeypatch.setattr(attention, "_trees", lambda lengths: trees)  # which stay on the CPU
    monkeypatch.setattr("llamafactory_ext.training.logps.CHUNK", chunk)
    model = copy.deepcopy(model_of("Llama, tied head", dtype=torch.float32)).to("meta")
    layout = without_values(layout)
    sums, minor_dpo = MetricSums(), get_loss("minor_dpo")
    with NoTransfers():
        policy = response_logps(model, layout, ld_alpha=0.5)
        known = torch.zeros_like(policy.chosen)
        lengths = policy.chosen_length, policy.rejected_length
        pairs = PairLogps(policy.chosen, policy.rejected, known, known, *lengths)
        sums.add(minor_dpo.measure(pairs, beta=0.1))
        minor_dpo(pairs, beta=0.1).mean().backward()
    assert sums.sums["dpo/coefficient"].is_meta
    assert model.model.embed_tokens.weight.grad.is_meta


@pytest.mark.parametrize(
    "waits", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: x[x > 0]]
)
def test_what_waits_is_seen(waits):
    with NoTransfers(), pytest.raises((RuntimeError, NotImplementedError)):
        waits(torch.ones(3, device="meta"))


def test_lengths_of_prefix_trees_are_asked_for_once():
    class Counted(torch.Tensor):
        asked = 0

        def tolist(self):
            Counted.asked += 1
            return self.as_subclass(torch.Tensor).tolist()

    lengths = tree_mask([pair_tree(2, 1, 3)]).as_subclass(Counted)
    for _ in range(3):  # as every layer does
        assert attention._trees(lengths).paths == [[(0, 3)], [(0, 2), (3, 6)]]
    assert Counted.asked == 1


def test_masks_of_tails_are_made_once_and_wide_enough_for_the_kernel():
    lengths, query = tree_mask([pair_tree(2, 1, 3), pair_tree(20, 1, 2)]), torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    masks = attention._trees(lengths).tail_masks(query)
    assert attention._trees(lengths).tail_masks(query) is masks
    assert attention._trees(lengths).tail_masks(query.float()) is not masks
    assert masks[::2] == [None, None]  # a tree's first sequence is causal throughout
    masks = masks[1::2]
    assert [mask.shape for mask in masks] == [(1, 1, 3, 5), (1, 1, 2, 22)]
    assert all(mask.dtype == torch.bfloat16 and mask.stride(-2) % 16 == 0 for mask in masks)
    seen = [[True, True, True, False, False], [True, True, True, True, False], [True] * 5]
    assert (masks[0][0, 0] == 0).tolist() == seen
    assert masks[0][masks[0] != 0].isneginf().all()
