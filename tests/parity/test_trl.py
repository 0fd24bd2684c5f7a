"""Every loss that TRL's DPO trainer has, too: values and gradients are TRL's own, but for listed cases.

TRL of a later release needs an environment of its own, whose Python TRL_PYTHON names: `make test-trl`.
"""

from __future__ import annotations

import copy
import os

import pytest
from trl_cases import CASES, F_DIVERGENCE, SETTINGS, TABLES, Case
from trl_parity import DEVIATIONS, OURS_ONLY, compare, lines, ours, trl_table

from llamafactory_ext.losses.lookup import all_losses, loss_names

TRL_PYTHON = os.environ.get("TRL_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TRL_PYTHON, reason="TRL_PYTHON does not name the Python of TRL's environment: make test-trl"
    ),
]


@pytest.fixture(scope="module")
def table():
    return trl_table(TRL_PYTHON)


def test_cases_can_be_told_apart():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers_are_trls(case, table):
    row = compare(case, table["cases"][case.name]["batches"])
    assert row.is_right, f"value {row.value}, gradient {row.gradient}, allowed {row.allowed}: {row.verdict}"


def test_listed_deviations_are_of_cases():
    assert set(DEVIATIONS) <= {case.name for case in CASES}


def test_every_loss_has_cases_or_a_reason(table):
    assert set(SETTINGS) == set(table["losses"])
    assert set(table["losses"]) <= set(loss_names())
    assert set(OURS_ONLY) == set(loss_names()) - set(table["losses"])


def test_the_same_losses_take_divergences_and_weights():
    """But for `sft`, which TRL lets have a divergence: it changes nothing there, nor in a sum of ours."""
    shared = [loss for loss in all_losses() if loss.name in SETTINGS]
    assert {loss.name for loss in shared if loss.takes_divergence} == set(F_DIVERGENCE) - {"sft"}
    weighted = {name for case in CASES if case.kind == "use_weighting" for name in case.losses}
    assert {loss.name for loss in shared if not loss.needs_batch} == weighted


def test_no_setting_is_left_out():
    with pytest.raises(ValueError, match="of TRL's \\['unheard_of'\\]"):
        ours(Case("loss", ["sigmoid"], {"unheard_of": 1}), TABLES["usual"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_another_number_is_found(where, table):
    case = CASES[0]
    changed = copy.deepcopy(table)
    last = changed["cases"][case.name]["batches"][-1]
    if where == "loss":
        last["loss"] += 1e-9
    else:
        last["rejected"][-1][-1] += 1e-9
    row = compare(case, changed["cases"][case.name]["batches"])
    assert not row.is_right
    assert [(row.value if where == "loss" else row.gradient)] == pytest.approx([1e-9], rel=1e-3)
    assert sum("DIFFERS" in line for line in lines(changed)) == 1
