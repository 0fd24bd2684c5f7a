"""Prefix trees in FlashAttention: its contract in plain torch, against each sequence by itself in float64."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from unittest import mock

import families
import plain_flash
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llamafactory.extras import logging
from llamafactory.train import tuner
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llamafactory_ext.training import flash
from llamafactory_ext.training.attention import PREFIX_TREES, accept_prefix_trees, tree_mask
from llamafactory_ext.training.layout import Limits, limits_of, obstacle
from llamafactory_ext.training.trie import pair_tree

pytestmark = pytest.mark.skipif(not plain_flash.IS_POSSIBLE, reason="transformers has another interface to kernels")

HEADS, GROUPS, SIZE = 4, 2, 8
LENGTHS = st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
MODULE = SimpleNamespace(is_causal=True)


@pytest.fixture(autouse=True)
def plain():
    with plain_flash.installed():
        yield


def tensors(length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (HEADS, GROUPS, GROUPS)
    return [
        torch.randn(1, heads, length, SIZE, generator=draw, dtype=torch.float64).requires_grad_() for heads in shapes
    ]


# --- the plain kernel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8), (1, 4)])
def test_the_plain_kernel_aligns_to_the_lower_right_as_torch_does(queries, keys):
    query, key, value = (torch.randn(1, 2, length, SIZE, dtype=torch.float64) for length in (queries, keys, keys))
    expected = scaled_dot_product_attention(query, key, value, causal_lower_right(queries, keys))
    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
    torch.testing.assert_close(plain_flash.flash_attn_func(*turned, causal=True), expected.transpose(1, 2))


def test_the_plain_kernels_window_counts_from_a_querys_own_key():
    """Three queries at the end of five keys, a window of two: the mask that FlashAttention's README prints."""
    seen = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    query, key, value = (torch.randn(1, 2, length, SIZE, dtype=torch.float64) for length in (3, 5, 5))
    turned = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    actual = plain_flash.flash_attn_func(*turned, causal=True, window_size=(1, 0))
    torch.testing.assert_close(actual, scaled_dot_product_attention(query, key, value, seen).transpose(1, 2))


# --- trees -----------------------------------------------------------------------------------------------------------


def of_sequence(query, key, value, places, window, cap):
    """Causal attention of one sequence, by its positions in the row; shape `(heads, tokens, size)`."""
    q, k, v = query[0, :, places], key[0, :, places], value[0, :, places]
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / SIZE**0.5
    scores = cap * torch.tanh(scores / cap) if cap else scores
    at = torch.arange(len(places))
    distance = at[:, None] - at[None]
    hidden = (distance < 0) | (distance >= (window or len(places)))
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


