"""Compare runs of gsm8k.py problem by problem.

llamafactory-ext eval compare runs/study/dpo runs/study/dpop runs/study/minor_dpo

llamafactory-ext eval compare runs/whole/dpo runs/first100/dpop --shared

The first run is compared with each of the others by McNemar's exact test, corrected by Holm's method where there are
several. Runs that were asked different problems are refused; with --shared, they are compared on the problems that all
of them were asked. A problem that a run has not answered counts as wrong there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..errors import UserError
from ..whole_files import write_whole
from .extraction import TIERS, Tier
from .generations import GENERATIONS, run_folder
from .options import written_to

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Scored:
    """A run as gsm8k.py scored it.

    Args:
        extractor: the version that read its answers.
        problems: by index, the id of the problem that it was asked.
        correct: by index, whether it has the problem right.
        missing: the indices of the problems that it has no answer to.
    """

    extractor: str
    problems: Mapping[int, str]
    correct: Mapping[int, bool]
    missing: Set[int] = frozenset()


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
def main(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders with a results.json of gsm8k.py; the first is the baseline.")
    ],
    tier: Annotated[str, typer.Option(help="strict_prompt, strict or flexible.")] = "strict",
    shared: Annotated[bool, typer.Option("--shared", help="Only the problems that all runs were asked.")] = False,
    output: Annotated[
        Path | None,
        written_to("Also write the comparison to this json file."),
    ] = None,
) -> None:
    if len(runs) < 2:
        raise UserError("Name at least two runs to compare.")
    if tier not in TIERS:
        raise UserError(f"--tier {tier}: write {', '.join(TIERS)}.")
    folders = [run_folder(folder, "results.json") for folder in runs]
    loaded = {str(folder): load_scored(folder, tier) for folder in folders}
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("A run is named twice: name each once.")
    comparisons = compare(loaded, shared)
    if output:
        write_whole(output, json.dumps(comparisons, indent=2))
    _print(comparisons, loaded, tier)


def load_scored(folder: Path, tier: Tier | str) -> Scored:
    """A run's verdicts in a tier.

    Raises:
        UserError: if the folder holds no scored run.
    """
    file = folder / "results.json"
    if not file.is_file() and (folder / GENERATIONS).is_file():
        raise UserError(f"{folder} is not scored yet: run its gsm8k.py command again, which goes on.")
    if not file.is_file():
        raise UserError(f"{folder} holds no results.json: name the folder of one run, such as runs/study/base.")
    again = "score the run again with gsm8k.py --score-only"
    try:
        result = json.loads(file.read_bytes())
        rows = result.get("rows")
        if not rows:
            raise UserError(f"{file} is not the score of one run: name a run's own folder, such as runs/study/base.")
        if "problem" not in rows[0]:
            raise UserError(f"{file} does not say what was asked: {again}.")
        return Scored(
            extractor=result["extractor"],
            problems={row["index"]: row["problem"] for row in rows},
            correct={row["index"]: row[tier]["correct"] is True for row in rows},
            missing={row["index"] for row in rows if row["missing"]},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}): {again}.") from error


def compare(runs: Mapping[str, Scored], shared: bool = False) -> list[dict[str, Any]]:
    """The first run against each other one: McNemar's exact test on the discordant problems, p-values by Holm.

    Args:
        runs: by name.
        shared: whether to compare the problems that all runs were asked, where they were not asked the same.

    Raises:
        UserError: if the runs were not asked the same problems, or were read by different versions of the extractor.
    """
    from statsmodels.stats.multitest import multipletests

    problems = comparable_problems(runs, shared)
    baseline, *others = runs
    rows = [_pair(baseline, other, runs, problems) for other in others]
    corrected = multipletests([row["p"] for row in rows], method="holm")[1]
    return [{**row, "p_holm": float(p)} for row, p in zip(rows, corrected, strict=True)]


def comparable_problems(runs: Mapping[str, Scored], shared: bool) -> list[int]:
    """The indices of the problems that runs are compared on: all of them, or with `shared` those that all runs have.

    Raises:
        UserError: as `compare` does.
    """
    for (first, a), (second, b) in combinations(runs.items(), 2):
        if a.extractor != b.extractor:
            raise UserError(
                f"{first} and {second} were read by versions {a.extractor} and {b.extractor} of the extractor: score "
                "both again with gsm8k.py --score-only."
            )
        both = a.problems.keys() & b.problems.keys()
        other = [index for index in sorted(both) if a.problems[index] != b.problems[index]]
        if other:
            raise UserError(
                f"{first} and {second} were asked different problems, the first of them number {other[0] + 1}: compare "
                "runs on the same data."
            )
        if not shared and a.problems.keys() != b.problems.keys():
            raise UserError(
                f"{first} was asked {len(a.problems)} problems and {second} {len(b.problems)}, {len(both)} of them the "
                "same: write --shared to compare the runs on those."
            )
    indices = sorted(_of_all(runs))
    if not indices:
        raise UserError(f"{' and '.join(runs)} share no problem: compare runs on the same data.")
    return indices


def _of_all(runs: Mapping[str, Scored]) -> set[int]:
    return set.intersection(*(set(run.problems) for run in runs.values()))


def _pair(first: str, second: str, runs: Mapping[str, Scored], problems: list[int]) -> dict[str, Any]:
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = (runs[name].correct for name in (first, second))
    table = [[0, 0], [0, 0]]
    for index in problems:
        table[not a[index]][not b[index]] += 1
    (both, only_first), (only_second, neither) = table
    count = len(problems)
    return {
        "baseline": first,
        "run": second,
        "problems": count,
        "baseline_accuracy": (both + only_first) / count,
        "accuracy": (both + only_second) / count,
        "difference": (only_second - only_first) / count,
        "both": both,
        "only_baseline": only_first,
        "only_run": only_second,
        "neither": neither,
        "p": float(mcnemar(table, exact=True).pvalue),
    }


def _print(comparisons: list[dict[str, Any]], runs: Mapping[str, Scored], tier: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first, problems = comparisons[0], _of_all(runs)
    title = (
        f"{tier}, {first['problems']} problems, baseline {escape(first['baseline'])}: {first['baseline_accuracy']:.1%}"
    )
    caption = (
        "p: McNemar's exact test on the problems that only one of the two has right; Holm: corrected over all runs"
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for column in ("acc.", "diff.", "both", "base only", "run only", "neither", "p", "Holm"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparisons:
        counts = [str(row[key]) for key in ("both", "only_baseline", "only_run", "neither")]
        shares = [f"{row['accuracy']:.1%}", f"{row['difference']:+.1%}"]
        table.add_row(escape(row["run"]), *shares, *counts, f"{row['p']:.3g}", f"{row['p_holm']:.3g}")
    Console().print(table)
    for name, run in runs.items():
        if len(run.problems) > first["problems"]:
            print(f"{name}: {first['problems']} of its {len(run.problems)} problems are compared, those of all runs.")
        missing = len(run.missing & problems)
        if missing:
            print(f"{name}: {missing} of the {len(problems)} problems have no answer and count as wrong.")
