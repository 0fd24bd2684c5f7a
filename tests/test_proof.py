"""Prefix sharing and the chunked head by trial: every decoder family gets the verdict that its gradients confirm."""

from __future__ import annotations

import functools
import math
from unittest import mock

import families
import plain_flash
import pytest
import tiny
import torch
from llamafactory.extras import logging
from llamafactory.train import tuner
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, MistralConfig, MistralForCausalLM

from llamafactory_ext.training.attention import accept_prefix_trees
from llamafactory_ext.training.head import HeadOutput, head_output
from llamafactory_ext.training.layout import Limits, limits_of, obstacle, padded, shared_prefix
from llamafactory_ext.training.logps import response_logps, token_logps
from llamafactory_ext.training.media import placeholders, trains_language_only
from llamafactory_ext.training.modes import without_dropout
from llamafactory_ext.training.proof import Proof, made_up_pairs, prove

CPU = torch.device("cpu")
# What runs through a state, or a convolution over neighbors in the row.
NEVER = ("bloom", "jamba", "lfm2", "mamba", "mamba2", "qwen3_5_text", "qwen3_next")
# Attention of their own classes, not of transformers' interface.
OWN_CLASSES = ("falcon", "gptj", "nemotron")
NOT_EXACT = {"sdpa": (*OWN_CLASSES, "gpt_oss"), "eager": (), families.FLASH: (*OWN_CLASSES, "llama4_text")}
HEADS = {"cohere": HeadOutput(0.0625), "cohere2": HeadOutput(0.0625), "granite": HeadOutput(0.25)}
HEADS |= dict.fromkeys(("gemma2", "gemma3n_text"), HeadOutput(cap=30.0))
QUICK = ("llama", "gemma2", "qwen3_moe", "mistral, window of 64", "lfm2", "granite", "nemotron")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in families.FAMILIES]


@pytest.mark.parametrize("attention", families.ATTENTIONS)
@pytest.mark.parametrize("family", CASES)
def test_a_family_shares_prefixes_if_its_gradients_stay_the_same(family, attention):
    if not families.is_known(family) or (attention == families.FLASH and not plain_flash.IS_POSSIBLE):
        pytest.skip("this transformers does not have it")
    with plain_flash.installed():
        row = families.try_out(family, attention)
    is_exact = family not in NEVER and family not in NOT_EXACT[attention]
    assert row.is_exact is is_exact, row
    assert row.is_exact is (row.gradients < 1e-5), row
    if row.head is not None:
        assert row.head == HEADS.get(family, HeadOutput()), row


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere", "lfm2", "qwen3_next"])
def test_the_verdict_is_the_same_in_half_precision(family):
    model = families.make(family, "sdpa", torch.bfloat16)
    score, attention = functools.partial(token_logps, model), model.config._attn_implementation
    about = {"attention": attention, "device": CPU, "dtype": torch.bfloat16, "window": limits_of(model.config).sequence}
    proof = prove(score, score, families.TOKENS, **about)
    assert proof.holds is (family not in NEVER), proof


def proof_of(**values):
    return Proof(**{"deviation": 0.0, "noise": 0.0, "drawn": 0.0, "scale": 5.0, "epsilon": 1e-7} | values)


def test_what_proves_nothing():
    assert not proof_of(deviation=3.0, noise=2.0).holds  # as noisy as this, anything passes
    assert not proof_of(deviation=math.nan).holds
    assert not proof_of(noise=math.nan, scale=math.nan).holds
    assert not proof_of(drawn=0.1).holds
    assert proof_of(deviation=2e-4, noise=1e-4).holds


