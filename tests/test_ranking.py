"""More than two responses to a prompt: prefix trees, the layout against a row each, what is compared, Plackett-Luce."""

from __future__ import annotations

import itertools
from unittest import mock

import plain_flash
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import plain_loss
from test_layout import model_of

from llamafactory_ext import PairLogps, get_loss
from llamafactory_ext.training import flash
from llamafactory_ext.training.layout import padded, shared_prefix
from llamafactory_ext.training.logps import response_logps
from llamafactory_ext.training.ranking import SCORES, Ranking, between_columns, responses_of
from llamafactory_ext.training.trie import Branch, branches, in_row, pair_tree, paths, places

# --- trees -----------------------------------------------------------------------------------------------------------

sequence = st.lists(st.integers(1, 2), min_size=1, max_size=7)


def as_sequences(texts):
    return [(torch.tensor(text), torch.tensor(text)) for text in texts]


@given(st.lists(sequence, min_size=1, max_size=6))
def test_a_tree_holds_each_prefix_once(texts):
    """Each sequence is read off its path, and no token stands in the row more often than there are prefixes to hold."""
    tree = branches(as_sequences(texts))
    row = [token for branch, text in zip(tree, texts, strict=True) for token in text[branch.shared :]]
    assert [[row[at] for at in places(path)] for path in paths(tree)] == texts
    prefixes = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    # A sequence keeps its last token, and its parent's too.
    assert len(prefixes) <= len(row) <= len(prefixes) + 2 * (len(texts) - 1)


def test_a_tree_by_hand():
    """1 2 3 4; 1 2 5 6, which shares 1 2; 1 2 5 7 8, which shares 1 2 5 with the second; 9, which shares nothing."""
    tree = branches(as_sequences([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7, 8], [9]]))
    assert tree == [Branch(0, 0, 4), Branch(0, 2, 2), Branch(1, 3, 2), Branch(0, 0, 1)]
    assert paths(tree) == [[(0, 4)], [(0, 2), (4, 6)], [(0, 2), (4, 5), (6, 8)], [(8, 9)]]
    assert in_row([tree[:2], tree]) == [*tree[:2], *(each._replace(parent=each.parent + 2) for each in tree)]
    assert pair_tree(2, 3, 1) == branches(as_sequences([[1, 2, 3, 4, 5], [1, 2, 6]]))


def test_labels_part_what_token_ids_share():
    """The same token, scored in one response and not in the other, is not shared."""
    ids = torch.tensor([1, 2, 3, 4])
    tree = branches([(ids, torch.tensor([-100, 2, 3, 4])), (ids, torch.tensor([-100, -100, 3, 4]))])
    assert [branch.shared for branch in tree] == [0, 1]


# --- the layout ------------------------------------------------------------------------------------------------------

token = st.integers(1, 39)
text = st.lists(token, min_size=1, max_size=5)


@st.composite
def answer(draw, stems):
    """Turns of the assistant and, in between, of others; it may begin as other answers do."""
    turns = draw(st.lists(st.tuples(text, st.booleans()), min_size=1, max_size=3))
    ids, labels = list(draw(st.sampled_from(stems))), []
    labels += ids
    for tokens, is_scored in turns:
        ids += tokens
        labels += tokens if is_scored else [-100] * len(tokens)
    return ids, labels


@st.composite
def scores_of(draw, size):
    """From the highest to the lowest, not all the same: such rows are skipped."""
    found = st.lists(st.integers(0, 3), min_size=size, max_size=size).filter(lambda scores: len(set(scores)) > 1)
    return [float(score) for score in sorted(draw(found), reverse=True)]


@st.composite
def group(draw):
    prompt, stem = draw(text), draw(text)
    stems = [[], stem, [*stem, *draw(text)]]
    answers = draw(st.lists(answer(stems), min_size=2, max_size=5))
    rows = [([*prompt, *ids], [-100] * len(prompt) + labels) for ids, labels in answers]
    return {
        "chosen_input_ids": rows[0][0],
        "chosen_labels": rows[0][1],
        "rejected_input_ids": rows[-1][0],
        "rejected_labels": rows[-1][1],
        **between_columns(rows[1:-1]),
        SCORES: draw(scores_of(len(answers))),
    }


def collate(groups, pad_left=False):
    rows = [(list(ids), list(labels)) for group in groups for ids, labels in responses_of(group)]
    length = max(len(ids) for ids, _ in rows)
    columns = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        fill = length - len(ids)
        for name, values, padding in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", labels, -100),
        ):
            columns[name].append([padding] * fill + values if pad_left else values + [padding] * fill)
    return {name: torch.tensor(values) for name, values in columns.items()}


def assert_equal_numbers(model, ours, rows, tolerance):
    one, other = (response_logps(model, layout) for layout in (ours, rows))
    for name in ("responses", "chosen", "rejected", "chosen_logits", "rejected_logits"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)
    assert torch.equal(one.chosen_length, other.chosen_length)
    assert torch.equal(one.rejected_length, other.rejected_length)
    gradients = [
        torch.autograd.grad((each.responses * torch.arange(1, 1 + len(each.responses))).sum(), list(model.parameters()))
        for each in (one, other)
    ]
    for actual, expected in zip(*gradients, strict=True):
        scale = max(1, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-9), ("eager", 1e-5)])  # eager's softmax is float32
