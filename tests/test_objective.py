"""What a recipe trains: the sum of losses, and scores of divergences in place of log-ratios."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import HYPER, batches, gradients_of, pairs_of

from llamafactory_ext import get_loss
from llamafactory_ext.losses.divergence import Divergence, alpha_score, forward_kl_score, js_score, squared_score
from llamafactory_ext.losses.lookup import loss_names
from llamafactory_ext.losses.objective import Objective, Part

IN_SCORES = [name for name in loss_names() if get_loss(name).takes_divergence]


def objective(*names, weights=None, divergence=None, **changes):
    parts = [
        Part(get_loss(name), HYPER[name] | changes.get(name, {}), weight)
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
    ]
    return Objective(tuple(parts), 0.5, divergence or Divergence())


# --- sums ------------------------------------------------------------------------------------------------------------


@given(
    batch=batches,
    names=st.lists(st.sampled_from(sorted(HYPER)), min_size=1, max_size=4, unique=True),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_a_mixture_is_the_weighted_sum_of_its_parts_in_values_and_gradients(batch, names, weights):
    pairs, weights = pairs_of(*batch), weights[: len(names)]
    mixture = objective(*names, weights=weights)
    total = mixture.sum_of(mixture.values(pairs))
    alone = [weight * get_loss(name)(pairs, **HYPER[name]) for name, weight in zip(names, weights, strict=True)]
    torch.testing.assert_close(total, sum(alone))
    gradients = [gradients_of(loss, pairs) for loss in alone]
    for side, gradient in enumerate(gradients_of(total, pairs)):
        torch.testing.assert_close(gradient, sum(each[side] for each in gradients))


@pytest.mark.parametrize("name", HYPER)
def test_one_loss_is_itself_bit_for_bit(name):
    pairs = pairs_of([-0.5, 2.0], [1.0, -1.0], dtype=torch.float32)
    alone = objective(name)
    assert torch.equal(alone.sum_of(alone.values(pairs)), get_loss(name)(pairs, **HYPER[name]))


def test_each_loss_has_the_refinement_on_its_own_scale():
    """Delta = beta (D_w' - D_l'): on sums for Sr-DPO, on means of four and two tokens for length-normalized DPO."""
    pairs = dataclasses.replace(pairs_of([0.0], [0.0]), refinement=None)
    augmented = pairs_of([4.0], [-1.0])
    found = objective("sr_dpo", "sigmoid_norm", "hinge").values(pairs, augmented)
    sums, means = 0.4 * 0.5 * (4 + 1), 0.4 * 0.5 * (4 / 4 + 1 / 2)
    assert found["sr_dpo"].item() == pytest.approx(math.log1p(math.exp(sums)))
    assert found["sigmoid_norm"].item() == pytest.approx(math.log1p(math.exp(means)))
    assert found["hinge"].item() == 1.0


def test_metrics_of_all_losses_have_names_of_their_own():
    pairs = pairs_of([-0.5, 2.0], [1.0, -1.0])
    found = objective("minor_dpo", "dpop").measure(pairs)
    assert set(found) == {
        "dpo/coefficient",
        "minor_dpo/rejected_active",
        "dpo/coefficient_dpop",
        "dpop/penalty",
        "dpop/penalty_active",
    }
    assert torch.equal(
        found["dpo/coefficient"], get_loss("minor_dpo").measure(pairs, **HYPER["minor_dpo"])["dpo/coefficient"]
    )


def test_a_mixture_needs_what_its_losses_need():
    assert objective("sft", "sigmoid").needs_reference
    assert not objective("sft", "orpo").needs_reference
    assert objective("sft", "orpo").reports_means
    assert not objective("sft", "sigmoid").reports_means
    assert objective("ipo", "sigmoid").reports_means
    assert objective("hinge", "cringe").contrast.loss.name == "cringe"
    assert objective("hinge", "sr_dpo").refined.loss.name == "sr_dpo"
    assert objective("hinge", "sr_dpo", sr_dpo={"sr_lambda": 0.0}).refined is None


# --- divergences -----------------------------------------------------------------------------------------------------

logratios = st.floats(-7, 7)  # with alpha from -1 to 3, exponents of up to 14


@given(logratios, st.floats(-1, 3).filter(lambda alpha: abs(alpha - 1) > 1e-3))
def test_scores_are_the_derivatives_of_f(logratio, alpha):
    """f(t): -log t; JS: t log t - (t + 1) log((t + 1) / 2); alpha: (t^a - a t) / (a (a - 1)); (log t)^2 / 2."""
    t = torch.tensor(math.exp(logratio), dtype=torch.float64, requires_grad=True)
    d = torch.tensor(logratio, dtype=torch.float64)
    cases = [
        (forward_kl_score(d), -torch.log(t) + t),  # plus t, whose derivative 1 cancels in the margin
        (js_score(d), t * torch.log(t) - (t + 1) * torch.log((t + 1) / 2)),
        (squared_score(d), torch.log(t) ** 2 / 2),
    ]
    if abs(alpha) > 1e-3:
        cases.append((alpha_score(d, alpha), (t**alpha / alpha - t) / (alpha - 1)))
    for score, f in cases:
        (derivative,) = torch.autograd.grad(f, t)
        assert score.item() == pytest.approx(derivative.item(), rel=1e-6, abs=1e-6)


@given(logratios)
def test_alpha_joins_the_others(logratio):
    d = torch.tensor(logratio, dtype=torch.float64)
    assert alpha_score(d, 1.0).item() == logratio
    assert alpha_score(d, 1 + 1e-9).item() == pytest.approx(logratio, rel=1e-6, abs=1e-6)
    assert alpha_score(d, 0.0).item() == pytest.approx(forward_kl_score(d).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", IN_SCORES)
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_losses_compare_scores(name, divergence):
    """As the loss of pairs whose log-ratios are those scores; at the reference, where all scores are 0, as without."""
    changes = {name: {"sr_lambda": 0.0}} if "sr_lambda" in HYPER[name] else {}
    with_scores = objective(name, divergence=Divergence(divergence), **changes)
    plain = objective(name, **changes)
    pairs = pairs_of([0.0, 0.5, -2.0], [0.0, -1.0, 3.0])
    score = {"forward_kl": forward_kl_score, "js": js_score, "alpha": lambda d: alpha_score(d, 0.5)}[divergence]
    chosen, rejected = (score(torch.tensor(d, dtype=torch.float64)).tolist() for d in ([0, 0.5, -2.0], [0, -1.0, 3.0]))
    expected = plain.values(pairs_of(chosen, rejected))[name]
    found = with_scores.values(pairs)[name]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[0], plain.values(pairs)[name][0])


@pytest.mark.parametrize("score", [forward_kl_score, squared_score, lambda d: alpha_score(d, 0.5)])
def test_scores_go_on_as_a_line_where_they_would_explode(score):
    """From e^15 on: no jump in value or slope, and a force where a response is far below its reference."""
    at = {forward_kl_score: -15.0, squared_score: -15.0}.get(score, -30.0)
    d = torch.tensor([at - 1, at - 1e-9, at, at + 1e-9, at - 400], dtype=torch.float64, requires_grad=True)
    values = score(d)
    (slopes,) = torch.autograd.grad(values.sum(), d)
    assert values[1:4].tolist() == pytest.approx([values[2].item()] * 3, rel=1e-6)
    assert slopes.tolist() == pytest.approx([slopes[2].item()] * 5, rel=1e-6)
    assert values[4].item() == pytest.approx((values[2] - 400 * slopes[2]).item())


@pytest.mark.parametrize("name", IN_SCORES)
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
def test_extreme_scores_are_finite(name, divergence, dtype, alpha):
    """The square of a gradient, too, of which its norm is made."""
    ends = [-1e4, -200.0, 0.0, 200.0, 1e4]
    d_w, d_l = [list(column) for column in zip(*[(w, l) for w in ends for l in ends], strict=True)]  # noqa: E741
    pairs = pairs_of(d_w, d_l, dtype=dtype)
    changes = {name: {"sr_lambda": 0.0}} if "sr_lambda" in HYPER[name] else {}
    loss = objective(name, divergence=Divergence(divergence, alpha), **changes).values(pairs)[name]
    values = (loss, *(gradient**2 for gradient in gradients_of(loss, pairs)))
    assert all(torch.isfinite(each).all() for each in values)
