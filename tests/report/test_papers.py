"""The papers' exhibits on the page, in a sweep that has them all, and in one that has nothing yet."""

from __future__ import annotations

import csv
import re

import pytest
from recorded_sweeps import CHOSEN, MEASURED, make_refined_sweep, make_sweep, score, train
from test_page import report

from llamafactory_ext.report.chosen import chosen_table
from llamafactory_ext.report.papers import EXHIBITS, papers_of, untrained_accuracy
from llamafactory_ext.report.table import groups
from llamafactory_ext.report.tabular import STRONG
from llamafactory_ext.sweep.results import read_results


def rows_of(sweep, name):
    with (sweep.output / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    sweep = make_refined_sweep(tmp_path_factory.mktemp("refined"))
    page, _ = report(sweep)
    return sweep, page


def test_every_exhibit_of_the_sr_paper_is_shown_and_linked(refined):
    sweep, page = refined
    rows = rows_of(sweep, "claims_sr")
    numbers = list(dict.fromkeys(row["exhibit"] for row in rows))
    assert numbers == ["Figure 1", "Figure 2", "Figure 3", "Table 2", "Table 3", "Table 4", "Table 5"]
    assert all(row["here"] for row in rows)
    assert "not run" not in {row["verdict"] for row in rows}
    judged = [row for row in rows if row["claim"]]
    assert len(judged) == 1 + 4 * 2  # numbers of pairs; four tables for two losses
    assert {row["verdict"] for row in judged} <= {"holds", "does not hold", "cannot tell"}
    assert all(row["measured"] and row["criterion"] for row in judged)
    assert not (sweep.output / "report" / "claims_minor_dpo.csv").exists()
    assert '<a href="#win_rates">Win rates</a></td>' in page
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert links <= set(re.findall(r' id="([^"]+)"', page))
    assert page.index('<h2 id="claims_sr">') < page.index("<figure>") < page.index('<h2 id="win_rates">')


def test_the_sentence_on_top_tells_of_pairs_and_of_the_judge_alone(refined):
    _, page = refined
    assert "No model has been scored" not in page
    assert re.search(r'<p class="findings">On held-out pairs, .* Of 4 settings judged by gpt-4, ', page)


def test_number_of_pairs_is_drawn_without_problems(refined):
    sweep, _ = refined
    picture = (sweep.output / "report" / "sizes.svg").read_text()
    assert "accuracy on held-out pairs (%)" in picture
    assert "accuracy, strict (%)" not in picture


def test_chosen_values_are_shown(refined):
    sweep, page = refined
    rows = rows_of(sweep, "chosen")
    assert [(row["for"], row["value"], row["chosen"]) for row in rows] == [
        (f"pref_loss = {loss}", value, str(value == "0.3")) for loss in ("sr_dpo", "sr_ipo") for value in MEASURED
    ]
    assert {row["of"] for row in rows} == {"lambda.yaml"}
    assert page.count('<td class="strong">0.3</td>') == 2


def test_a_value_that_is_not_measured_yet_stands_alone():
    (row,) = chosen_table([CHOSEN | {"measured": {}, "value": 1e-05}]).rows
    assert [entry.text for entry in row.entries[1:5]] == ["pref_loss = sr_dpo", "1e-05", "margin", ""]
    assert {entry.look for entry in row.entries} == {STRONG}


def test_what_a_sweep_lacks_is_not_run(tmp_path):
    sweep = make_sweep(tmp_path, {"pref_loss": ["sigmoid", "minor_dpo", "sr_dpo"]})
    page, _ = report(sweep)
    minor, refined = rows_of(sweep, "claims_minor_dpo"), rows_of(sweep, "claims_sr")
    states = {row["exhibit"]: (row["verdict"], row["claim"]) for row in minor}
    assert states == {
        "Figure 1": ("", ""),  # drawn from the losses
        "Figures 2 to 5": ("not run", ""),
        "Figure 6": ("not run", ""),
    }
    assert {(row["verdict"], row["claim"]) for row in refined} == {("not run", "")}
    assert '<td class="muted">not run</td>' in page


def test_the_minor_dpo_papers_claims_by_its_figures(tmp_path):
    """MinorDPO's chosen rewards rise; DPO's do not fall. 9 of 10 problems against 4: better on 5, worse on none."""
    axes = {"pref_loss": ["sigmoid", "minor_dpo"], "learning_rate": [1e-5], "pref_beta": [0.02, 0.2]}
    sweep = make_sweep(tmp_path, axes)
    score(sweep, "base", 5)
    for cell in sweep.cells():
        train(sweep, cell)
        score(sweep, cell.name, 9 if cell.place["pref_loss"] == "minor_dpo" else 4)
    report(sweep)
    rows = {row["claim"]: row for row in rows_of(sweep, "claims_minor_dpo") if row["claim"]}
    assert [(row["exhibit"], row["verdict"]) for row in rows.values()] == [
        ("Figures 2 to 5", "does not hold"),
        ("Figures 2 to 5", "holds"),
        ("Figures 2 to 5", "does not hold"),  # the same margin at both betas
        ("Figure 6", "does not hold"),  # DPO solves more than half of the untrained model's 5
        ("Figure 6", "cannot tell"),  # p = 2 / 2^5
    ]
    assert {row["here"] for row in rows.values()} == {"rewards_lr1e-05", "scores, tests"}


@pytest.mark.parametrize(
    ("losses", "papers"),
    [
        (["sigmoid", "ipo"], []),
        (["dpop"], ["MinorDPO"]),
        (["minor_dpo,sft", "sr_ipo"], ["MinorDPO", "Sr"]),
    ],
)
def test_only_papers_of_whose_losses_something_is_run(losses, papers, tmp_path):
    sweep = make_sweep(tmp_path, {"pref_loss": losses})
    found = groups(read_results(sweep.output).cells)
    assert [paper.split()[0] for paper in papers_of(found)] == papers


def test_every_exhibit_of_both_papers_has_a_place():
    numbers = [(each.paper.split()[0], each.number) for each in EXHIBITS if each.number]
    assert numbers == [
        *(("MinorDPO", number) for number in ("Figure 1", "Figures 2 to 5", "Figure 6")),
        *(("Sr", f"Figure {number}") for number in (1, 2, 3)),
        *(("Sr", f"Table {number}") for number in (2, 3, 4, 5)),
    ]


def test_no_claim_is_judged_across_models(tmp_path):
    """Otherwise one model's Sr-DPO would be compared with another's DPO."""
    axes = {"model_name_or_path": ["a", "b"], "pref_loss": ["sigmoid", "minor_dpo"]}
    sweep = make_sweep(tmp_path, axes)
    for cell in sweep.cells():
        train(sweep, cell)
    page, _ = report(sweep)
    assert "No claim is judged: the cells differ in `model_name_or_path`, too." in page
    assert not [row for row in rows_of(sweep, "claims_minor_dpo") if row["claim"]]


def test_the_accuracy_of_one_of_two_untrained_models_is_nobody_elses(tmp_path):
    sweep = make_sweep(tmp_path, {"model_name_or_path": ["a", "b"], "pref_loss": ["sigmoid"]})
    for cell in sweep.cells():
        train(sweep, cell)
    assert untrained_accuracy(read_results(sweep.output)) is None
