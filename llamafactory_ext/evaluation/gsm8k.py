"""Score a model on GSM8K: generate answers, extract numbers, and report accuracy with confidence intervals.

llamafactory-ext eval gsm8k --model /path/to/model --data openai/gsm8k --output runs/dpo

llamafactory-ext eval gsm8k --model /base --adapter dpo=/lora/dpo --adapter minor=/lora/minor --data test.jsonl ...

llamafactory-ext eval gsm8k --engine openai --base-url http://127.0.0.1:8000/v1 --model NAME --data test.jsonl ...

llamafactory-ext eval gsm8k --model /path/to/qwen3 --chat-template-kwargs '{"enable_thinking": false}' ...

llamafactory-ext eval gsm8k --score-only --data test.jsonl --output runs/dpo

Each answer is saved as it arrives. If it is interrupted, even by kill -9, rerun the same command to resume.

vLLM needs an environment of its own without LLaMA-Factory (`make eval-env`): there, run `python evaluation/gsm8k.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..errors import UserError
from ..whole_files import write_whole
from .asking import ask_models, print_left_out, print_refused
from .degeneration import is_degenerate
from .extraction import extract_answer, read_answer
from .generations import MANIFEST, Generation, Run
from .options import Options, with_options, written_to
from .questions import Question, load_prompt, load_questions, messages
from .scoring import about_problems, score_run

__all__ = ["extract_answer", "is_degenerate"]

LEGEND = (
    "strict: after the last `the answer is` or `####`; prompt: after `So the answer is:`; flex.: the last number; "
    "confl.: first and last answer differ; degen.: empty, looping or repetitive; cut: at the token limit; "
    "miss.: no answer, counts as wrong"
)


Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    data: Annotated[str, Opt(help="A jsonl or parquet file with question and answer (`#### N`), or openai/gsm8k.")],
    output: Annotated[Path, written_to("Folder for the answers and scores; one sub-folder per model or adapter.")],
    split: Annotated[str, Opt(help="Split of a Hub data set.")] = "test",
    prompt: Annotated[str, Opt(help="paper (MinorDPO's), plain, or a file that contains {question}.")] = "paper",
    score_only: Annotated[bool, Opt("--score-only", help="Only score saved answers; needs no model.")] = False,
    *,
    options: Options,
) -> None:
    questions, data_hash = load_questions(data, split, options.limit)
    if score_only:
        runs = _recorded_runs(output, data, data_hash, len(questions))
    else:
        template = load_prompt(prompt)
        about = about_problems(data, questions, template)
        chats = [messages(question, template, options.system) for question in questions]
        gold = {question.index: question.gold for question in questions}
        runs = [output / name for name in ask_models(options, chats, about, output, _running_accuracy(gold))]
    _score(runs, questions, output)


def _running_accuracy(gold: dict[int, Decimal]) -> Callable[[str, Generation], str]:
    """The text beside the progress bar: the strict accuracy so far."""
    right: list[bool] = []

    def watch(run: str, generation: Generation) -> str:
        right.append(read_answer(generation.text, "strict").answer == gold[generation.index])
        return f"strict {sum(right) / len(right):.1%}"

    return watch


# --- scoring ---------------------------------------------------------------------------------------------------------


def _recorded_runs(output: Path, data: str, data_hash: str, count: int) -> list[Path]:
    """The folders of the runs in an output.

    Raises:
        UserError: if there is none, or one was asked other problems.
    """
    runs = sorted(path.parent for path in output.glob(f"*/{MANIFEST}"))
    if not runs:
        raise UserError(f"{output} contains no runs: name the --output of an earlier run.")
    for folder in runs:
        asked = Run(folder).manifest().get("data")
        if not isinstance(asked, dict):
            raise UserError(f"{folder / MANIFEST} does not record the problems: score another --output.")
        if asked.get("sha256") != data_hash:
            raise UserError(
                f"{folder} has answers to {asked.get('problems')} problems of {asked.get('source')}, not to the "
                f"{count} problems of {data}: write the --data and --limit of that run."
            )
    return runs


def _score(runs: list[Path], questions: list[Question], output: Path) -> None:
    """Score each run, write results.json into its folder, and print one table of all runs."""
    summaries, answers = {}, {}
    for folder in runs:
        run = Run(folder)
        answers[folder] = run.read()
        run.refuse_others(answers[folder], len(questions))
        result = score_run(questions, answers[folder])
        write_whole(folder / "results.json", json.dumps(result, indent=1))
        summaries[folder.name] = result["summary"]
    write_whole(output / "results.json", json.dumps(summaries, indent=2))
    _print_summary(summaries)
    for folder in runs:
        print_refused(folder, answers[folder].values())
        print_left_out(folder, answers[folder].values())
    print(f"\nScores: {output / 'results.json'}; each answer: {output}/*/results.json")


def _print_summary(summaries: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    problems = next(iter(summaries.values()))["problems"]
    table = Table(
        title=f"{problems} problems, accuracy with Wilson's 95% interval",
        caption=LEGEND,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("run", "strict", "95%", "prompt", "flex.", "confl.", "degen.", "cut", "miss."):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name, summary in summaries.items():
        low, high = summary["strict"]["wilson_95"]
        signs = summary["degeneration"]
        table.add_row(
            name,
            f"{summary['strict']['accuracy']:.1%}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{summary['strict_prompt']['accuracy']:.1%}",
            f"{summary['flexible']['accuracy']:.1%}",
            str(summary["strict"]["conflicts"]),
            f"{signs['degenerate']:.1%}",
            f"{signs['cut_off']:.1%}",
            str(summary["missing"]),
        )
    Console().print(table)
