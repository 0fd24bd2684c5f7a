"""Compare runs of gsm8k.py problem by problem.

    python evaluation/compare.py runs/study/dpo runs/study/dpop runs/study/minor_dpo

The first run is compared with each of the others by McNemar's exact test, corrected by Holm's method where there are
several. A problem that a run has not answered counts as wrong there.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from extraction import Tier
from questions import UserError
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from whole_files import write_whole

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.replace("\n    python", "\n\n    python"), no_args_is_help=True)
def main(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders with a results.json of gsm8k.py; the first is the baseline.")
    ],
    tier: Annotated[str, typer.Option(help="strict_prompt, strict or flexible.")] = "strict",
    output: Annotated[Path | None, typer.Option(help="Also write the comparison to this json file.")] = None,
) -> None:
    try:
        if len(runs) < 2:
            raise UserError("Name at least two runs to compare.")
        loaded = {str(folder): load_correct(folder, tier) for folder in runs}
        comparisons = compare(loaded)
    except UserError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    _print(comparisons, tier)
    if output:
        write_whole(output, json.dumps(comparisons, indent=2))


def load_correct(folder: Path, tier: Tier | str) -> dict[str, dict[int, bool]]:
    """Which problems a run has right: gold answers (to recognise the same problems) and verdicts by index.

    Raises:
        UserError: if the folder holds no scored run.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no results.json: name the folder of one run, such as runs/study/base.")
    rows = json.loads(file.read_text(encoding="utf-8")).get("rows")
    if rows is None or (rows and tier not in rows[0]):
        raise UserError(f"{file} is not the score of one run in the tier {tier}: name a run's own folder.")
    return {
        "gold": {row["index"]: row["gold"] for row in rows},
        "correct": {r["index"]: r[tier]["correct"] for r in rows},
    }


def compare(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The first run against each other one: McNemar's exact test on the discordant problems, p-values by Holm.

    Raises:
        UserError: if two runs disagree on the gold answer of a problem.
    """
    for (first, a), (second, b) in pairwise(runs.items()):
        shared = a["gold"].keys() & b["gold"].keys()
        if any(a["gold"][index] != b["gold"][index] for index in shared):
            raise UserError(f"{first} and {second} were asked different problems: compare runs on the same data.")

    baseline, *others = runs
    problems = sorted(set().union(*(run["gold"] for run in runs.values())))
    rows = [_pair(baseline, other, runs, problems) for other in others]
    corrected = multipletests([row["p"] for row in rows], method="holm")[1]
    return [{**row, "p_holm": float(p)} for row, p in zip(rows, corrected, strict=True)]


def _pair(first: str, second: str, runs: dict[str, dict[str, Any]], problems: list[int]) -> dict[str, Any]:
    a, b = (runs[name]["correct"] for name in (first, second))
    table = [[0, 0], [0, 0]]
    for index in problems:
        table[not a.get(index, False)][not b.get(index, False)] += 1
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


def _print(comparisons: list[dict[str, Any]], tier: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first = comparisons[0]
    title = f"{tier}, {first['problems']} problems, baseline {first['baseline']}: {first['baseline_accuracy']:.1%}"
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
        table.add_row(row["run"], *shares, *counts, f"{row['p']:.3g}", f"{row['p_holm']:.3g}")
    Console().print(table)


if __name__ == "__main__":
    app()
