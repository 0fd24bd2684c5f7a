"""Claims at full scale: every one of them holds, fails, stays open, or is not run; and the words say what was used."""

from __future__ import annotations

import pytest
from test_benchmarks import benched, harness
from test_correlations import rated
from test_judged import judged, unscored, verdicts
from test_reproduce import Group as Recorded
from test_table import cell

from llamafactory_ext.report.claims import all_findings
from llamafactory_ext.report.claims.study import DPO, Study, lambda_of, with_lambda, with_size
from llamafactory_ext.report.table import groups
from llamafactory_ext.report.variants import SIZE, Variant
from llamafactory_ext.scoring.summary import summarize


def study(*cells, untrained=0.5):
    return Study(groups(cells), untrained, in_small=False)


def run(found):
    """Those of the claims that the study has something for, by how they begin."""
    return {each.claim: each for each in all_findings(found) if each.is_run}


def one(found, begins):
    (each,) = [each for claim, each in run(found).items() if claim.startswith(begins)]
    return each


def with_pairs(loss, margins, **place):
    made = cell(loss, [1], **place)
    rows = [{"index": n, "skipped": False, "margin": margin} for n, margin in enumerate(margins)]
    object.__setattr__(made, "pairs", summarize(rows))
    object.__setattr__(made, "margins", dict(enumerate(margins)))
    object.__setattr__(made, "summary", None)
    return made


# --- Tables 2 to 5 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "plain", "name"), [("sr_dpo", "sigmoid", "Sr-DPO"), ("sr_ipo", "ipo", "Sr-IPO")])
@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ("w" * 6, "holds"),  # p = 2 / 2^6 = 0.031
        ("l" * 6, "does not hold"),
        ("w" * 5, "cannot tell"),  # 2 / 2^5 = 0.063
        ("wwwwwwltt", "cannot tell"),  # 6 of 7: 2 * (1 + 7) / 2^7 = 0.125
        ("tttt", "cannot tell"),
    ],
)
def test_win_rates(loss, plain, name, outcomes, verdict):
    baseline = unscored(plain)
    found = study(baseline, judged(loss, baseline.name, verdicts(outcomes), sr_lambda=0.3))
    each = one(found, "A judge prefers")
    assert each.claim.startswith(f"A judge prefers {name}'s answers")
    assert (each.verdict, each.exhibit) == (verdict, "Table 2")
    assert each.criterion.startswith("At learning rate 1e-05, beta 0.1 and lambda 0.3, ")
    assert f"Of {len(outcomes)} questions {outcomes.count('w')} won and {outcomes.count('l')} lost" in each.numbers


def test_win_rates_against_another_baseline_are_no_evidence():
    cells = [unscored("sigmoid"), judged("sr_dpo", "base", verdicts("w" * 6), sr_lambda=0.3)]
    assert not any(claim.startswith("A judge") for claim in run(study(*cells)))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1.0] * 7 + [0.0], [0.0] * 8, "holds"),  # 0.875 -+ 2.36 * 0.354 / sqrt(8) = 0.58 to 1.17
        ([0.0] * 8, [1.0] * 7 + [0.0], "does not hold"),
        ([1.0] + [0.0] * 7, [0.0] * 8, "cannot tell"),  # 0.125 -+ 0.30
        ([1.0], [0.0], "cannot tell"),  # a single example has no interval
    ],
)
def test_benchmarks(ours, theirs, verdict):
    cells = [benched("sigmoid", harness(a=theirs), seed=1), benched("sr_dpo", harness(a=ours), seed=1, sr_lambda=0.5)]
    each = one(study(*cells), "Sr-DPO reaches a higher average")
    assert (each.verdict, each.exhibit) == (verdict, "Table 3")
    assert "lambda 0.5, " in each.criterion
    assert "seeds: 1" in each.numbers


RISING = [float(n) for n in range(12)]
MIXED = [5.0, 0.0, 7.0, 2.0, 11.0, 1.0, 4.0, 9.0, 3.0, 10.0, 6.0, 8.0]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(RISING, RISING[::-1], "holds"), (RISING[::-1], RISING, "does not hold"), (MIXED, MIXED, "cannot tell")],
)
def test_correlations(ours, theirs, verdict):
    """Spearman's is 1 or -1 in every sample of pairs, so that its difference is 2 or -2; of equal margins it is 0."""
    cells = [rated("ipo", theirs, RISING, seed=1), rated("sr_ipo", ours, RISING, seed=1, sr_lambda=0.3)]
    each = one(study(*cells), "Sr-IPO's margins agree better")
    assert (each.verdict, each.exhibit) == (verdict, "Table 4")


MARGINS = [1.0, 2.0, 1.5, 2.5] * 10


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([margin - 0.5 for margin in MARGINS], "holds"),
        ([margin + 0.5 for margin in MARGINS], "does not hold"),  # not lower
        ([margin - 3 for margin in MARGINS], "does not hold"),  # lower, but so is the accuracy: 0 of 40
        ([-0.5, *MARGINS[1:]], "cannot tell"),  # -0.04 -+ 0.08 nats
        ([-0.5, *(margin - 0.5 for margin in MARGINS[1:])], "cannot tell"),  # accuracy: -0.025 -+ 0.05
    ],
)
def test_held_out_pairs(ours, verdict):
    cells = [with_pairs("sigmoid", MARGINS, seed=1), with_pairs("sr_dpo", ours, seed=1, sr_lambda=0.3)]
    each = one(study(*cells), "Sr-DPO keeps DPO's accuracy")
    assert (each.verdict, each.exhibit) == (verdict, "Table 5")
    assert "40 pairs" in each.numbers


