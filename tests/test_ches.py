"""CHES and what is measured beside it: by hand, against the paper's double sum, and on models in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import collate, model_of, pair

from llamafactory_ext.errors import UserError
from llamafactory_ext.scoring.ches import NO_TOKEN, ches, edit_distance, measures
from llamafactory_ext.training.layout import padded, shared_prefix


def test_golden_by_hand():
    """Two pairs; the states of a pair's two responses are not in one piece, as in a layout.

    Pair 0: S_w = (1, 0) + (1, 2) = (2, 2); S_l = (0, 1) + (3, 1) = (3, 2).
        <S_w, S_l> - <S_w, S_w> = 10 - 8 = 2; by means (1, 1) and (1.5, 1): 2.5 - 2 = 0.5.
    Pair 1: S_w = (1, 1) + (1, 1) = (2, 2); S_l = (3, 1).
        8 - 8 = 0; by means (1, 1) and (3, 1): 4 - 2 = 2.
    """
    hidden = torch.tensor([[1, 0], [1, 2], [1, 1], [1, 1], [0, 1], [3, 1], [3, 1]], dtype=torch.bfloat16)
    plain, normalized = ches(hidden, torch.tensor([0, 0, 1, 1, 2, 2, 3]), pairs=2)
    assert plain.tolist() == [2.0, 0.0]
    assert normalized.tolist() == [0.5, 2.0]
    assert plain.dtype == torch.float64


states = st.lists(st.tuples(*[st.floats(-9, 9, width=32)] * 3), min_size=1, max_size=5)


@given(states, states)
def test_the_papers_double_sum(chosen, rejected):
    """Definition 2: the sum over all k and k' of <h_k, h'_k'>, less the square of the norm of the sum of h_k."""

    def inner(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def double_sum(a, b):
        return sum(inner(*each) for each in itertools.product(a, b))

    hidden = torch.tensor([*chosen, *rejected], dtype=torch.float64)
    response = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    plain, normalized = ches(hidden, response, pairs=1)
    mixed, own = double_sum(chosen, rejected), double_sum(chosen, chosen)
    assert plain.item() == pytest.approx(mixed - own, abs=1e-9)
    lengths = len(chosen), len(rejected)
    assert normalized.item() == pytest.approx(mixed / (lengths[0] * lengths[1]) - own / lengths[0] ** 2, abs=1e-9)


@given(states)
def test_identical_responses_have_no_ches(states_of_both):
    hidden = torch.tensor([*states_of_both] * 2)
    response = torch.tensor([0] * len(states_of_both) + [1] * len(states_of_both))
    assert [value.item() for value in ches(hidden, response, pairs=1)] == [0.0, 0.0]


def test_responses_repeated_token_by_token_have_the_same_normalized_ches():
    """What length normalization is for: CHES grows with the square of the length."""
    hidden, response = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1])
    once, twice = ches(hidden, response, 1), ches(hidden.repeat(2, 1), response.repeat(2), 1)
    assert twice[1].item() == pytest.approx(once[1].item())
    assert twice[0].item() == pytest.approx(4 * once[0].item())


def test_edit_distances_by_hand():
    x = NO_TOKEN
    chosen = [[1, 2, 3, 4], [1, 2, 3, x], [5, 6, x, x], [1, x, x, x], [7, 7, x, x]]
    rejected = [[1, 9, 3, 4], [1, 3, x, x], [7, 8, 9, 1], [1, x, x, x], [x, x, x, x]]
    found = edit_distance(torch.tensor(chosen + rejected))
    assert found.tolist() == pytest.approx([1 / 4, 1 / 3, 1.0, 0.0, 1.0])


def by_itself(model, prompt, response):
    """Hidden states and log-probabilities of a response's tokens, from the sequence alone, by transformers."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    logps = output.logits[0, :-1].log_softmax(dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
    return output.hidden_states[-1][0, len(prompt) - 1 : -1], logps[len(prompt) - 1 :]


def expected(model, prompts, chosen, rejected):
    prompts = prompts if isinstance(prompts, tuple) else (prompts, prompts)
    (h_w, logps_w), (h_l, logps_l) = (by_itself(model, *each) for each in zip(prompts, (chosen, rejected), strict=True))
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    return {
        "ches": (h_w.sum(0) @ h_l.sum(0) - h_w.sum(0) @ h_w.sum(0)).item(),
        "normalized_ches": (h_w.mean(0) @ h_l.mean(0) - h_w.mean(0) @ h_w.mean(0)).item(),
        "chosen_logp": logps_w.sum().item(),
        "rejected_logp": logps_l.sum().item(),
        "chosen_tokens": len(chosen),
        "rejected_tokens": len(rejected),
        "chosen_tail_logp": logps_w[same:].sum().item(),
        "rejected_tail_logp": logps_l[same:].sum().item(),
        "chosen_tail_tokens": len(chosen) - same,
        "rejected_tail_tokens": len(rejected) - same,
    }


@settings(max_examples=15, deadline=None)
@given(
    pairs=st.lists(pair(), min_size=1, max_size=4), family=st.sampled_from(["Llama, tied head", "Gemma", "GPT-NeoX"])
)
def test_measures_are_those_of_each_sequence_alone(pairs, family):
    """In both layouts, of models with and without a tied head, and one that scales its embeddings."""
    model, batch = model_of(family), collate(pairs)
    wanted = [expected(model, *each) for each in pairs]
    for layout in (padded(batch), shared_prefix(batch)):
        with torch.no_grad():
            found = measures(model, layout)
        for name in wanted[0]:
            values = [each[name] for each in wanted]
            assert found[name].tolist() == pytest.approx(values, rel=1e-6, abs=1e-6), name


def test_the_head_is_left_as_it_was():
    model = copy.deepcopy(model_of("Qwen2"))
    head = model.get_output_embeddings()
    before = dict(vars(head)), list(head._forward_pre_hooks)
    with torch.no_grad():
        measures(model, padded(collate([([1, 2], [3], [4])])))
    assert (dict(vars(head)), list(head._forward_pre_hooks)) == before


def test_a_model_without_a_head_is_refused():
    model = copy.deepcopy(model_of("Qwen2"))
    model.get_output_embeddings = lambda: None
    with torch.no_grad(), pytest.raises(UserError, match="no language-model head of its own"):
        measures(model, padded(collate([([1, 2], [3], [4])])))
