"""Both layouts against LLaMA-Factory's way of scoring, in float64: values, gradients, several families of models."""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llamafactory.train.trainer_utils import get_batch_logps
from peft import LoraConfig, get_peft_model
from planning.count_bytes import peak_of

from llamafactory_ext.training import logps
from llamafactory_ext.training.attention import accept_prefix_trees
from llamafactory_ext.training.layout import padded, shared_prefix
from llamafactory_ext.training.logps import response_logps

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "Llama, tied head": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "Gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "GPT-NeoX": ("GPTNeoX", {}),
}


@functools.cache
def model_of(family, attention="sdpa", dtype=torch.float64):
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHAPE, **changes, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    for parameter in model.parameters():  # the initial weights give logits near 0, which hide mistakes
        parameter.data *= 3
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and dtype == torch.float64:
            module.forward = functools.partial(rms_norm, module)
    accept_prefix_trees(model)
    return model.eval()


def rms_norm(module, x):
    """In x's own precision: transformers' rounds to float32, and so do the gradients that pass through it."""
    weight = 1 + module.weight if type(module).__name__.startswith("Gemma") else module.weight
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def collate(pairs, pad_left=False):
    """Pairs of (prompt, chosen, rejected) as LLaMA-Factory's collator gives them; a prompt may differ by side."""
    prompts = [prompt if isinstance(prompt, tuple) else (prompt, prompt) for prompt, _, _ in pairs]
    rows = [(prompts[n][side], pair[1 + side]) for side in (0, 1) for n, pair in enumerate(pairs)]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in rows:
        fill = length - len(prompt) - len(response)
        columns = {
            "input_ids": ([*prompt, *response], 0),
            "attention_mask": ([1] * (length - fill), 0),
            "labels": ([-100] * len(prompt) + response, -100),
        }
        for name, (values, padding) in columns.items():
            batch[name].append([padding] * fill + values if pad_left else values + [padding] * fill)
    return {name: torch.tensor(values) for name, values in batch.items()}