def test_what_was_not_measured_is_not_run():
    assert run(study(cell("sigmoid", [1]), cell("sr_dpo", [1], sr_lambda=0.3))) == {}
    assert run(study()) == {}


# --- where the claims are judged -------------------------------------------------------------------------------------


def test_lambda_is_03_where_it_was_run_else_the_nearest():
    cells = [cell("sr_dpo", [1], sr_lambda=value) for value in (0.1, 0.5, 1.0)]
    assert study(*cells).setting("sr_dpo") == (1e-5, 0.1, 0.1)
    assert study(*cells[1:]).setting("sr_dpo").weight == 0.5
    assert study(*cells, cell("sr_dpo", [1], sr_lambda=0.3)).setting("sr_dpo").weight == 0.3
    assert study(cell("sr_dpo", [1], pref_beta=0.5, sr_lambda=1)).setting("sr_dpo") == (1e-5, 0.5, 1)


def test_lambda_may_stand_in_the_recipe_alone():
    fixed, default, plain = cell("sr_dpo", [1]), cell("sr_ipo", [1]), cell("sigmoid", [1])
    fixed.recipe["sr_lambda"] = "0.7"
    assert [lambda_of(group) for group in groups([fixed, default, plain])] == [0.7, 0.3, 0.0]
    assert study(fixed).setting("sr_dpo").weight == 0.7


def test_dpo_with_a_refinement_term_is_not_dpo():
    refined = cell("sigmoid", [1])
    refined.recipe["sr_lambda"] = 0.3
    assert study(refined).of(DPO) == []


def test_what_else_the_sweep_varies_does_not_matter():
    ipo = cell("ipo", [1], ipo_length_normalize=False)
    (group,) = study(ipo, cell("ipo", [1], max_samples=256)).of(Variant("ipo"))
    assert group.cells == (ipo,)


# --- the study's claims at full scale --------------------------------------------------------------------------------


def test_numbers_of_pairs_and_lambdas_are_as_the_sweep_has_them():
    recorded = [Recorded(with_size(DPO, n), 5e-7, 0.1, 0.6, margin=5) for n in (20_000, 40_000)]
    recorded += [Recorded(with_size(with_lambda("sr_dpo", 0.5), n), 5e-7, 0.1, 0.6, margin=4) for n in (20_000, 40_000)]
    recorded += [Recorded(with_lambda("sr_ipo", each), 5e-7, 0.1, 0.6, margin=5 - each) for each in (0.5, 1.0)]
    found = Study(recorded, None, in_small=False)
    sizes, lambdas = one(found, "Sr-DPO's margins are lower"), one(found, "The larger lambda")
    assert (sizes.verdict, sizes.exhibit) == ("holds", "Figure 2")
    assert "40,000 pairs: margins 4.000 and 5.000" in sizes.numbers
    assert (lambdas.verdict, lambdas.exhibit) == ("holds", "Table 5")
    assert lambdas.numbers == "Lower in 1 of 1 steps. Sr-IPO at 0.5, 1.0: 4.500, 4.000."


@pytest.mark.parametrize(
    ("dpo", "minor", "verdict"),
    [(0.1, 0.6, "holds"), (0.4, 0.6, "does not hold"), (0.1, 0.2, "does not hold"), (0.2, 0.26, "cannot tell")],
)
def test_that_dpo_breaks_is_a_finding_where_no_pilot_chose_the_rate(dpo, minor, verdict):
    """Half of the untrained model's 0.5 is 0.25; with 100 problems, 6 more of one sign are p = 0.03, 5 are 0.06."""
    minor = dpo + 0.05 if verdict == "cannot tell" else minor
    recorded = [Recorded(DPO, 1e-5, 0.02, dpo), Recorded(Variant("minor_dpo"), 1e-5, 0.02, minor)]
    found = one(Study(recorded, 0.5 if verdict != "cannot tell" else 0.4, in_small=False), "At the high rate")
    assert (found.verdict, found.exhibit) == (verdict, "Figure 6")
    assert "if DPO solves more than half as well" in found.criterion
    assert "how the rate was chosen" not in found.criterion


def test_without_the_untrained_models_score_nothing_breaks():
    recorded = [Recorded(DPO, 1e-5, 0.02, 0.1), Recorded(Variant("minor_dpo"), 1e-5, 0.02, 0.6)]
    found = one(Study(recorded, None, in_small=False), "At the high rate")
    assert found.verdict == "cannot tell"
    assert "untrained missing" in found.numbers


def test_one_rate_is_not_told_as_two():
    recorded = [Recorded(DPO, 1e-5, 0.02, 0.1), Recorded(Variant("minor_dpo"), 1e-5, 0.02, 0.6)]
    found = one(Study(recorded, 0.5, in_small=False), "MinorDPO's best score")
    assert found.claim == "MinorDPO's best score tops those of DPO and DPOP at its rate."
    assert found.verdict == "holds"


def test_sizes_of_other_losses_do_not_widen_the_grid():
    recorded = [Recorded(DPO, 1e-5, 0.02, 0.1), Recorded(Variant("sigmoid", ((SIZE, 256),)), 1e-4, 0.1, 0.1)]
    found = Study(recorded, 0.5, in_small=False)
    assert (found.rates, found.betas) == ([1e-5], [0.02])