@pytest.mark.parametrize("family", ["opt", "phimoe"])
def test_a_model_that_draws_numbers_in_training_does_not_share_them(family):
    """Dropout that is no module, and a router's jitter."""
    changes = {
        "opt": {"dropout": 0.2, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "phimoe": {"router_jitter_noise": 0.3},
    }
    shape = {**families.EXPERTS, "num_local_experts": 4} if family == "phimoe" else {}
    with mock.patch.dict(families.FAMILIES, {family: shape | changes[family]}):
        model = families.make(family, "sdpa").train()
    score, attention = functools.partial(token_logps, model), model.config._attn_implementation

    def without(layout):
        with without_dropout(model):
            return score(layout)

    state = torch.random.get_rng_state()
    proof = prove(without, score, families.TOKENS, attention=attention, device=CPU, dtype=torch.float32)
    assert proof.is_random
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pairs_of_text_share_their_prefix_in_a_vision_model():
    text = {**families.SHAPE, **families.TWO_KINDS, "query_pre_attn_scalar": 8}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    config.image_token_id = config.boi_token_index = config.eoi_token_index = 95
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).train()
    accept_prefix_trees(model)
    score, about = functools.partial(token_logps, model), {"device": CPU, "dtype": torch.float32, "window": 64}
    about["attention"] = model.config._attn_implementation
    assert prove(score, score, families.TOKENS[:-1], **about).holds
    assert placeholders(model) == {95}
    assert trains_language_only(model) is False
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    assert trains_language_only(model) is True


def test_what_neighbors_mix_is_refused_however_little_it_is():
    """New weights of a convolution hardly show, and grow."""
    model = families.make("lfm2", "sdpa")
    assert obstacle(model, model.config) == "some layers mix neighboring tokens by a convolution"


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({"sliding_window": None}, Limits()),
        ({"sliding_window": 4096}, Limits(4096)),
        # Not every model reads the keys that switch a window off.
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, Limits(4096)),
        ({"sliding_window": 4096, "use_sliding_window": False}, Limits(4096)),
        ({"attention_chunk_size": 8192, "sliding_window": None}, Limits(8192)),
        ({"attention_chunk_size": 8, "sliding_window": 4}, Limits(4)),
        ({"floor_scale": 8192.0, "window_size": [1, 2]}, Limits(4096, 8192)),
    ],
)
def test_limits(changes, limits):
    assert limits_of(MistralConfig(num_hidden_layers=2, **changes)) == limits


def test_the_least_limits_of_policy_and_reference_count():
    policy, reference = MistralConfig(sliding_window=None), MistralConfig(sliding_window=64)
    assert limits_of(policy, reference) == Limits(64)


@pytest.mark.parametrize(("row", "rows"), [(None, 1), (10_000, 1), (150, 8)])
def test_a_batch_beyond_the_limit_of_a_row_has_a_row_per_response(row, rows):
    batch = made_up_pairs(families.TOKENS, CPU)
    assert len(shared_prefix(batch, limits=Limits(row=row)).inputs["input_ids"]) == rows


def test_a_batch_beyond_the_window_has_a_row_per_response():
    """Of a window of 40, the numbers are those of padded rows either way."""
    config = MistralConfig(**families.SHAPE, sliding_window=40, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    accept_prefix_trees(model)
    for window, rows in ((None, 8), (40, 1)):
        batch = made_up_pairs(families.TOKENS, CPU, window)
        layout = shared_prefix(batch, limits=Limits(40))
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


def test_a_head_of_zeros_is_known_all_the_same():
    model = families.make("granite", "sdpa")
    model.get_output_embeddings().weight.data.zero_()
    assert head_output(model, CPU) == HEADS["granite"]


def test_logits_that_are_changed_in_place():
    """As Chameleon's, which may write no pictures: the logits are whole, and right."""
    model, batch = families.make("llama", "sdpa"), made_up_pairs(families.TOKENS, CPU)
    expected = response_logps(model, padded(batch))
    other, forward = families.make("llama", "sdpa"), model.forward
    other.forward = lambda *args, **kwargs: _without_one(forward(*args, **kwargs))
    other.get_output_embeddings = model.get_output_embeddings
    assert head_output(other, CPU) is None
    assert response_logps(other, padded(batch)).chosen.shape == expected.chosen.shape


def _without_one(output):
    output.logits[:, :, 5] = -1e4
    return output


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
    assert line == "Prefix sharing is off: some layers mix neighboring tokens by a convolution."
    (_, line) = train("opt", {"dropout": 0.1})
    assert (
        line == "Prefix sharing is off: the model draws random numbers in training, which both responses would share."
    )
    with pytest.raises(ValueError, match="`share_prefix: true` is not possible here: the model draws random numbers"):
        train("opt", {"dropout": 0.1}, share_prefix=True)
