"""The sentence of findings in every case, and the best cell."""

from __future__ import annotations

import pytest
from test_table import cell

from llamafactory_ext.report.findings import best_cells, findings
from llamafactory_ext.report.look import look_of
from llamafactory_ext.report.table import compare_with_dpo, groups
from llamafactory_ext.scoring.summary import summarize
from llamafactory_ext.sweep.results import SweepResults


def told(*cells):
    found = groups(cells)
    return findings(found, compare_with_dpo(found), look_of(group.variant for group in found))


def solved(count, of=20):
    return [1] * count + [0] * (of - count)


def unscored(loss):
    made = cell(loss, [0])
    object.__setattr__(made, "summary", None)
    return made


def with_margins(made, margins):
    rows = [{"index": n, "skipped": False, "margin": margin} for n, margin in enumerate(margins)]
    object.__setattr__(made, "pairs", summarize(rows))
    object.__setattr__(made, "margins", dict(enumerate(margins)))
    return made


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ([unscored("sigmoid")], "No model has been scored on problems yet, so nothing can be said about accuracy."),
        (
            [cell("minor_dpo", solved(5)), unscored("sigmoid")],
            "Only MinorDPO (learning rate 1e-05, β = 0.1) has been scored, so nothing can be compared: it solves 25.0% "
            "of the problems.",
        ),
        (
            [cell("sigmoid", solved(5)), cell("minor_dpo", solved(15))],
            "MinorDPO (learning rate 1e-05, β = 0.1) has the highest strict accuracy, 75.0%; the difference of +50.0 "
            "points to DPO with the same settings is significant (p = 0.002 after Holm's correction).",
        ),
        (
            [cell("sigmoid", solved(5)), cell("minor_dpo", solved(7))],
            "MinorDPO (learning rate 1e-05, β = 0.1) has the highest strict accuracy, 35.0%; the difference of +10.0 "
            "points to DPO with the same settings is not significant (p = 0.5 after Holm's correction).",
        ),
        (
            [cell("sigmoid", solved(5)), cell("minor_dpo", solved(7), pref_beta=0.2)],
            "MinorDPO (learning rate 1e-05, β = 0.2) has the highest strict accuracy, 35.0%; DPO was not scored with "
            "the same settings, so it is open whether the two differ.",
        ),
        (
            [cell("sigmoid", solved(15)), cell("minor_dpo", solved(5)), cell("dpop", solved(14))],
            "DPO (learning rate 1e-05, β = 0.1) has the highest strict accuracy, 75.0%; 1 of 2 other methods with the "
            "same settings is significantly worse.",
        ),
        (
            [cell("sigmoid", solved(15)), cell("dpop", solved(14))],
            "DPO (learning rate 1e-05, β = 0.1) has the highest strict accuracy, 75.0%; no other method with the same "
            "settings differs significantly from it.",
        ),
        (
            [cell("sigmoid", solved(15)), cell("dpop", solved(14), pref_beta=0.2)],
            "DPO (learning rate 1e-05, β = 0.1) has the highest strict accuracy, 75.0%; no other method was tested "
            "against it.",
        ),
        (
            [cell("sigmoid", solved(5)), cell("dpop", solved(5)), cell("ipo", solved(4))],
            "DPO (learning rate 1e-05, β = 0.1) and DPOP (learning rate 1e-05, β = 0.1) share the highest strict "
            "accuracy, 25.0%; none of them differs significantly from DPO with the same settings.",
        ),
        (
            [cell("sigmoid", solved(2)), *(cell(loss, solved(18)) for loss in ("dpop", "ipo", "minor_dpo"))],
            "3 settings share the highest strict accuracy, 90.0%; 3 of them differ significantly from DPO with the "
            "same settings.",
        ),
        (
            [cell("dpop", solved(5)), cell("ipo", solved(5))],
            "DPOP (learning rate 1e-05, β = 0.1) and IPO (learning rate 1e-05, β = 0.1) share the highest strict "
            "accuracy, 25.0%; none of them could be tested against DPO with the same settings.",
        ),
    ],
)
def test_what_is_best_and_whether_it_differs_from_dpo(cells, sentence):
    assert told(*cells) == sentence


def test_held_out_pairs_have_a_sentence_of_their_own():
    better = with_margins(unscored("dpop"), [1.0, 2.0, 1.0, -1.0])
    worse = with_margins(unscored("sigmoid"), [1.0, 2.0, -1.0, -1.0])
    assert told(worse, better).endswith(
        "On held-out pairs, DPOP (learning rate 1e-05, β = 0.1) has the highest accuracy, 75.0% (95% interval 30.1% to "
        "95.4%)."
    )
    equal = with_margins(unscored("ipo"), [1.0, 2.0, 1.0, -1.0])
    assert told(equal, better).endswith("On held-out pairs, 2 settings share the highest accuracy, 75.0%.")


def test_seeds_that_average_to_the_same_are_equal():
    """0.1 + 0.2 and 0.3 differ in the last bit."""
    dpo = [cell("sigmoid", solved(n, 10), seed=n) for n in (1, 2, 6)]
    dpop = [cell("dpop", solved(3, 10), seed=n) for n in (1, 2, 6)]
    assert "share the highest strict accuracy, 30.0%" in told(*dpo, *dpop)


def test_the_best_cells_are_those_of_the_highest_score():
    cells = [cell("sigmoid", solved(3), seed=1), cell("dpop", solved(5), seed=1), cell("dpop", solved(5), seed=2)]
    assert best_cells(SweepResults({}, cells, [])) == cells[1:]
    assert best_cells(SweepResults({}, [unscored("sigmoid")], [])) == []
