"""FSDP on two gloo ranks: the log-probabilities of a sharded model, and their gradients.

What the plugin adds to FSDP, by itself; `test_fsdp_recipes.py` has whole trainings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_ranks import end_rank, torchrun

from llamafactory_ext.training import logps
from llamafactory_ext.training.head import HeadOutput, head_output
from llamafactory_ext.training.layout import padded
from llamafactory_ext.training.logps import ResponseLogps, response_logps

pytestmark = pytest.mark.slow


def test_response_logps_of_a_sharded_model(model):
    torchrun(Path(__file__), str(model))


def compare(folder: str) -> None:
    """On each rank: the shards against a model of its own; the gradients are means over the ranks' batches."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, sharded = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for parameter in sharded.parameters():
        assert parameter.to_local().numel() * ranks == parameter.numel()

    expected = [response_logps(whole, padded(random_batch(seed))) for seed in range(ranks)]
    logps.CHUNK = 2000  # a few tokens at a time
    assert head_output(sharded, torch.device("cpu")) == HeadOutput()
    actual = response_logps(sharded, padded(random_batch(rank)))
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(actual, side), getattr(expected[rank], side))

    (sum(map(loss, expected)) / ranks).backward()
    loss(actual).backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in sharded.named_parameters():
        assert gradients[name].abs().max() > 0
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-5)

    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fully_shard(rounded, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16))
    assert head_output(rounded, torch.device("cpu")) is None  # log-probabilities would not come through
    dist.destroy_process_group()


def random_batch(seed: int) -> dict[str, torch.Tensor]:
    """Two pairs: chosen rows first, prompts of another length for every seed, the last row padded."""
    ids = torch.randint(2, 250, (4, 24), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, -6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 8 + seed] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss(pairs: ResponseLogps) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(0.1 * (pairs.chosen - pairs.rejected)).mean()


if __name__ == "__main__":
    compare(sys.argv[1])
    end_rank()
