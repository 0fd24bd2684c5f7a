"""Win rates: pooled over turns and seeds, the sign test over questions, and the sentence on top."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_sweeps import judge, make_sweep, train
from scipy.stats import binomtest
from test_page import changed, report
from test_table import cell

from llamafactory_ext.errors import UserError
from llamafactory_ext.report.findings import findings
from llamafactory_ext.report.judged import ALL, sign_test_p, win_rates
from llamafactory_ext.report.look import look_of
from llamafactory_ext.report.table import groups


def verdicts(text, **more):
    """A question per letter: w, t or l."""
    names = {"w": "win", "t": "tie", "l": "lose"}
    return [{"id": str(n), "outcome": names[letter], **more} for n, letter in enumerate(text)]


def judged(loss, against, outcomes, **place):
    made = cell(loss, [0], **place)
    object.__setattr__(made, "judged", {"b": against, "judge": "gpt-4"})
    object.__setattr__(made, "outcomes", outcomes)
    object.__setattr__(made, "summary", None)
    return made


def unscored(loss, **place):
    made = cell(loss, [0], **place)
    object.__setattr__(made, "summary", None)
    return made


def test_verdicts_are_pooled_over_seeds_and_the_interval_is_that_of_one_runs_questions():
    """Four questions, two seeds: 5 of 8 verdicts are wins, 2 ties, 1 a loss. By question, w w, w t, w l, w t: three are
    won, one is even: p = 2 / 2^3. Wilson's of 5/8 with n = 4, by hand."""
    dpo = unscored("sigmoid", seed=1)
    seeds = {1: "wwww", 2: "wtlt"}
    refined = [judged("sr_dpo", dpo.name, verdicts(text), seed=seed) for seed, text in seeds.items()]
    (rates,) = win_rates(groups([dpo, *refined]))
    assert (rates.part, rates.questions, rates.judge, rates.baseline.variant.name) == (ALL, 4, "gpt-4", "DPO")
    assert rates.counts == {"win": 5, "tie": 2, "lose": 1}
    assert rates.p == rates.p_holm == pytest.approx(2 / 2**3)
    z = 1.959964
    half = z * (0.625 * 0.375 / 4 + z**2 / 64) ** 0.5
    expected = [(0.625 + z**2 / 8 + sign * half) / (1 + z**2 / 4) for sign in (-1, 1)]
    np.testing.assert_allclose(rates.interval("win"), expected, rtol=1e-6)


@given(st.text("wtl", min_size=1, max_size=20))
def test_with_one_verdict_per_question_it_is_the_sign_test_of_eval_judge(text):
    wins, losses = text.count("w"), text.count("l")
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test_p(verdicts(text)) == pytest.approx(expected)


def test_turns_and_categories_have_rows_of_their_own_where_there_are_several():
    rows = [*verdicts("wl", turn=1, category="math"), *verdicts("ww", turn=2, category="math")]
    found = win_rates(groups([judged("sr_dpo", "base", rows)]))
    assert [(each.part, each.questions, each.counts["win"]) for each in found] == [
        ("all", 2, 3),
        ("turn 1", 2, 1),
        ("turn 2", 2, 2),
    ]
    assert [each.p_holm is None for each in found] == [False, True, True]
    assert found[0].baseline is None
    found = win_rates(groups([judged("sr_dpo", "base", [{**rows[0], "category": "a"}, {**rows[1], "category": "b"}])]))
    assert [each.part for each in found] == ["all", "a", "b"]


def test_holms_correction_is_over_the_groups():
    """p-values 2 / 2^6 and 2 / 2^8: the smaller is doubled."""
    cells = [judged("sr_dpo", "base", verdicts("w" * 6)), judged("sr_ipo", "base", verdicts("l" * 8))]
    first, second = win_rates(groups(cells))
    assert (first.p_holm, second.p_holm) == pytest.approx((2 / 2**6, 2 * 2 / 2**8))


# --- the sentence ----------------------------------------------------------------------------------------------------


def told(*cells):
    found = groups(cells)
    return findings(found, [], look_of(group.variant for group in found), win_rates(found))


def test_a_judged_setting_has_a_sentence():
    dpo = unscored("sigmoid")
    assert told(dpo, judged("sr_dpo", dpo.name, verdicts("wwwwwwwwtl"))) == (
        "Judged by gpt-4, Sr-DPO (learning rate 1e-05, β = 0.1) wins 80.0% and loses 10.0% against DPO, which is "
        "significant (p = 0.039 by a sign test over 10 questions, after Holm's correction)."
    )


def test_of_several_the_best_one_is_told():
    cells = [judged("sr_dpo", "base", verdicts("wl")), judged("sr_ipo", "base", verdicts("wt"))]
    assert told(*cells) == (
        "Of 2 settings judged by gpt-4, Sr-IPO (learning rate 1e-05, β = 0.1) does best: it wins 50.0% and loses 0.0% "
        "against the untrained model, which is not significant (p = 1 by a sign test over 2 questions, after Holm's "
        "correction)."
    )


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "questions.jsonl").write_text("{}\n")
    asked = {"data": tmp_path / "questions.jsonl", "engine": "hf", "judge": "gpt-4", "baseline": {"sr_dpo": "sigmoid"}}
    made = make_sweep(tmp_path, {"pref_loss": ["sigmoid", "sr_dpo"]}, gsm8k=None, judge=asked)
    for each in made.cells():
        train(made, each)
    judge(made, made.cells()[1], [*verdicts("wwtl"), {"id": "4", "outcome": None}], "sigmoid")
    return made


def test_the_page_has_the_table_with_all_numbers_in_the_csv_file(sweep):
    page, _ = report(sweep)
    assert "Judge: gpt-4. Verdicts on 4 questions" in page
    assert "<td>Sr-DPO\nagainst DPO</td>" in page
    with (sweep.output / "report" / "win_rates.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["against"], row["judge"], row["part"], row["questions"]) == ("DPO", "gpt-4", "all", "4")
    assert [row[f"{name} count"] for name in ("win", "tie", "lose")] == ["2", "1", "1"]
    assert (row["win"], row["p"]) == ("0.5", "1.0")
    assert float(row["win low"]) == pytest.approx(0.15004, abs=1e-4)  # Wilson's of 2 of 4


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows",), None),
        (("rows",), []),
        (("rows", 0, "outcome"), "won"),
        (("rows", 0, "outcome"), None),
        (("rows", 0, "id"), 5),
        (("summary", "judged"), 3),
        (("summary", "win"), None),
        (("summary",), "x"),
    ],
)
def test_damaged_verdicts_are_named(place, value, sweep):
    changed(sweep.cells()[1].folder / "judge" / "results.json", place, value)
    with pytest.raises(UserError, match=r"results.json is damaged \(.*\): remove it, then run"):
        report(sweep)
