"""Prefix sharing and the chunked head by trial: every decoder family gets the verdict that its gradients confirm."""

from __future__ import annotations

import functools
import math

import families
import pytest
import tiny
import torch
from llamafactory.extras import logging
from llamafactory.train import tuner
from transformers import MistralConfig, MistralForCausalLM

from llamafactory_ext.training.attention import accept_prefix_trees
from llamafactory_ext.training.head import HeadOutput, head_output
from llamafactory_ext.training.layout import longest_exact, padded, shared_prefix
from llamafactory_ext.training.logps import token_logps
from llamafactory_ext.training.proof import Proof, made_up_pairs, prove

CPU = torch.device("cpu")
# What runs through a state, or a convolution over neighbors in the row.
NEVER = ("bloom", "jamba", "lfm2", "mamba", "mamba2", "qwen3_5_text", "qwen3_next")
EAGER_ONLY = ("falcon", "gpt_oss", "gptj", "nemotron")
HEADS = {"cohere": HeadOutput(0.0625), "cohere2": HeadOutput(0.0625), "granite": HeadOutput(0.25)}
HEADS |= dict.fromkeys(("gemma2", "gemma3n_text"), HeadOutput(cap=30.0))
QUICK = ("llama", "gemma2", "qwen3_moe", "mistral, window of 64", "lfm2", "granite", "nemotron")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in families.FAMILIES]


@pytest.mark.parametrize("attention", families.ATTENTIONS)
@pytest.mark.parametrize("family", CASES)
def test_a_family_shares_prefixes_if_its_gradients_stay_the_same(family, attention):
    if not families.is_known(family):
        pytest.skip("this transformers does not have it")
    row = families.try_out(family, attention)
    is_exact = family not in NEVER and (attention == "eager" or family not in EAGER_ONLY)
    assert row.is_exact is is_exact, row
    assert row.is_exact is (row.gradients < 1e-5), row
    if row.head is not None:
        assert row.head == HEADS.get(family, HeadOutput()), row


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere", "lfm2", "qwen3_next"])
def test_the_verdict_is_the_same_in_half_precision(family):
    model = families.make(family, "sdpa", torch.bfloat16)
    score, attention = functools.partial(token_logps, model), model.config._attn_implementation
    about = {"attention": attention, "device": CPU, "dtype": torch.bfloat16, "window": longest_exact(model.config)}
    proof = prove(score, families.TOKENS, **about)
    assert proof.holds is (family not in NEVER), proof


def test_a_model_that_draws_numbers_proves_nothing():
    assert not Proof(deviation=3.0, noise=2.0, scale=5.0, epsilon=1e-7).holds
    assert not Proof(deviation=math.nan, noise=0.0, scale=5.0, epsilon=1e-7).holds
    assert not Proof(deviation=1e-5, noise=math.nan, scale=math.nan, epsilon=1e-7).holds
    assert Proof(deviation=2e-4, noise=1e-4, scale=5.0, epsilon=1e-7).holds


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"attention_chunk_size": 8192, "sliding_window": None}, 8192),
        ({"attention_chunk_size": 8, "sliding_window": 4, "layer_types": ["chunked_attention"] * 2}, 8),
    ],
)
def test_the_longest_sequence_that_local_layers_see_as_a_whole(changes, longest):
    assert longest_exact(MistralConfig(num_hidden_layers=2, **changes)) == longest


def test_a_batch_beyond_the_window_has_a_row_per_response():
    """Of a window of 40, the numbers are those of padded rows either way."""
    config = MistralConfig(**families.SHAPE, sliding_window=40, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    accept_prefix_trees(model)
    for window, rows in ((None, 8), (40, 1)):
        batch = made_up_pairs(families.TOKENS, CPU, window)
        layout = shared_prefix(batch, window=40)
        assert len(layout.inputs["input_ids"]) == rows
        ours, theirs = token_logps(model, layout), token_logps(model, padded(batch))
        torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "llama"])
def test_what_is_done_to_logits_is_found_however_small_they_are(family, dtype):
    """Logits near 0 are hardly changed by a cap, and half precision hides more."""
    model = families.make(family, "sdpa", dtype)
    model.get_output_embeddings().weight.data *= 0.05
    assert head_output(model, CPU) == HEADS.get(family, HeadOutput())


def test_an_output_that_is_rounded_holds_no_log_probabilities():
    model = families.make("llama", "sdpa", torch.bfloat16)
    forward = model.forward
    model.forward = lambda *args, **kwargs: _rounded(forward(*args, **kwargs))
    assert head_output(model, CPU) is None


def _rounded(output):
    output.logits = output.logits.bfloat16()
    return output


def test_under_autocast_the_head_runs_in_chunks():
    model = families.make("llama", "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        assert head_output(model, CPU) == HeadOutput()


def test_what_a_head_sends_comes_back():
    values = torch.tensor([-700.0, -30.0, -1.0, -1e-6, 0.0, 25.0])
    for head in (HeadOutput(), HeadOutput(0.0625), HeadOutput(cap=30.0), HeadOutput(4.0, 20.0)):
        torch.testing.assert_close(head.received(head(head.sent(values))), values, rtol=2e-6, atol=1e-9)


def test_a_head_that_does_more_is_left_alone():
    """Logits in another order are neither scaled nor capped."""
    model = families.make("llama", "sdpa")
    forward = model.forward
    model.forward = lambda *args, **kwargs: _flipped(forward(*args, **kwargs))
    assert head_output(model, CPU) is None


def _flipped(output):
    output.logits = output.logits.flip(-1)
    return output


# --- in a training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger(), "info_rank0", lambda message: said.append(str(message)))

    def run(family, shape, **changes):
        """What a training of a tiny model says of prefix sharing."""
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        model = tiny.make_model(folder / "model")  # for its tokenizer
        for path in (model / "config.json", *model.glob("*.safetensors"), model / "generation_config.json"):
            path.unlink(missing_ok=True)
        families.make(family, "sdpa", vocab_size=258, **shape).save_pretrained(model)
        tuner.run_exp(tiny.recipe(model, data, folder / "out", bf16=False, **changes))
        return [line for line in said if "Prefix sharing" in line]

    return run


@pytest.mark.parametrize(
    ("family", "shape", "limit"),
    [
        ("gemma3_text", {"sliding_window": 200}, 200),
        ("mistral", {"sliding_window": 4096}, 4096),
        ("qwen3_moe", {}, None),
    ],
)
def test_a_training_says_that_it_shares_prefixes(family, shape, limit, train):
    (line,) = train(family, shape, share_prefix=True)
    assert line.startswith("Prefix sharing is on: log-probabilities of made-up pairs change by at most ")
    assert line.endswith(f" Batches with a sequence of over {limit} tokens do without." if limit else ".")


def test_a_training_says_why_it_does_not(train):
    (line,) = train("lfm2", {})
    assert line.startswith("Prefix sharing is off: it would change log-probabilities of made-up pairs by 0.")
    with pytest.raises(ValueError, match="`share_prefix: true` is not possible here: it would change"):
        train("lfm2", {}, share_prefix=True)
