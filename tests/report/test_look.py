"""Labels and colors: short, told apart, and the same everywhere."""

from __future__ import annotations

import re

import pytest

from llamafactory_ext.losses import STOCK_LOSSES
from llamafactory_ext.report.look import look_of
from llamafactory_ext.report.variants import Variant


def mine(file="/a/long/path/to/losses.py", **values):
    arguments = tuple((f"pref_loss_args.{key}", value) for key, value in values.items())
    return Variant("mine", (*arguments, ("pref_loss_file", file)))


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        (Variant("sigmoid"), "DPO"),
        (Variant("sr_dpo", (("sr_lambda", 0.3), ("max_samples", 256))), "Sr-DPO, sr_lambda = 0.3, pairs = 256"),
        (mine(tau=0.5), "mine, tau = 0.5"),
        (mine(tau=None, kind=True), "mine, tau = null, kind = true"),
        (
            Variant("sr_dpo", (("sr_prompt", "Please write\n a response of quality."),)),
            "Sr-DPO, sr_prompt = Please write…of quality.",
        ),
    ],
)
def test_labels_are_short(variant, label):
    assert look_of([variant]).labels[variant] == label


def test_two_files_with_one_loss_are_told_apart():
    first, second = mine("a.py", tau=1), mine("b.py", tau=1)
    look = look_of([first, second])
    assert [look.labels[v] for v in (first, second)] == [
        "mine, tau = 1, pref_loss_file = a.py",
        "mine, tau = 1, pref_loss_file = b.py",
    ]


def test_labels_that_would_be_equal_are_numbered():
    prompts = [Variant("sr_dpo", (("sr_prompt", f"The beginning {word} the same end."),)) for word in "abc"]
    labels = [look_of(prompts).labels[variant] for variant in prompts]
    assert len(set(labels)) == 3
    assert labels[2] == f"{labels[0]} (3)"


def test_a_value_is_not_torn_from_its_key():
    look = look_of([mine(tau=0.5, floor=-2.25)])
    assert look.wrapped(mine(tau=0.5, floor=-2.25), 14) == "mine,\ntau = 0.5,\nfloor = -2.25"
    long = Variant("a_loss_whose_name_is_longer_than_a_panel")
    assert max(map(len, look_of([long]).wrapped(long, 14).splitlines())) <= 14


def test_every_variant_has_a_color_of_its_own():
    losses = [*STOCK_LOSSES, "minor_dpo", "dpop", "sr_dpo", "sr_ipo", *(f"own_{n}" for n in range(12))]
    variants = [Variant(loss, (("sr_lambda", value),)) for loss in dict.fromkeys(losses) for value in (0.1, 0.3, 0.5)]
    colors = look_of(variants).colors
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors.values())
    assert len({colors[variant] for variant in variants}) == len(variants)


def test_a_color_does_not_depend_on_the_number_of_pairs():
    small, large = (Variant("sigmoid", (("max_samples", size),)) for size in (256, 512))
    colors = look_of([small, large]).colors
    assert colors[small] == colors[large] == colors[Variant("sigmoid")]


def test_a_loss_has_its_color_in_every_report():
    dpo, minor = Variant("sigmoid"), Variant("minor_dpo")
    assert look_of([minor, dpo]).colors[dpo] == look_of([dpo]).colors[dpo]