@given(groups=st.lists(group(), min_size=1, max_size=3), pad_left=st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_groups_are_scored_as_rows_of_their_own(attention, tolerance, groups, pad_left):
    model, ranking = model_of("Llama, tied head", attention), Ranking.of_rows(groups)
    ours = shared_prefix(collate(groups, pad_left), attention, ranking=ranking)
    assert_equal_numbers(model, ours, padded(collate(groups), ranking), tolerance)


def test_a_group_of_two_is_a_pairs_tree():
    pair = {
        "chosen_input_ids": [1, 2, 3, 4],
        "chosen_labels": [-100, -100, 3, 4],
        "rejected_input_ids": [1, 2, 3, 5],
        "rejected_labels": [-100, -100, 3, 5],
    }
    batch, ranking = collate([pair]), Ranking.of_rows([pair])
    as_pair, as_group = shared_prefix(batch), shared_prefix(batch, ranking=ranking)
    for name in ("row", "column", "target", "entry", "response", "ordinal"):
        assert torch.equal(getattr(as_pair, name), getattr(as_group, name))
    assert ranking == Ranking((2,), ((0, 1),), (1.0,))


@given(groups=st.lists(group(), min_size=1, max_size=3), window=st.sampled_from([None, 3]))
@settings(max_examples=30, deadline=None)
def test_flash_attention_over_any_tree(groups, window):
    """One call of the kernel gives each sequence what causal attention gives it alone."""
    trees = [
        branches([(torch.tensor(ids), torch.tensor(labels)) for ids, labels in responses_of(group)]) for group in groups
    ]
    row = in_row(trees)
    length = sum(branch.tail for branch in row)
    query, key, value = (torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))
    with plain_flash.installed(), mock.patch.object(flash, "_half_precision", return_value=None):
        from llamafactory_ext.training.attention import tree_mask

        kwargs = {"kernel": "flash_attention_2", "sliding_window": window}
        actual = flash.attend(torch.nn.Module(), query, key, value, tree_mask(trees), is_causal=True, **kwargs)[0][0]
    for branch, path in zip(row, paths(row), strict=True):
        at = places(path)
        q, k, v = (x[0, :, at] for x in (query, key, value))
        distance = torch.arange(len(at))[:, None] - torch.arange(len(at))
        hidden = (distance < 0) | (distance >= (window or len(at)))
        weights = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        expected = (weights @ v).transpose(0, 1)[branch.shared :]
        torch.testing.assert_close(actual[at[branch.shared :]], expected, rtol=0, atol=1e-12)


# --- what is compared ------------------------------------------------------------------------------------------------


def row_with(scores):
    sides = {f"{side}_{column}": [1, 2] for side in ("chosen", "rejected") for column in ("input_ids", "labels")}
    return sides | between_columns([([1, 2], [1, 2])] * (len(scores) - 2)) | {SCORES: scores}


def test_each_response_is_compared_with_those_that_score_lower():
    ranking = Ranking.of_rows([row_with([3.0, 1.0, 1.0, 0.5]), row_with([1.0, 0.0])])
    assert ranking.sizes == (4, 2)
    assert ranking.groups == [[0, 1, 2, 3], [4, 5]]
    assert ranking.pairs == ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (4, 5))
    assert ranking.gaps == (2.0, 2.0, 2.5, 0.5, 0.5, 1.0)
    equal, by_gap = (ranking.shares(each, torch.device("cpu")) for each in (False, True))
    torch.testing.assert_close(equal, torch.tensor([0.1] * 5 + [0.5]))
    torch.testing.assert_close(by_gap, torch.tensor([2 / 15, 2 / 15, 2.5 / 15, 0.5 / 15, 0.5 / 15, 0.5]))
    about = ranking.comparison(torch.device("cpu"))
    assert about["winner"].tolist() == [0, 0, 0, 1, 2, 4]
    assert about["group"].tolist() == [0, 0, 0, 0, 0, 1]
    assert ranking.of_pairs(torch.tensor([7.0, 8.0])).tolist() == [7.0] * 5 + [8.0]


def test_the_gap_of_a_pair_beside_a_ranking_is_the_datas():
    pair, several = row_with([1.0, 0.0]) | {"score_gap": 4.5}, row_with([1.0, 0.0, 0.0]) | {"score_gap": 0.5}
    assert Ranking.of_rows([row_with([2.0, 1.0, 0.0]), pair, several]).gaps == (1.0, 2.0, 1.0, 4.5, 0.5, 0.5)


# --- Plackett-Luce ---------------------------------------------------------------------------------------------------