def by_llamafactory(model, batch, ld_alpha=None):
    """Sums and lengths as LLaMA-Factory computes them: all positions, the whole vocabulary."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return get_batch_logps(logits, batch["labels"], ld_alpha=ld_alpha)


def gradients(model, chosen, rejected):
    loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - 0.7 * rejected)).sum()
    return torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


def assert_like_llamafactory(model, batch, layout, tolerance, ld_alpha=None):
    ours = response_logps(model, layout, ld_alpha)
    sums, lengths = by_llamafactory(model, batch, ld_alpha)
    torch.testing.assert_close(torch.cat([ours.chosen, ours.rejected]), sums, rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.cat([ours.chosen_length, ours.rejected_length]), lengths)
    actual, expected = gradients(model, ours.chosen, ours.rejected), gradients(model, *sums.chunk(2))
    scale = max(gradient.abs().max().item() for gradient in expected)  # some are 0 but for rounding
    for ours_of, theirs_of in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, rtol=tolerance, atol=tolerance * scale)


token = st.integers(1, 39)
text = st.lists(token, min_size=1, max_size=6)


@st.composite
def pair(draw):
    """Answers that begin alike, not at all, or differ in one token; of one token or more; prompts cut left or right."""
    prompt, common = draw(text), draw(st.lists(token, max_size=5))
    chosen, rejected = common + draw(text), common + draw(text)
    if draw(st.booleans()):  # everything but one token in common
        rejected = [*chosen[:-1], chosen[-1] % 39 + 1]
    cut = draw(st.integers(0, len(prompt) - 1))
    prompts = draw(st.sampled_from([prompt, (prompt, prompt[cut:]), (prompt, prompt[: len(prompt) - cut])]))
    return prompts, chosen, rejected


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@given(
    pairs=st.lists(pair(), min_size=1, max_size=4),
    pad_left=st.booleans(),
    ld_alpha=st.sampled_from([None, 0.4]),
    chunk=st.sampled_from([1, 120, 2**26]),
)
@settings(max_examples=80, deadline=None)
def test_random_batches(layout, pairs, pad_left, ld_alpha, chunk):
    model, batch = model_of("Llama, tied head"), collate(pairs)
    laid_out = padded(batch) if layout == "padded" else shared_prefix(collate(pairs, pad_left))
    with mock.patch.object(logps, "CHUNK", chunk):
        assert_like_llamafactory(model, batch, laid_out, 1e-9, ld_alpha)


PAIRS = [
    ([5, 6, 7, 8], [9, 10, 11, 12], [9, 10, 13]),
    ([5], [14], [15]),
    ([16, 17], [18, 19, 20, 21, 22], [18, 19, 20, 23, 22]),
]


@pytest.mark.parametrize("chunk", [100, 2**26])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models(family, attention, chunk, monkeypatch):
    monkeypatch.setattr(logps, "CHUNK", chunk)
    model, batch = model_of(family, attention), collate(PAIRS)
    tolerance = {"sdpa": 1e-9, "eager": 1e-5}[attention]  # eager attention has its softmax in float32
    assert_like_llamafactory(model, batch, padded(batch), tolerance)
    assert_like_llamafactory(model, batch, shared_prefix(batch, attention), tolerance)


@pytest.mark.parametrize("chunk", [100, 2**26])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_lora_also_on_the_head(family, checkpointing, chunk, monkeypatch):
    monkeypatch.setattr(logps, "CHUNK", chunk)
    torch.manual_seed(1)
    targets = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(model_of(family)), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(PAIRS)
    for layout in (padded(batch), shared_prefix(batch)):
        assert_like_llamafactory(model, batch, layout, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family):
    model, batch = model_of(family, dtype=torch.float32), collate(PAIRS)
    for layout in (padded(batch), shared_prefix(batch)):
        assert_like_llamafactory(model, batch, layout, 1e-5)


@pytest.mark.parametrize("family", ["Llama, tied head", "Qwen2", "Qwen3"])
def test_bfloat16_is_no_further_from_float64_than_llamafactory(family):
    """Root mean squares over 64 pairs of random tokens, of values and of gradients."""
    rounded = copy.deepcopy(model_of(family, dtype=torch.float32)).to(torch.bfloat16)
    exact = copy.deepcopy(model_of(family)).double()
    exact.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    tokens = torch.randint(1, 40, (64, 40), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([(row[:12], row[12:26], row[12:18] + row[26:38]) for row in tokens])

    def results(model, logps):
        values = torch.cat(logps)
        return values.detach(), torch.cat([gradient.flatten() for gradient in gradients(model, *logps)])

    def ours(model, layout):
        logps = response_logps(model, layout)
        return results(model, (logps.chosen, logps.rejected))

    def rms(result):
        return [(ours.double() - truth).square().mean().sqrt() for ours, truth in zip(result, truths, strict=True)]

    truths = results(exact, by_llamafactory(exact, batch)[0].chunk(2))
    theirs = rms(results(rounded, by_llamafactory(rounded, batch)[0].chunk(2)))
    for layout in (padded(batch), shared_prefix(batch)):
        for error, their_error in zip(rms(ours(rounded, layout)), theirs, strict=True):
            assert error < 1.05 * their_error


def test_a_prefix_tree_by_hand():
    """Prompt 5 6, responses 7 8 9 and 7 4: shared 5 6 7, tails 8 9 and 4."""
    layout = shared_prefix(collate([([5, 6], [7, 8, 9], [7, 4])]))
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert layout.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert layout.inputs["attention_mask"].tolist() == [[[[0, 0, 5], [0, 3, 1]]]]
    added = shared_prefix(collate([([5, 6], [7, 8, 9], [7, 4])]), "eager").inputs["attention_mask"]
    assert (added == 0)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    # 7 is scored once and belongs to both; 8 and 4 are both predicted where 7 stands.
    assert list(zip(layout.column.tolist(), layout.target.tolist(), strict=True)) == [(1, 7), (2, 8), (3, 9), (2, 4)]
    assert layout.entry.tolist() == [0, 1, 2, 0, 3]
    assert layout.response.tolist() == [0, 0, 0, 1, 1]
    assert layout.ordinal.tolist() == [0, 1, 2, 0, 1]


def test_identical_answers_keep_a_tail_each():
    layout = shared_prefix(collate([([5], [7, 8], [7, 8])]))
    assert layout.inputs["input_ids"].tolist() == [[5, 7, 8, 8]]


def test_the_head_runs_on_scored_tokens_only():
    model, batch = model_of("Qwen2"), collate(PAIRS)
    response_logps(model, padded(batch))  # once, because the head is tried first
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    response_logps(model, padded(batch))
    response_logps(model, shared_prefix(batch))
    hook.remove()
    # 4 + 3, 1 + 1 and 5 + 5 tokens; of them 2, 0 and 3 are shared.
    assert seen == [(1, 19, 2), (1, 14, 2)]
    assert not model.lm_head._forward_pre_hooks
    assert "forward" not in vars(model.lm_head)


def test_log_probabilities_hold_a_chunk_at_a_time(monkeypatch):
    """Four times as many scored tokens need no more, but for the hidden states and results themselves."""
    vocabulary, width = 1000, 4
    monkeypatch.setattr(logps, "CHUNK", 50 * vocabulary)
    head = torch.nn.Linear(width, vocabulary)

    def score(hidden, target):
        return logps._scores_of(head(hidden), target, ())

    def peak(scored):
        hidden, target = torch.randn(scored, width, requires_grad=True), torch.zeros(scored, dtype=torch.int64)
        return peak_of(lambda: logps._in_chunks(score, hidden, target, vocabulary).sum().backward())[1]

    peak(50)
    tensor = 50 * vocabulary * 4
    assert peak(800) - peak(200) < 0.5 * tensor
    assert 2 * tensor < peak(800) < 4 * tensor


def test_a_model_that_caps_its_logits(monkeypatch):
    monkeypatch.setattr(logps, "CHUNK", 100)
    config = transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    batch = collate(PAIRS)
    assert_like_llamafactory(model, batch, padded(batch), 1e-5)


def test_a_model_that_reads_its_head_in_another_way(monkeypatch):
    model, batch = model_of("Llama, tied head"), collate(PAIRS)
    expected = response_logps(model, padded(batch))
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    actual = response_logps(model, padded(batch))
    torch.testing.assert_close(actual.chosen, expected.chosen, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.rejected, expected.rejected, rtol=1e-12, atol=1e-12)
