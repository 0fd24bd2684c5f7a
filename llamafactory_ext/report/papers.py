"""The two papers' figures and tables by their numbers: where the page shows them, and what became of their claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..recipe.keys import split
from ..sweep.results import SweepResults
from .claims import all_findings
from .claims.study import MINOR, SR, Finding, Study, lambda_of
from .table import Group, apart_from_the_loss, groups
from .tabular import TEXT, Entry, Row, Table
from .variants import SIZE

NOT_RUN = "not run"
VARIED = ("learning_rate", "pref_beta", SIZE)  # by the papers
LOOKS = {"holds": "done", "does not hold": "failed", "cannot tell": "missing", NOT_RUN: "muted"}


class Exhibit(NamedTuple):
    """A figure or table of a paper.

    Args:
        paper: whose it is.
        number: what the paper calls it; empty for claims without one.
        shows: what is in it.
        places: how the names of the page's figures and tables begin that show it.
    """

    paper: str
    number: str
    shows: str
    places: tuple[str, ...]


EXHIBITS = (
    Exhibit(MINOR, "Figure 1", "coefficient of the gradient", ("coefficient",)),
    Exhibit(MINOR, "Figures 2 to 5", "normalized rewards by method, learning rate and beta", ("rewards_",)),
    Exhibit(MINOR, "Figure 6", "accuracy by method, learning rate and beta", ("scores", "tests")),
    Exhibit(SR, "Figure 1", "margins and accuracy over the steps", ("refinement_",)),
    Exhibit(SR, "Figure 2", "margins by number of pairs", ("sizes",)),
    Exhibit(SR, "Figure 3", "accuracy by number of pairs", ("sizes",)),
    Exhibit(SR, "Table 2", "win rates by a judge", ("win_rates",)),
    Exhibit(SR, "Table 3", "benchmarks of the Open LLM Leaderboard", ("benchmarks", "benchmark_tests")),
    Exhibit(SR, "Table 4", "correlations of margins with the data's own scores", ("correlations",)),
    Exhibit(SR, "Table 5", "margins and accuracies on held-out pairs by lambda", ("pairs",)),
    Exhibit(SR, "", "cost of the refinement", ("cells",)),
)
TITLES = {
    MINOR: ("claims_minor_dpo", "Claims of the MinorDPO paper", "2408.09834"),
    SR: ("claims_sr", "Claims of the Sr paper", "2405.21040"),
}


def study_of(results: SweepResults) -> Study:
    """What the claims are judged by: a sweep's trained cells, and the accuracy of the untrained model, if it is one."""
    trained = groups([cell for cell in results.cells if cell.is_trained])
    return Study(trained, untrained_accuracy(results), in_small=False)


def untrained_accuracy(results: SweepResults) -> float | None:
    """The strict accuracy of the model that all cells start from; None with several, or if it was not scored."""
    models = {cell.recipe.get("model_name_or_path") for cell in results.cells if cell.recipe}
    scored = [base.summary["strict"]["accuracy"] for base in results.bases if base.summary]
    return scored[0] if len(scored) == 1 and len(models) == 1 else None


def claims_tables(study: Study, found: Sequence[Group], shown: Sequence[tuple[str, str]]) -> list[Table]:
    """A table per paper of whose losses the sweep has any.

    Args:
        study: what the claims are judged by.
        found: all groups of the sweep.
        shown: name and title of each figure and table of the page.
    """
    papers, others = papers_of(found), varied_otherwise(found)
    judged = all_findings(study) if papers and not others else []
    note = f" No claim is judged: the cells differ in {', '.join(others)}, too." if others else ""
    return [_table(paper, [each for each in judged if each.paper == paper], shown, note) for paper in papers]


def varied_otherwise(found: Sequence[Group]) -> list[str]:
    """The keys, beside a loss's own, learning rate and number of pairs, in which the sweep's recipes differ: models or
    data, say. Then a loss in one place would be compared with another loss in another."""
    recipes = [apart_from_the_loss(cell) for group in found for cell in group.cells]
    keys = sorted({key for recipe in recipes for key in recipe}.difference(VARIED))
    return [f"`{key}`" for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]


def papers_of(found: Sequence[Group]) -> list[str]:
    losses = {name for group in found for name in split(group.variant.loss)}
    is_refined = any(lambda_of(group) > 0 for group in found)
    return [MINOR] * bool(losses & {"minor_dpo", "dpop"}) + [SR] * (is_refined or bool(losses & {"sr_dpo", "sr_ipo"}))


def _table(paper: str, judged: Sequence[Finding], shown: Sequence[tuple[str, str]], note: str) -> Table:
    name, title, number = TITLES[paper]
    rows, data = [], []
    for exhibit in EXHIBITS:
        if exhibit.paper != paper:
            continue
        links = tuple((title, name) for name, title in shown if name.startswith(exhibit.places))
        found = [each for each in judged if each.exhibit == exhibit.number and each.is_run]
        if found or exhibit.number:
            rows += _rows(exhibit, links, found)
            data += _data(exhibit, links, found)
    return Table(
        name,
        title,
        f"arXiv {number}, by the numbers of its figures and tables. Each claim is judged by a criterion that was "
        f"settled before any run. “{NOT_RUN}” means that this sweep has nothing to show there. The paper's own numbers "
        f"are not repeated here.{note}",
        ("exhibit", "what it shows, here", "claim", "verdict", "measured", "criterion"),
        tuple(rows),
        tuple(data),
    )


def _rows(exhibit: Exhibit, links: tuple[tuple[str, str], ...], found: Sequence[Finding]) -> list[Row]:
    """A row per claim; a claim's exhibit stands beside the first only."""
    first = (Entry(exhibit.number), Entry(exhibit.shows, TEXT, links))
    if not found:
        state = "" if links else NOT_RUN
        return [Row((*first, Entry("", TEXT), Entry(state, LOOKS.get(state, "")), Entry("", TEXT), Entry("", TEXT)))]
    return [
        Row(
            (
                *(first if place == 0 else (Entry(""), Entry("", TEXT))),
                Entry(each.claim, TEXT),
                Entry(each.verdict, LOOKS[each.verdict]),
                Entry(each.numbers, TEXT),
                Entry(each.criterion, TEXT),
            )
        )
        for place, each in enumerate(found)
    ]


def _data(exhibit: Exhibit, links: tuple[tuple[str, str], ...], found: Sequence[Finding]) -> list[dict[str, str]]:
    here = ", ".join(name for _, name in links)
    about = {"exhibit": exhibit.number, "shows": exhibit.shows, "here": here}
    if not found:
        return [about | {"claim": "", "verdict": "" if links else NOT_RUN, "measured": "", "criterion": ""}]
    return [
        about | {"claim": each.claim, "verdict": each.verdict, "measured": each.numbers, "criterion": each.criterion}
        for each in found
    ]
