"""The losses: golden rows derived by hand, parity with plain formulas, identities, extremes."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain import plain_loss

from llamafactory_ext import PairLogps, get_loss
from llamafactory_ext.losses.unpaired import bco

HYPER = {
    "sigmoid": {"beta": 0.5, "label_smoothing": 0.2, "sr_lambda": 0.4},
    "hinge": {"beta": 0.5},
    "ipo": {"beta": 0.5, "length_normalize": True},
    "kto_pair": {"beta": 0.5},
    "minor_dpo": {"beta": 0.5, "sr_lambda": 0.4},
    "dpop": {"beta": 0.5, "dpop_lambda": 5.0, "sr_lambda": 0.4},
    "sr_dpo": {"beta": 0.5, "sr_lambda": 0.4},
    "sr_ipo": {"beta": 0.5, "sr_lambda": 0.4, "length_normalize": False},
    "robust": {"beta": 0.5, "label_smoothing": 0.2, "sr_lambda": 0.4},
    "sigmoid_norm": {"beta": 0.5, "sr_lambda": 0.4},
    "odpo": {"beta": 0.5, "odpo_alpha": 0.7, "sr_lambda": 0.4},
    "squared_po": {"beta": 0.5},
    "minor_sft": {"beta": 0.5},
    "discopop": {"beta": 0.5, "discopop_tau": 0.5, "sr_lambda": 0.4},
    "exo_pair": {"beta": 0.5, "label_smoothing": 0.01},
    "pl_dpo": {"beta": 0.5},
    "aot": {"beta": 0.5, "label_smoothing": 0.2},
    "aot_unpaired": {"beta": 0.5, "label_smoothing": 0.2},
    "nca_pair": {"beta": 0.5},
    "bco_pair": {"beta": 0.5},
    "sppo_hard": {"beta": 0.5},
    "apo_zero": {"beta": 0.5},
    "apo_down": {"beta": 0.5},
    "orpo": {"beta": 0.5},
    "sft": {},
    "simpo": {"beta": 0.5, "simpo_gamma": 0.3},
    "rrhf": {"rrhf_weight": 3.0},
    "cringe": {"cringe_alpha": 0.3, "cringe_bias": 2.0, "cringe_tau": 4.0, "cringe_top_k": 5},
}
WITH_REFERENCE = [name for name in HYPER if get_loss(name).needs_reference]
REFINED = [name for name in HYPER if "sr_lambda" in HYPER[name]]


def pairs_of(
    d_w: list[float], d_l: list[float], n_w: int = 4, n_l: int = 2, dtype: torch.dtype = torch.float64
) -> PairLogps:
    """Pairs with the given logratios over a reference of -20 (chosen) and -30 (rejected) nats.

    Delta = D_w / 2 + 1, a gap of scores of e^0.5, and a contrast of 6 nats.
    """
    reference_w = torch.full((len(d_w),), -20.0, dtype=dtype)
    reference_l = torch.full((len(d_l),), -30.0, dtype=dtype)
    return PairLogps(
        (reference_w + torch.tensor(d_w, dtype=dtype)).requires_grad_(),
        (reference_l + torch.tensor(d_l, dtype=dtype)).requires_grad_(),
        reference_w,
        reference_l,
        torch.full((len(d_w),), n_w),
        torch.full((len(d_l),), n_l),
        torch.tensor(d_w, dtype=dtype) / 2 + 1,
        torch.full((len(d_w),), math.exp(0.5), dtype=dtype),
        torch.full((len(d_w),), 6.0, dtype=dtype),
    )


def gradients_of(loss: torch.Tensor, pairs: PairLogps) -> tuple[torch.Tensor, ...]:
    """Of the sum, with respect to the chosen and the rejected log-probabilities; 0 where a loss does not read them."""
    sides = (pairs.policy_chosen, pairs.policy_rejected)
    return torch.autograd.grad(loss.sum(), sides, allow_unused=True, materialize_grads=True)


def softplus(x: float) -> float:
    """log(1 + e^x) = -log sigma(-x), for the golden rows."""
    return math.log1p(math.exp(x))


# Each row: loss, hyper-parameters, D_w, D_l, the loss of the pair, and how it is reached.
GOLDEN = [
    ("sigmoid", {"beta": 0.5}, 2.0, -1.0, softplus(-1.5)),  # argument 0.5 * 3
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.1}, 2.0, -1.0, 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)),
    ("sigmoid", {"beta": 0.1}, 0.0, 0.0, math.log(2)),
    ("hinge", {"beta": 0.5}, 2.0, 1.0, 0.5),  # 1 - 0.5 * 1
    ("hinge", {"beta": 0.5}, 2.0, -1.0, 0.0),  # 1 - 0.5 * 3 < 0
    ("ipo", {"beta": 0.5}, 2.0, -1.0, 0.0),  # means 2/4 and -1/2: margin 1 = 1 / (2 * 0.5)
    ("ipo", {"beta": 0.5, "length_normalize": False}, 2.0, -1.0, 4.0),  # (3 - 1)^2
    # One pair, so KL_w = relu(2) = 2 and KL_l = relu(-1) = 0: the halves are 1 - sigma(1) and 1 - sigma(1.5).
    ("kto_pair", {"beta": 0.5}, 2.0, -1.0, (1 / (1 + math.e) + 1 / (1 + math.exp(1.5))) / 2),
    ("minor_dpo", {"beta": 0.5}, 2.0, -1.0, softplus(-1.0)),  # the rejected term is off: 0.5 * 2
    ("minor_dpo", {"beta": 0.5}, 2.0, 1.0, softplus(-0.5)),  # on: 0.5 * (2 - 1)
    ("minor_dpo", {"beta": 0.5}, -2.0, 0.0, softplus(1.0)),  # a tie is off
    ("dpop", {"beta": 0.5, "dpop_lambda": 5.0}, 2.0, -1.0, softplus(-1.5)),  # no penalty above the reference
    ("dpop", {"beta": 0.5, "dpop_lambda": 5.0}, -0.4, -1.0, softplus(0.7)),  # 0.5 * (-0.4 + 1 - 5 * 0.4) = -0.7
    ("dpop", {"beta": 0.1}, -0.4, -1.0, softplus(1.94)),  # lambda 50: 0.1 * (0.6 - 20) = -1.94
    # Delta = 2 / 2 + 1 = 2
    ("sr_dpo", {"beta": 0.5}, 2.0, -1.0, softplus(-0.9)),  # lambda 0.3: 1.5 - 0.3 * 2
    ("sr_dpo", {"beta": 0.5, "sr_lambda": 1.0}, 2.0, -1.0, softplus(0.5)),  # 1.5 - 2
    ("sr_ipo", {"beta": 0.5, "sr_lambda": 0.5}, 2.0, -1.0, 1.0),  # (3 - 0.5 * 2 - 1)^2
    ("sr_ipo", {"beta": 0.5, "sr_lambda": 0.5, "length_normalize": True}, 2.0, -1.0, 1.0),  # means: (1 - 1 - 1)^2
    ("minor_dpo", {"beta": 0.5, "sr_lambda": 0.5}, 2.0, -1.0, softplus(0.0)),  # 1 - 0.5 * 2
    ("dpop", {"beta": 0.5, "dpop_lambda": 5.0, "sr_lambda": 0.5}, 2.0, -1.0, softplus(-0.5)),  # 1.5 - 1
    ("robust", {"beta": 0.5, "label_smoothing": 0.1}, 2.0, -1.0, (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8),
    ("robust", {"beta": 0.5}, 2.0, -1.0, softplus(-1.5)),  # labels that are certain: DPO
    # rho = 1.5 and tau = 0.5: m = sigma(3), so (1 - m) = 1 / (1 + e^3)
    (
        "discopop",
        {"beta": 0.5, "discopop_tau": 0.5},
        2.0,
        -1.0,
        softplus(-1.5) / (1 + math.exp(3)) + math.exp(-1.5) / (1 + math.exp(-3)),
    ),
    ("discopop", {"beta": 0.1}, -1.0, -1.0, (math.log(2) + 1) / 2),  # without a margin, half of each
    ("discopop", {"beta": 0.5}, -1.0, 2.0, softplus(1.5)),  # tau 0.05: m = sigma(-30), and e^(1.5 - 30) is 0
    ("sigmoid_norm", {"beta": 0.5}, 2.0, -1.0, softplus(-0.5)),  # means 2/4 and -1/2: 0.5 * 1
    # q_w = sigma(0.5 * 3) against p_w = 0.9; without a margin, both are 1/2 against 0.9 and 0.1
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1}, 0.0, 0.0, -math.log(2) - (math.log(0.9) + math.log(0.1)) / 2),
    (
        "exo_pair",
        {"beta": 0.5, "label_smoothing": 0.1},
        2.0,
        -1.0,
        (-softplus(-1.5) - math.log(0.9)) / (1 + math.exp(-1.5))
        + (-softplus(1.5) - math.log(0.1)) / (1 + math.exp(1.5)),
    ),
    ("pl_dpo", {"beta": 0.5}, 2.0, -1.0, softplus(-1.5)),  # of two responses: DPO
    ("aot", {"beta": 0.5}, 2.0, -1.0, softplus(-1.5)),  # of one pair: DPO
    ("aot_unpaired", {"beta": 0.5}, 2.0, -1.0, softplus(-1.5)),
    ("nca_pair", {"beta": 0.5}, 2.0, -1.0, softplus(-1.0) + (softplus(1.0) + softplus(-0.5)) / 2),
    ("bco_pair", {"beta": 0.5}, 2.0, -1.0, softplus(-1.0) + softplus(-0.5)),
    ("sppo_hard", {"beta": 0.5}, 2.0, -1.0, 1.0),  # the targets are 1 and -1
    ("apo_zero", {"beta": 0.5}, 2.0, -1.0, 1 / (1 + math.e) + 1 / (1 + math.exp(0.5))),
    ("apo_down", {"beta": 0.5}, 2.0, -1.0, 1 / (1 + math.exp(-1.0)) + 1 / (1 + math.exp(1.5))),
    ("sigmoid", {"beta": 0.5, "sr_lambda": 0.3}, 2.0, -1.0, softplus(-0.9)),  # Sr-DPO
    # clean -0.9, smoothed
    (
        "robust",
        {"beta": 0.5, "label_smoothing": 0.1, "sr_lambda": 0.3},
        2.0,
        -1.0,
        (0.9 * softplus(-0.9) - 0.1 * softplus(0.9)) / 0.8,
    ),
    ("sigmoid_norm", {"beta": 0.5, "sr_lambda": 0.1}, 2.0, -1.0, softplus(-0.3)),  # 0.5 * 1 - 0.1 * 2
    ("odpo", {"beta": 0.5}, 2.0, -1.0, softplus(-1.0)),  # 1.5 - log e^0.5
    ("odpo", {"beta": 0.5, "odpo_alpha": 2.0, "sr_lambda": 0.5}, 2.0, -1.0, softplus(0.5)),  # 1.5 - 2 * 0.5 - 0.5 * 2
    # scores 2 e^-2 and -e
    ("squared_po", {"beta": 0.5}, 2.0, -1.0, softplus(-0.5 * (2 * math.exp(-2) + math.e))),
    ("squared_po", {"beta": 0.5}, 0.0, 0.0, math.log(2)),
    ("minor_sft", {"beta": 0.5}, 2.0, -1.0, softplus(-1.0)),  # 2 / (0.5 * 4) = 1
    ("rrhf", {}, 2.0, -1.0, 18.0),  # means -4.5 and -15.5, in order
    ("rrhf", {"rrhf_weight": 2.0}, 2.0, 27.0, 18.0 + 2 * 3.0),  # means -4.5 and -1.5
    # M = -18 + 31 = 13; sigma((13 - 13) / 2) (18 + 0.5 * 6)
    ("cringe", {"cringe_alpha": 0.5, "cringe_bias": 13.0, "cringe_tau": 2.0}, 2.0, -1.0, 10.5),
    ("sft", {}, 2.0, -1.0, 4.5),  # 18 nats over four tokens
    # means of the policy: (-20 + 2) / 4 = -4.5 and (-30 - 1) / 2 = -15.5; 0.5 * 11 - 0.3
    ("simpo", {"beta": 0.5, "simpo_gamma": 0.3}, 2.0, -1.0, softplus(-5.2)),
    # log odds(l) = l - log(1 - e^l)
    (
        "orpo",
        {"beta": 0.5},
        2.0,
        -1.0,
        4.5 + 0.5 * softplus(-(11 - math.log1p(-math.exp(-4.5)) + math.log1p(-math.exp(-15.5)))),
    ),
]


@pytest.mark.parametrize(("name", "hyper", "d_w", "d_l", "expected"), GOLDEN)
def test_golden_row(name, hyper, d_w, d_l, expected):
    loss = get_loss(name)(pairs_of([d_w], [d_l]), **hyper)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_golden_bco():
    # -log sigma(0.5 * 2 - 0.25) - log sigma(-(0.5 * -1 - 0.25))
    loss = bco(pairs_of([2.0], [-1.0]), beta=0.5, baseline=0.25)
    assert loss.item() == pytest.approx(2 * softplus(-0.75), abs=1e-12)


def test_golden_orders():
    """Of two pairs: policy's margins 13 and 9, reference's 10 and 10, the log-ratios 2, 0 and -1, 1."""
    pairs = pairs_of([2.0, 0.0], [-1.0, 1.0])
    assert get_loss("aot")(pairs, beta=0.5).tolist() == pytest.approx([softplus(-1.5), softplus(0.5)])
    # 2 beside 1, and 0 beside -1
    assert get_loss("aot_unpaired")(pairs, beta=0.5).tolist() == pytest.approx([softplus(-0.5), softplus(-0.5)])


def test_golden_coefficients():
    """arXiv 2408.09834, Figure 1: DPO's coefficient grows as D_l does, MinorDPO's is flat below the reference."""
    pairs = pairs_of([0.0, 0.0, 0.0], [-4.0, 0.0, 4.0])
    dpo, minor = (get_loss(name).measure(pairs, beta=0.5)["dpo/coefficient"] for name in ("sigmoid", "minor_dpo"))
    assert dpo.tolist() == pytest.approx([0.5 / (1 + math.exp(2)), 0.25, 0.5 / (1 + math.exp(-2))])
    assert minor.tolist() == pytest.approx([0.25, 0.25, 0.5 / (1 + math.exp(-2))])


# --- responses that are certain, or empty ----------------------------------------------------------------------------


@pytest.mark.parametrize(("l_w", "l_l"), [(-1e-8, -1.0), (-1.0, -1e-8), (-1e-8, -1e-8), (-3e-8, -2.0), (-1e-30, -1.0)])
def test_orpo_of_answers_that_are_all_but_certain(l_w, l_l):
    """d/dl of log odds(l) = l - log(1 - e^l) is 1 / (1 - e^l)."""
    total = [torch.tensor([mean], requires_grad=True) for mean in (l_w, l_l)]  # float32, one token each
    pairs = PairLogps(*total, None, None, torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    loss = get_loss("orpo")(pairs, beta=0.5)
    loss.sum().backward()
    odds = [mean - math.log(-math.expm1(mean)) for mean in (l_w, l_l)]
    z = odds[0] - odds[1]
    assert loss.item() == pytest.approx(-l_w + 0.5 * (max(-z, 0) + math.log1p(math.exp(-abs(z)))), rel=1e-5)
    pull = 0.5 / (1 + math.exp(z)) if z < 700 else 0.0
    expected = [-1 + pull / math.expm1(l_w), -pull / math.expm1(l_l)]
    assert [each.grad.item() for each in total] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", HYPER)
@pytest.mark.parametrize("empty", ["chosen", "rejected", "both"])
def test_an_empty_answer_is_a_number(name, empty):
    """Its sum is 0 under every model, and so is its mean: no token, no gradient."""
    values, lengths = [torch.tensor([-9.0]), torch.tensor([-7.0])], [torch.tensor([3]), torch.tensor([2])]
    for side, which in enumerate(("chosen", "rejected")):
        if empty in (which, "both"):
            values[side], lengths[side] = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    policy = [(value + 0.0).requires_grad_() for value in values]
    pairs = PairLogps(*policy, *values, *lengths, *torch.tensor([[0.5], [2.0], [1.0]]))
    loss = get_loss(name)(pairs, **HYPER[name])
    loss.sum().backward()
    found = [loss, *(each.grad for each in policy), *get_loss(name).measure(pairs, **HYPER[name]).values()]
    assert all(torch.isfinite(each).all() for each in found if each is not None)
    assert pairs.per_token().policy_chosen.isfinite().all()


# --- parity with plain float64 formulas, values and gradients --------------------------------------------------------

logratio = st.floats(-15, 15).filter(lambda value: abs(value) > 0.01)  # ties have tests of their own
batches = st.integers(1, 5).flatmap(
    lambda size: st.tuples(*(st.lists(logratio, min_size=size, max_size=size) for _ in range(2)))
)


@pytest.mark.parametrize("name", HYPER)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@given(batch=batches, lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=30, deadline=None)
def test_parity_with_plain_formula(name, dtype, tolerance, batch, lengths):
    # A tie of kto_pair's: the mean of a side at 0.
    assume(name != "kto_pair" or all(abs(sum(side)) > 0.01 * len(side) for side in batch))
    if name == "squared_po":  # the plain formula overflows: e^15 nats
        batch = [[value / 5 for value in side] for side in batch]
    ours = pairs_of(*batch, *lengths, dtype=dtype)
    exact = PairLogps(
        *(t.detach().double().requires_grad_() for t in (ours.policy_chosen, ours.policy_rejected)),
        ours.reference_chosen.double(),
        ours.reference_rejected.double(),
        ours.chosen_length,
        ours.rejected_length,
        ours.refinement.double(),
        ours.score_gap.double(),
        ours.contrast.double(),
    )
    actual = get_loss(name)(ours, **HYPER[name])
    expected = plain_loss(name, exact, **HYPER[name])
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)

    gradients = gradients_of(actual, ours)
    exact_gradients = gradients_of(expected, exact)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=tolerance)


@given(
    chosen=st.lists(st.floats(-30, -0.015625, width=32), min_size=1, max_size=6),
    rejected=st.floats(-30, -0.015625, width=32),
    length=st.integers(1, 50),
)
@settings(max_examples=50, deadline=None)
def test_reference_free_losses_are_those_of_llamafactory(chosen, rejected, length):
    """SimPO's bit for bit, ORPO's compared in float64: in float32, LLaMA-Factory's log1p(-e^l) loses digits."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    stock = SimpleNamespace(beta=0.3, simpo_gamma=0.7)
    w, l = torch.tensor(chosen), torch.full((len(chosen),), rejected)  # noqa: E741
    n = torch.full((len(chosen),), length)
    pairs = PairLogps(w, l, None, None, n, n)
    exact = CustomDPOTrainer.odds_ratio_loss(stock, (w / n).double(), (l / n).double())
    torch.testing.assert_close(get_loss("orpo")(pairs, beta=0.3).double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        get_loss("simpo")(pairs, beta=0.3, simpo_gamma=0.7), CustomDPOTrainer.simpo_loss(stock, w / n, l / n)
    )


