"""Compare runs of `eval gsm8k` problem by problem, or runs of `eval harness` example by example.

llamafactory-ext eval compare runs/study/dpo runs/study/dpop runs/study/minor_dpo

llamafactory-ext eval compare runs/whole/dpo runs/first100/dpop --shared

llamafactory-ext eval compare runs/benchmarks/dpo/base runs/benchmarks/minor_dpo/base

The first run is compared with each other run by McNemar's exact test; with several, p-values are corrected by Holm's
method. Runs must have been asked the same problems; with --shared, they are compared on the problems that all of them
were asked. A problem without an answer counts as wrong.

Runs of `eval harness` are compared in each task that both have: by McNemar's exact test where examples count 0 or 1,
otherwise by a sign-flip test; Holm's method is over all tasks and runs. A task that was not the same is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..errors import UserError
from ..whole_files import write_whole
from .extraction import TIERS, Tier
from .generations import GENERATIONS, run_folder
from .harness_results import compare_tasks, is_of_harness, read_harness, with_holm
from .options import written_to

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Scored:
    """A run as `eval gsm8k` scored it.

    Args:
        extractor: version of the answer extractor.
        problems: index -> id of the problem.
        correct: index -> whether the answer is correct.
        missing: the indices of problems without an answer.
    """

    extractor: str
    problems: Mapping[int, str]
    correct: Mapping[int, bool]
    missing: Set[int] = frozenset()


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; the first is the baseline.")],
    tier: Annotated[str, typer.Option(help="gsm8k: strict_prompt, strict or flexible.")] = "strict",
    shared: Annotated[
        bool, typer.Option("--shared", help="gsm8k: compare only the problems that all runs were asked.")
    ] = False,
    output: Annotated[
        Path | None,
        written_to("Also write the comparison to this JSON file."),
    ] = None,
) -> None:
    if len(runs) < 2:
        raise UserError("Name at least two runs to compare.")
    if tier not in TIERS:
        raise UserError(f"--tier {tier} is unknown: write one of {', '.join(TIERS)}.")
    folders = [run_folder(folder, "results.json") for folder in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("A run is named twice: name each run once.")
    if any(map(is_of_harness, folders)):
        if shared or tier != "strict":
            raise UserError("--tier and --shared are for runs of `eval gsm8k`: leave them out for `eval harness`.")
        by_task = compare_benchmarks(folders)
        if output:
            write_whole(output, json.dumps(by_task, indent=2))
        _print_benchmarks(by_task)
        return
    loaded = {str(folder): load_scored(folder, tier) for folder in folders}
    comparisons = compare(loaded, shared)
    if output:
        write_whole(output, json.dumps(comparisons, indent=2))
    _print(comparisons, loaded, tier)


def load_scored(folder: Path, tier: Tier | str) -> Scored:
    """A run's results in a tier.

    Raises:
        UserError: if the folder is not that of a scored run.
    """
    file = folder / "results.json"
    if not file.is_file() and (folder / GENERATIONS).is_file():
        raise UserError(f"{folder} is not scored yet: run its `eval gsm8k` command again to resume.")
    if not file.is_file():
        raise UserError(f"{folder} has no results.json: name the folder of one run, such as runs/study/base.")
    again = "score the run again with `eval gsm8k --score-only`"
    try:
        result = json.loads(file.read_bytes())
        rows = result.get("rows")
        if not rows:
            raise UserError(f"{file} is not of a single run: name a run's own folder, such as runs/study/base.")
        if "problem" not in rows[0]:
            raise UserError(f"{file} does not record the problems: {again}.")
        return Scored(
            extractor=result["extractor"],
            problems={row["index"]: row["problem"] for row in rows},
            correct={row["index"]: row[tier]["correct"] is True for row in rows},
            missing={row["index"] for row in rows if row["missing"]},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}): {again}.") from error


def compare(runs: Mapping[str, Scored], shared: bool = False) -> list[dict[str, Any]]:
    """The first run against each other run: McNemar's exact test on the discordant problems, p-values also by Holm.

    Args:
        runs: by name.
        shared: whether to compare only the problems that all runs were asked; otherwise these must be all problems.

    Raises:
        UserError: if the runs were not asked the same problems, or were scored with different extractor versions.
    """
    from statsmodels.stats.multitest import multipletests

    problems = comparable_problems(runs, shared)
    baseline, *others = runs
    rows = [_pair(baseline, other, runs, problems) for other in others]
    corrected = multipletests([row["p"] for row in rows], method="holm")[1]
    return [{**row, "p_holm": float(p)} for row, p in zip(rows, corrected, strict=True)]


def comparable_problems(runs: Mapping[str, Scored], shared: bool) -> list[int]:
    """The indices of the problems to compare: all, or with `shared` those that all runs were asked.

    Raises:
        UserError: as `compare` does.
    """
    for (first, a), (second, b) in combinations(runs.items(), 2):
        if a.extractor != b.extractor:
            raise UserError(
                f"{first} and {second} were scored with versions {a.extractor} and {b.extractor} of the answer "
                "extractor: score both again with `eval gsm8k --score-only`."
            )
        both = a.problems.keys() & b.problems.keys()
        other = [index for index in sorted(both) if a.problems[index] != b.problems[index]]
        if other:
            raise UserError(
                f"{first} and {second} were asked different problems, from number {other[0] + 1} on: compare runs on "
                "the same data."
            )
        if not shared and a.problems.keys() != b.problems.keys():
            raise UserError(
                f"{first} was asked {len(a.problems)} problems and {second} {len(b.problems)}, with {len(both)} in "
                "common: add --shared to compare the runs on those."
            )
    indices = sorted(_of_all(runs))
    if not indices:
        raise UserError(f"{' and '.join(runs)} have no problem in common: compare runs on the same data.")
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
    caption = "p: McNemar's exact test on the problems that only one of the two solved; Holm: p corrected over all runs"
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


# --- eval harness ----------------------------------------------------------------------------------------------------


def compare_benchmarks(folders: list[Path]) -> list[dict[str, Any]]:
    """The first run of `eval harness` against each other one, a row per task; p-values by Holm's method over all rows.

    Raises:
        UserError: as `read_harness` and `compare_tasks` do.
    """
    baseline, *others = map(read_harness, folders)
    found = [
        (folder, task, comparison)
        for folder, other in zip(folders[1:], others, strict=True)
        for task, comparison in compare_tasks(baseline, other).items()
    ]
    corrected = with_holm([comparison for _, _, comparison in found])
    return [
        {"baseline_run": str(folders[0]), "run": str(folder), "task": task, **asdict(comparison)}
        for (folder, task, _), comparison in zip(found, corrected, strict=True)
    ]


def _print_benchmarks(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    caption = (
        "95%: Student's interval of the difference; p: McNemar's exact test, or a sign-flip test where examples do not "
        "count 0 or 1; Holm: p corrected over all rows"
    )
    title = f"baseline {escape(rows[0]['baseline_run'])}"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("run", "task", "value", "diff.", "95%", "better", "worse", "p", "Holm"):
        table.add_column(column, justify="left" if column in ("run", "task") else "right", overflow="fold")
    for row in rows:
        interval = row["interval"]
        table.add_row(
            escape(row["run"]),
            escape(row["task"]),
            f"{row['value']:.3f}",
            f"{row['difference']:+.3f}",
            "" if interval is None else "{:+.3f} {:+.3f}".format(*interval),
            str(row["better"]),
            str(row["worse"]),
            f"{row['p']:.3g}",
            f"{row['p_holm']:.3g}",
        )
    Console().print(table)