def in_one_batch(logratios, scores):
    """`PairLogps` of the ordered pairs of rows with these scores, with a reference of 0."""
    ranking = Ranking.of_rows([row_with(of_row) for of_row in scores])
    chosen, rejected = ranking.sides(logratios)
    zeros, ones = torch.zeros_like(chosen), torch.ones(len(chosen), dtype=torch.int64)
    about = ranking.comparison(logratios.device)
    return PairLogps(chosen, rejected, zeros, zeros, ones, ones, winner=about["winner"], group=about["group"])


def ranked_pairs(logratios, scores):
    """The same of one row."""
    return in_one_batch(logratios, [scores])


def test_golden_values_of_plackett_luce():
    """Log-ratios ln 4, ln 2, 0 and beta 1: weights 4, 2, 1. The first wins with 4/7, the second then with 2/3.

    So the loss is ln(7/4) + ln(3/2) = ln(21/8).
    """
    pairs = ranked_pairs(torch.tensor([4.0, 2.0, 1.0]).double().log(), [2.0, 1.0, 0.0])
    assert get_loss("pl_dpo")(pairs, beta=1.0).mean().item() == pytest.approx(0.9650808960435872, rel=1e-12)


def test_answers_of_equal_score_are_not_compared():
    """The weights 4 and 2 share the first place: each beats 1 alone, with 4/5 and 2/3."""
    pairs = ranked_pairs(torch.tensor([4.0, 2.0, 1.0]).double().log(), [1.0, 1.0, 0.0])
    expected = torch.tensor([5 / 4, 3 / 2]).double().log().sum()
    torch.testing.assert_close(get_loss("pl_dpo")(pairs, beta=1.0).mean(), expected)


@given(
    logratios=st.lists(st.floats(-50, 50), min_size=2, max_size=6),
    beta=st.sampled_from([0.05, 1.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_plackett_luce_is_the_likelihood_of_the_ranking(logratios, beta):
    values = torch.tensor(logratios, dtype=torch.float64, requires_grad=True)
    scores = [float(score) for score in reversed(range(len(logratios)))]
    loss = get_loss("pl_dpo")(ranked_pairs(values, scores), beta=beta).mean()
    expected = sum(torch.logsumexp(beta * values[k:], 0) - beta * values[k] for k in range(len(values)))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    actual, wanted = (torch.autograd.grad(each, values, retain_graph=True)[0] for each in (loss, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@st.composite
def rankings(draw):
    """The log-ratios and the scores of each row's answers, some of them tied."""
    size = draw(st.integers(2, 5))
    return draw(st.lists(st.floats(-15, 15), min_size=size, max_size=size)), draw(scores_of(size))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@given(rows=st.lists(rankings(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_parity_with_plain_formula_over_rows_with_ties(dtype, tolerance, rows):
    ours, exact = (
        torch.tensor([value for values, _ in rows for value in values], dtype=each, requires_grad=True)
        for each in (dtype, torch.float64)
    )
    actual, expected = (in_one_batch(each, [scores for _, scores in rows]) for each in (ours, exact))
    losses = get_loss("pl_dpo")(actual, beta=0.5), plain_loss("pl_dpo", expected, beta=0.5)
    assert losses[0].dtype == dtype
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad(loss.sum(), to)[0] for loss, to in zip(losses, (ours, exact), strict=True))
    torch.testing.assert_close(*(each.double() for each in gradients), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_of_a_ranking_stay_finite(dtype):
    """Log-ratios of 1e4 nats: each place costs beta times what its answer lacks to the best of those below."""
    for found in itertools.product([-1e4, 0.0, 1e4], repeat=3):
        values = torch.tensor(found, dtype=dtype, requires_grad=True)
        loss = get_loss("pl_dpo")(ranked_pairs(values, [2.0, 1.0, 0.0]), beta=0.5).mean()
        (gradient,) = torch.autograd.grad(loss, values)
        lacking = 0.5 * (max(found) - found[0] + max(found[1:]) - found[1])
        assert loss.item() == pytest.approx(lacking, rel=1e-5, abs=2.0)  # ties cost log 2 or log 3
        assert gradient.isfinite().all()
        assert gradient.sum().item() == pytest.approx(0, abs=1e-6)


def test_the_likelihoods_of_all_rankings_add_up_to_one():
    values = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    total = sum(
        get_loss("pl_dpo")(ranked_pairs(values[list(order)], [3.0, 2.0, 1.0, 0.0]), beta=0.7).mean().neg().exp()
        for order in itertools.permutations(range(4))
    )
    assert total.item() == pytest.approx(1, rel=1e-12)


def test_rows_of_a_batch_do_not_touch_one_another():
    rows = [([3.0, 1.0, 0.0], [2.0, 1.0, 0.0]), ([0.5, 0.2], [1.0, 0.0])]
    alone = [get_loss("pl_dpo")(ranked_pairs(torch.tensor(values), scores), beta=0.5) for values, scores in rows]
    pairs = in_one_batch(torch.tensor([3.0, 1.0, 0.0, 0.5, 0.2]), [scores for _, scores in rows])
    torch.testing.assert_close(get_loss("pl_dpo")(pairs, beta=0.5), torch.cat(alone))