# --- identities ------------------------------------------------------------------------------------------------------


@given(batch=batches, beta=st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_dpop_without_lambda_is_sigmoid(batch, beta):
    pairs = pairs_of(*batch, dtype=torch.float32)
    assert torch.equal(get_loss("dpop")(pairs, beta=beta, dpop_lambda=0.0), get_loss("sigmoid")(pairs, beta=beta))


@given(batch=batches, beta=st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_minor_dpo_is_sigmoid_above_the_reference_and_blind_below(batch, beta):
    d_w, d_l = batch
    above = pairs_of(d_w, [abs(d) for d in d_l], dtype=torch.float32)
    assert torch.equal(get_loss("minor_dpo")(above, beta=beta), get_loss("sigmoid")(above, beta=beta))

    below = pairs_of(d_w, [-abs(d) for d in d_l], dtype=torch.float32)
    far_below = pairs_of(d_w, [-abs(d) - 5 for d in d_l], dtype=torch.float32)
    assert torch.equal(get_loss("minor_dpo")(below, beta=beta), get_loss("minor_dpo")(far_below, beta=beta))


@pytest.mark.parametrize(
    ("name", "base", "hyper"),
    [
        ("sr_dpo", "sigmoid", {}),
        ("sr_ipo", "ipo", {"length_normalize": False}),
        ("sr_ipo", "ipo", {"length_normalize": True}),
        ("sigmoid", "sigmoid", {"label_smoothing": 0.1}),
        ("robust", "robust", {"label_smoothing": 0.1}),
        ("sigmoid_norm", "sigmoid_norm", {}),
        ("odpo", "odpo", {}),
        ("minor_dpo", "minor_dpo", {}),
        ("dpop", "dpop", {"dpop_lambda": 5.0}),
    ],
)
@given(batch=batches, beta=st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_without_lambda_a_refined_loss_is_its_base(name, base, hyper, batch, beta):
    """Bit for bit, gradients too, and without a refinement to be had."""
    pairs = pairs_of(*batch, dtype=torch.float32)
    alone = dataclasses.replace(pairs, refinement=None)
    refined, plain = get_loss(name)(alone, beta=beta, sr_lambda=0.0, **hyper), get_loss(base)(alone, beta=beta, **hyper)
    assert torch.equal(refined, plain)
    sides = [pairs.policy_chosen, pairs.policy_rejected]
    for ours, theirs in zip(*(torch.autograd.grad(loss.sum(), sides) for loss in (refined, plain)), strict=True):
        assert torch.equal(ours, theirs)


# What each loss does to the two responses at its start: the policy at the reference.
PUSHES = dict.fromkeys(HYPER, ("up", "down")) | {
    "minor_dpo": ("up", "not"),  # a tie is off
    "minor_sft": ("up", "not"),
    "sft": ("up", "not"),
    "apo_down": ("not", "down"),  # of the chosen response, both terms are as strong there
    "discopop": ("down", "up"),  # a valley below 0 comes first
}


@pytest.mark.parametrize("name", HYPER)
def test_direction_of_the_first_step(name):
    hyper = HYPER[name] | ({"sr_lambda": 0.0} if "sr_lambda" in HYPER[name] else {})
    hyper |= {"discopop_tau": 0.05} if name == "discopop" else {}
    pairs = pairs_of([0.0], [0.0], n_w=8, n_l=4)  # means of -2.5 and -7.5
    if name == "rrhf":  # which acts where the rejected response is the likelier one
        pairs = pairs_of([0.0], [29.0], n_w=8, n_l=4)
    words = [
        "up" if gradient < 0 else "down" if gradient > 0 else "not"
        for gradient in gradients_of(get_loss(name)(pairs, **hyper), pairs)
    ]
    assert tuple(words) == PUSHES[name]


OF_MARGINS = ["sigmoid", "robust", "discopop", "odpo", "hinge", "sr_dpo", "sr_ipo", "exo_pair", "pl_dpo"]


@pytest.mark.parametrize("name", OF_MARGINS)
@given(batch=batches, shift=st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_losses_of_the_margin_do_not_see_both_log_ratios_move(name, batch, shift):
    d_w, d_l = batch
    moved = pairs_of([d + shift for d in d_w], [d + shift for d in d_l])
    moved = dataclasses.replace(moved, refinement=pairs_of(*batch).refinement)
    torch.testing.assert_close(
        get_loss(name)(moved, **HYPER[name]), get_loss(name)(pairs_of(*batch), **HYPER[name]), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("name", REFINED)
def test_no_gradient_flows_through_the_refinement(name):
    """A refinement that hangs on the policy gives the gradients of the same refinement as a constant."""
    pairs = pairs_of([-0.5, 2.0], [1.0, -1.0])
    sides = [pairs.policy_chosen, pairs.policy_rejected]
    hanging = dataclasses.replace(pairs, refinement=0.5 * (pairs.policy_chosen * 2 - pairs.policy_rejected))
    constant = dataclasses.replace(pairs, refinement=torch.tensor(hanging.refinement.tolist(), dtype=torch.float64))
    for ours, theirs in zip(
        *(torch.autograd.grad(get_loss(name)(p, **HYPER[name]).sum(), sides) for p in (hanging, constant)), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.abs().max() > 0


@pytest.mark.parametrize("name", REFINED)
def test_missing_refinement_is_named(name):
    pairs = dataclasses.replace(pairs_of([1.0], [0.5]), refinement=None)
    with pytest.raises(ValueError, match="carry no refinement"):
        get_loss(name)(pairs, **HYPER[name])


@pytest.mark.parametrize(("name", "field"), [("odpo", "score_gap"), ("cringe", "contrast")])
def test_missing_numbers_are_named(name, field):
    pairs = dataclasses.replace(pairs_of([1.0], [0.5]), **{field: None})
    with pytest.raises(ValueError, match=f"set `{field}`"):
        get_loss(name)(pairs, **HYPER[name])


def test_odpo_of_a_gap_of_1_is_dpo():
    pairs = dataclasses.replace(pairs_of([-0.5, 2.0], [1.0, -1.0]), score_gap=torch.ones(2, dtype=torch.float64))
    assert torch.equal(get_loss("odpo")(pairs, beta=0.5), get_loss("sigmoid")(pairs, beta=0.5))


def test_minor_sft_starts_as_sft_and_fades_above_the_reference():
    """arXiv 2408.10642: the gradient is -(2/n) sigma(-beta D_w), and SFT's, -1/n, at the reference."""
    pairs = pairs_of([0.0, 4.0, -4.0], [0.0, 0.0, 0.0])
    chosen, rejected = gradients_of(get_loss("minor_sft")(pairs, beta=0.5), pairs)
    assert chosen.tolist() == pytest.approx([-0.25, -0.5 / (1 + math.exp(2)), -0.5 / (1 + math.exp(-2))])
    assert rejected.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("d_l", [-7.0, -1e-6, 0.0])
def test_minor_dpo_sends_no_gradient_to_a_rejected_answer_at_or_below_the_reference(d_l):
    pairs = pairs_of([1.0], [d_l])
    chosen, rejected = torch.autograd.grad(
        get_loss("minor_dpo")(pairs, beta=0.5).sum(), [pairs.policy_chosen, pairs.policy_rejected]
    )
    assert rejected.item() == 0.0
    assert chosen.item() == pytest.approx(-0.5 / (1 + math.exp(0.5)))  # -beta sigma(-beta D_w)


def test_dpop_multiplies_the_chosen_gradient_below_the_reference():
    for d_w, factor in [(-0.5, 1 + 5), (0.0, 1), (0.5, 1)]:
        pairs = pairs_of([d_w], [0.0])
        hyper = {"beta": 0.5, "dpop_lambda": 5.0}
        chosen, rejected = torch.autograd.grad(
            get_loss("dpop")(pairs, **hyper).sum(), [pairs.policy_chosen, pairs.policy_rejected]
        )
        assert (chosen / rejected).item() == pytest.approx(-factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in HYPER if name != "orpo"])
def test_extremes_stay_finite(name, dtype):
    ends = [-1e4, 0.0, 1e4]
    d_w, d_l = [list(column) for column in zip(*[(w, l) for w in ends for l in ends], strict=True)]  # noqa: E741
    pairs = pairs_of(d_w, d_l, dtype=dtype)
    loss = get_loss(name)(pairs, **HYPER[name])
    assert all(torch.isfinite(values).all() for values in (loss, *gradients_of(loss, pairs)))


@pytest.mark.parametrize("tau", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discopop_where_its_exponential_alone_is_infinite(dtype, tau):
    """At rho = -1e4 and 1e4: DPO's loss there, as m exp(-rho) is 0, but 1 with tau = 1; and 0."""
    pairs = pairs_of([-1e4, 1e4], [0.0, 0.0], dtype=dtype)
    loss = get_loss("discopop")(pairs, beta=1.0, discopop_tau=tau)
    assert loss.tolist() == pytest.approx([1e4 + (tau == 1), 0.0])
    assert gradients_of(loss, pairs)[0].tolist() == pytest.approx([-1.0, 0.0])


# --- what the callables promise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYPER)
def test_unknown_hyperparameter_is_a_type_error(name):
    with pytest.raises(TypeError):
        get_loss(name)(pairs_of([1.0], [0.0]), gamma=1.0, **HYPER[name])


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_missing_reference_is_named(name):
    pairs = PairLogps(*(torch.tensor([-1.0]),) * 2, None, None, *(torch.tensor([1]),) * 2)
    with pytest.raises(ValueError, match="no reference"):
        get_loss(name)(pairs, **HYPER[name])


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_metrics_are_detached_values_per_pair(name):
    loss = get_loss(name)
    if loss.metrics is None:
        return
    for values in loss.metrics(pairs_of([-1.0, 2.0], [1.0, -1.0]), **HYPER[name]).values():
        assert values.shape == (2,)
        assert not values.requires_grad


def test_metrics_of_minor_dpo_and_dpop():
    pairs = pairs_of([-0.5, 2.0], [1.0, -1.0])
    minor = get_loss("minor_dpo").metrics(pairs, beta=0.5)
    assert minor["minor_dpo/rejected_active"].tolist() == [1.0, 0.0]
    dpop = get_loss("dpop").metrics(pairs, beta=0.5, dpop_lambda=5.0)
    assert dpop["dpop/penalty"].tolist() == pytest.approx([2.5, 0.0])
    assert dpop["dpop/penalty_active"].tolist() == [1.0, 0.0]