@settings(max_examples=40, deadline=None)
@given(
    trees=st.lists(LENGTHS, min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 7]),
    cap=st.sampled_from([None, 2.0]),
)
def test_trees_are_their_sequences_values_and_gradients(trees, window, cap):
    with plain_flash.installed():
        length = sum(map(sum, trees))
        query, key, value = tensors(length)
        with mock.patch.object(flash, "_half_precision", return_value=None):
            mask = tree_mask([pair_tree(*each) for each in trees])
            kwargs = {"kernel": "flash_attention_2", "sliding_window": window, "softcap": cap}
            actual = flash.attend(MODULE, query, key, value, mask, position_ids=torch.zeros(1, length), **kwargs)[0]
    start, rows, weights = 0, [], torch.randn(length, HEADS, SIZE, dtype=torch.float64)
    for shared, chosen, rejected in trees:
        place = torch.arange(start, start + shared + chosen + rejected)
        rows.append(of_sequence(query, key, value, place[: shared + chosen], window, cap))
        rejected_places = torch.cat([place[:shared], place[shared + chosen :]])
        rows.append(of_sequence(query, key, value, rejected_places, window, cap)[:, shared:])
        start += len(place)
    expected = torch.cat(rows, dim=1).transpose(0, 1)
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-12)
    inputs = (query, key, value)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (actual[0], expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_call_of_the_kernel_for_all_trees(monkeypatch):
    calls, kernel = [], plain_flash.flash_attn_varlen_func

    @functools.wraps(kernel)
    def noted(*args, **kwargs):
        calls.append(kwargs)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(plain_flash, "flash_attn_varlen_func", noted)
    query, key, value = (tensor.half() for tensor in tensors(12))
    flash.attend(
        MODULE, query, key, value, tree_mask([pair_tree(3, 2, 4), pair_tree(0, 1, 2)]), kernel="flash_attention_2"
    )
    (call,) = calls
    assert call["cu_seqlens_q"].tolist() == [0, 5, 9, 10, 12]
    assert call["max_seqlen_q"] == 5
    assert call["cu_seqlens_k"].tolist() == [0, 5, 12, 13, 15]
    assert call["max_seqlen_k"] == 7
    assert call["causal"] is True


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"])
def test_a_model_gets_a_name_of_its_own_and_back(kernel):
    model, other = families.make("llama", "eager"), families.make("llama", "eager")
    stock = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    plain_flash.switch_on(model, kernel)
    undo = accept_prefix_trees(model)
    own = model.config._attn_implementation
    assert own.startswith(PREFIX_TREES)
    assert "/" not in own
    assert flash.is_flash(own)
    assert obstacle(model, model.config) is None
    accept_prefix_trees(model)()  # once more is no change
    assert model.config._attn_implementation == own
    assert other.config._attn_implementation == "eager"
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is stock
    undo()
    assert model.config._attn_implementation == kernel


def test_padded_rows_are_as_with_eager_attention():
    model = families.make("llama", families.FLASH)
    eager = families.make("llama", "eager")
    ids, mask = torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    for each in (mask, None):
        expected, actual = (one(input_ids=ids, attention_mask=each).logits for one in (eager, model))
        kept = mask.bool() if each is not None else torch.ones_like(mask).bool()
        torch.testing.assert_close(actual[kept], expected[kept], rtol=0, atol=1e-4)


def test_a_sliding_window_is_no_limit():
    config = MistralConfig(sliding_window=64)
    assert limits_of(config) == Limits(64)
    config._attn_implementation = families.FLASH
    assert limits_of(config) == Limits()
    config.attention_chunk_size = 32
    assert limits_of(config) == Limits(32)


# --- in a training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def installed_in_transformers(monkeypatch):
    """A CPU on which transformers lets models use FlashAttention, in a release without 5.6.0's fault."""
    stock = functools.partial(flash.attend, kernel="flash_attention_2")
    for module in ("transformers.utils", "transformers.utils.import_utils"):
        monkeypatch.setattr(f"{module}.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", stock)
    monkeypatch.setattr(transformers, "__version__", "5.5.0")


@pytest.mark.parametrize("method", [{}, {"finetuning_type": "full", "ref_model": "MODEL"}])
def test_a_training_shares_prefixes_and_has_the_losses_of_sdpa(
    method, model, data, tmp_path, monkeypatch, installed_in_transformers
):
    said, losses = [], []
    monkeypatch.setattr(logging.get_logger(), "info_rank0", lambda message: said.append(str(message)))
    method = {key: str(model) if value == "MODEL" else value for key, value in method.items()}
    for attention, shared in (("sdpa", False), ("fa2", False), ("fa2", True)):
        folder = tmp_path / f"{attention}-{shared}"
        recipe = tiny.recipe(model, data, folder, flash_attn=attention, share_prefix=shared, bf16=False, **method)
        tuner.run_exp(recipe)
        logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses.append([log["loss"] for log in logs if "loss" in log])
    assert len([line for line in said if line.startswith("Prefix sharing is on")]) == 1
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_a_release_whose_interface_is_broken_is_refused(monkeypatch, model, data, tmp_path, installed_in_transformers):
    monkeypatch.setattr(transformers, "__version__", "5.6.0")
    with pytest.raises(ValueError, match=r'`flash_attn: fa2` fails with transformers 5.6.0.*"transformers<5.6.0"'):
        tuner.run_exp(tiny.recipe(model, data, tmp_path / "out", flash_attn="fa2"))
