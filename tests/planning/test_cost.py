"""What a training costs: operations counted by hand, and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from llamafactory_ext.planning.cost import PEAK, Gpu, forward, reference_operations, training_operations
from llamafactory_ext.planning.model_shape import read_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("cost") / "model", max_position_embeddings=512))


@pytest.fixture(scope="module")
def model(path):
    return read_model(path)


def test_a_forward_pass_by_hand(model):
    weights = model.matrix_parameters + model.head
    assert forward(model, 1) == 2 * weights + 2 * model.layers * model.heads * model.head_dim
    assert forward(model, 10) - 10 * forward(model, 1) == 180 * model.layers * model.heads * model.head_dim


def test_a_forward_pass_as_torch_counts_it(path, model):
    """torch counts attention without the causal mask, so twice."""
    tokens = 128
    loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loaded(torch.zeros((1, tokens), dtype=torch.long), use_cache=False)
    attention = 2 * tokens**2 * model.layers * model.heads * model.head_dim
    assert counter.get_total_flops() == pytest.approx(forward(model, tokens) + attention, rel=0.01)


def test_passes_of_a_training(model):
    one = forward(model, 64)
    kinds = {"full": True, "checkpointing": False, "refined": False}
    assert training_operations(model, 5, 64, **kinds) == 2 * 5 * 3 * one
    assert training_operations(model, 5, 64, **kinds | {"full": False}) == 2 * 5 * 2 * one
    assert training_operations(model, 5, 64, **kinds | {"checkpointing": True}) == 2 * 5 * 4 * one
    assert training_operations(model, 5, 64, **kinds | {"refined": True}) == 2 * 5 * 4 * one
    assert reference_operations(model, 5, 64, refined=False) == 2 * 5 * one
    assert reference_operations(model, 5, 64, refined=True) == 4 * 5 * one


def test_hours_of_a_gpu():
    assert Gpu("a100", 0.5).hours(312e12 * 0.5 * 3600 * 7) == pytest.approx(7)
    assert all(Gpu(name, 1.0).hours(1e18) > 0 for name in PEAK)
