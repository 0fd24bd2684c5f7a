"""Win rates by a judge: of each group, pooled over turns and seeds, against the baseline of its cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..sweep.results import Result
from .look import Look
from .table import SIGNIFICANT, Group, Interval, wilson_interval
from .tabular import STRONG, Entry, Row, Table
from .words import SETTING, bounds, counts, percent, percent_interval, setting, shown_setting, with_interval

OUTCOMES = ("win", "tie", "lose")
ALL = "all"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class WinRates:
    """How often a group's answers were better than those of its baseline.

    Args:
        group: whose cells were judged.
        baseline: the group that they were compared with; None for the untrained model.
        judge: its name.
        part: `ALL`, or the turn or category that is counted alone.
        questions: judged ones, of one run.
        counts: of verdicts by outcome, over turns and seeds.
        p: two-sided, of the sign test over questions, each of which is won or lost by most of its verdicts.
        p_holm: by Holm's method over the groups of the sweep; None for a part.
    """

    group: Group
    baseline: Group | None
    judge: str
    part: str
    questions: int
    counts: Mapping[str, int]
    p: float
    p_holm: float | None = None

    def rate(self, outcome: str) -> float:
        return self.counts[outcome] / sum(self.counts.values())

    def interval(self, outcome: str) -> Interval | None:
        """Wilson's 95% interval for the number of questions: turns and seeds share them, so that more of these do not
        make it narrower."""
        return wilson_interval(self.rate(outcome), self.questions)


def win_rates(found: Sequence[Group]) -> list[WinRates]:
    """Of each judged group, overall and then by turn and by category where there are several."""
    from statsmodels.stats.multitest import multipletests

    rates = [each for group in found for each in _of_group(group, found)]
    overall = [each.p for each in rates if each.part == ALL]
    corrected = iter(multipletests(overall, method="holm")[1] if overall else [])
    return [replace(each, p_holm=float(next(corrected))) if each.part == ALL else each for each in rates]


def _of_group(group: Group, found: Sequence[Group]) -> Iterator[WinRates]:
    judged = [cell for cell in group.cells if cell.judged and cell.outcomes]
    if not judged:
        return
    first = judged[0].judged or {}
    baseline = next((each for each in found if any(cell.name == first["b"] for cell in each.cells)), None)
    rows = [row for cell in judged for row in cell.outcomes]
    parts = {ALL: rows, **_parts(rows, "turn", "turn {}"), **_parts(rows, "category", "{}")}
    for part, some in parts.items():
        yield WinRates(
            group,
            baseline,
            first["judge"],
            part,
            questions=len({row["id"] for row in some}),
            counts={outcome: sum(row["outcome"] == outcome for row in some) for outcome in OUTCOMES},
            p=sign_test_p(some),
        )


def _parts(rows: Sequence[dict[str, Any]], column: str, called: str) -> dict[str, list[dict[str, Any]]]:
    """The rows by a column; empty if all have the same value, or none."""
    values = dict.fromkeys(row[column] for row in rows if row.get(column) is not None)
    if len(values) < 2:
        return {}
    return {called.format(value): [row for row in rows if row.get(column) == value] for value in values}


def sign_test_p(rows: Sequence[Mapping[str, Any]]) -> float:
    """Two-sided p of the exact sign test over questions: as many are won as lost.

    A question counts once: as won if more of its verdicts, over turns and seeds, are wins than losses, as lost if fewer
    are.
    """
    from scipy.stats import binomtest

    wins, losses = won_and_lost(rows)
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def won_and_lost(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The numbers of questions that are won and lost by most of their verdicts."""
    balance: dict[str, int] = {}
    for row in rows:
        balance[row["id"]] = balance.get(row["id"], 0) + (row["outcome"] == "win") - (row["outcome"] == "lose")
    return sum(each > 0 for each in balance.values()), sum(each < 0 for each in balance.values())


# --- table -----------------------------------------------------------------------------------------------------------


def win_rates_table(rates: Sequence[WinRates], look: Look) -> Table:
    judges = " and ".join(dict.fromkeys(each.judge for each in rates))
    questions = {each.questions for each in rates if each.part == ALL}
    several = any(each.part != ALL for each in rates)
    return Table(
        "win_rates",
        "Win rates",
        f"Judge: {judges}. Verdicts on {counts(questions)} questions in percent, pooled over turns and seeds. "
        "Intervals are Wilson's 95% for the number of questions of one run. p is from a two-sided sign test over "
        "questions: a question is won or lost by most of its verdicts. Holm's correction is over the settings; "
        f"corrected p-values below {SIGNIFICANT} are bold. After Table 2 of arXiv 2405.21040.",
        (*SETTING, *(["part"] if several else []), "questions", *OUTCOMES, "p", "p\n(Holm)"),
        tuple(_row(each, look, several) for each in rates),
        tuple(
            {
                **setting(each.group),
                "against": each.baseline.method if each.baseline else UNTRAINED,
                "judge": each.judge,
                "part": each.part,
                "questions": each.questions,
                "verdicts": sum(each.counts.values()),
                **{
                    name: value
                    for outcome in OUTCOMES
                    for name, value in (
                        (f"{outcome} count", each.counts[outcome]),
                        (outcome, each.rate(outcome)),
                        *bounds(outcome, each.interval(outcome)).items(),
                    )
                },
                "p": each.p,
                "p (Holm)": each.p_holm,
            }
            for each in rates
        ),
    )


def _row(rates: WinRates, look: Look, several: bool) -> Row:
    """A part's row leaves out what the row of the whole group says."""
    whole = rates.part == ALL
    against = look.labels[rates.baseline.variant] if rates.baseline else UNTRAINED
    method, *others = shown_setting(rates.group, look)
    named = (f"{method}\nagainst {against}", *others) if whole else ("",) * 3
    shown = [
        *named,
        *([rates.part] if several else []),
        f"{rates.questions:,}",
        *(with_interval(percent(rates.rate(each)), percent_interval(rates.interval(each))) for each in OUTCOMES),
        f"{rates.p:.2g}",
    ]
    if rates.p_holm is None:
        return Row((*map(Entry, shown), Entry("")))
    corrected = Entry(f"{rates.p_holm:.2g}", STRONG if rates.p_holm < SIGNIFICANT else "")
    return Row((*map(Entry, shown), corrected))


def is_against(group: Group, baseline: Group) -> bool:
    """Whether the cells of a group were judged against those of the other."""
    names = {cell.name for cell in baseline.cells}
    judged = [cell.judged["b"] for cell in group.cells if cell.judged and cell.outcomes]
    return bool(judged) and names.issuperset(judged)


def outcomes_of(cells: Sequence[Result]) -> list[dict[str, Any]]:
    return [row for cell in cells for row in cell.outcomes]
