"""Groups, final numbers, and the tests against DPO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar

from llamafactory_ext.evaluation.paired import sign_flip_p
from llamafactory_ext.report.table import compare_with_dpo, degenerated, final, groups
from llamafactory_ext.report.variants import Variant
from llamafactory_ext.sweep.records import Record
from llamafactory_ext.sweep.results import Result


def cell(loss, correct, history=(), **place):
    place = {"pref_loss": loss, "learning_rate": 1e-5, "pref_beta": 0.1, **place}
    share = sum(correct) / len(correct)
    summary = {"strict": {"accuracy": share}, "degeneration": {"degenerate": 0.25}}
    made = Made(
        name=str(place),
        place=place,
        recipe={"stage": "dpo", **place},
        folder=Path("nowhere"),
        records={"train": Record("done")},
        summary=summary,
        correct=dict(enumerate(correct)),
        pairs=None,
        margins={},
    )
    object.__setattr__(made, "logs", list(history))
    return made


class Made(Result):
    """A result whose logs are not on disk."""

    @property
    def log_history(self):
        return self.logs


def test_cells_that_differ_in_their_seed_are_a_group():
    found = groups(
        [
            cell("sigmoid", [1, 0], seed=1),
            cell("sigmoid", [1, 1], seed=2),
            cell("sr_dpo", [1, 1], seed=1, sr_lambda=0.3),
            cell("sr_dpo", [1, 1], seed=1, sr_lambda=1.0),
        ]
    )
    assert [(group.method, len(group.cells)) for group in found] == [
        ("DPO", 2),
        ("Sr-DPO sr_lambda=0.3", 1),
        ("Sr-DPO sr_lambda=1", 1),
    ]
    assert found[0].accuracy == 0.75
    assert found[0].degenerate == 0.25


def test_groups_carry_which_keys_have_which_values():
    """A mapping is flattened, the number of pairs comes last, and what means the same is the same."""
    ours = {"pref_loss_file": "losses.py", "max_samples": 256, "pref_loss_args": {"tau": 0.5, "inner": {"a": [1, 2]}}}
    as_json = ours | {"pref_loss_args": '{"inner": {"a": [1, 2]}, "tau": 0.5}'}
    without = ours | {"pref_loss_args": None}
    both, plain = groups([cell("mine", [1], **each) for each in (ours, as_json, without)])
    assert both.variant == Variant(
        "mine",
        (
            ("pref_loss_args.inner.a", (1, 2)),
            ("pref_loss_args.tau", 0.5),
            ("pref_loss_file", "losses.py"),
            ("max_samples", 256),
        ),
    )
    assert len(both.cells) == 2
    assert plain.variant == both.variant.without("pref_loss_args.tau", "pref_loss_args.inner.a")
    assert plain.variant.size == 256
    assert both.method == "mine inner.a=1,2 tau=0.5 pref_loss_file=losses.py pairs=256"


def test_the_interval_is_that_of_one_runs_problems():
    """Wilson's, by hand: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = 1/2, n = 4."""
    (group,) = groups([cell("sigmoid", [1, 1, 0, 0], seed=seed) for seed in (1, 2, 3)])
    z = 1.959964
    half = z * (0.25 / 4 + z**2 / 64) ** 0.5
    expected = [(0.5 + z**2 / 8 + sign * half) / (1 + z**2 / 4) for sign in (-1, 1)]
    np.testing.assert_allclose(group.wilson, expected, rtol=1e-6)


def test_final_numbers_are_means_over_the_last_tenth():
    history = [{"step": step, "normalized_rewards/chosen": float(step)} for step in range(20)] + [{"step": 20}]
    assert final(history, "normalized_rewards/chosen") == 18.5
    assert final(history[:3], "normalized_rewards/chosen") == 2
    assert final(history, "missing") is None


def test_a_run_degenerates_if_it_does_at_its_end():
    flags = [{"monitor/degenerating": flag} for flag in (0.0, 1.0, 1.0)]
    assert degenerated([*flags, {"loss": 1}]) is True
    assert degenerated(flags[:1]) is False
    assert degenerated([{"loss": 1}]) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=14))
@settings(deadline=None)
def test_with_one_seed_the_test_is_mcnemars(pairs):
    a, b = np.array(pairs).T
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    assert sign_flip_p(a.astype(float) - b) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_against_dpo_problem_by_problem_with_holm():
    dpo = [[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    minor = [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0]]
    cells = [cell("sigmoid", row, seed=seed) for seed, row in enumerate(dpo)]
    cells += [cell("minor_dpo", row, seed=seed) for seed, row in enumerate(minor)]
    cells += [cell("dpop", row, seed=seed, dpop_lambda=5) for seed, row in enumerate(dpo)]
    cells += [cell("minor_dpo", minor[0], seed=0, pref_beta=0.2)]  # has no DPO beside it
    minor_row, dpop_row = compare_with_dpo(groups(cells))
    assert minor_row.group.method == "MinorDPO"
    assert (minor_row.better, minor_row.worse) == (6, 0)
    assert minor_row.difference == pytest.approx(5.5 / 8)
    assert minor_row.p == pytest.approx(2 / 2**6)  # six problems, all of one sign
    assert minor_row.p_holm == pytest.approx(2 * 2 / 2**6)
    assert (dpop_row.difference, dpop_row.p, dpop_row.p_holm) == (0, 1, 1)


def test_a_loss_without_reference_is_compared_with_dpo_too():
    dpo, orpo = cell("sigmoid", [0, 0, 0], seed=1), cell("orpo", [1, 1, 1], seed=1)
    dpo.recipe["ref_log_probs_cache_dir"] = "out/references"
    (row,) = compare_with_dpo(groups([dpo, orpo]))
    assert row.difference == 1


def test_other_settings_are_not_compared():
    cells = [cell("sigmoid", [0, 0], seed=1, pref_beta=0.2), cell("minor_dpo", [1, 1], seed=1)]
    assert compare_with_dpo(groups(cells)) == []


def test_only_seeds_that_both_have_are_compared():
    cells = [cell("sigmoid", [0, 0], seed=1), cell("minor_dpo", [1, 1], seed=1), cell("minor_dpo", [0, 0], seed=2)]
    (row,) = compare_with_dpo(groups(cells))
    assert row.difference == 1
