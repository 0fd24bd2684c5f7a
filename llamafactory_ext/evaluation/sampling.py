"""Sample several answers per problem, and read each: for pass rates, and for pairs of the model's own answers.

llamafactory-ext eval sample --model /path/to/model --data gsm8k/train.jsonl --output runs/samples --samples 8

llamafactory-ext eval sample --engine openai --base-url http://127.0.0.1:8000/v1 --model NAME --data train.jsonl ...

llamafactory-ext data from-samples runs/samples --output data/self_pairs.jsonl

The samples of a run are in OUTPUT/base/generations.jsonl or OUTPUT/ADAPTER/generations.jsonl: one per line, with the
question, the number that was read, and whether it is right.

Each sample is saved as it arrives. If it is interrupted, even by kill -9, rerun the same command to resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import hashes
from ..commandline import Command
from ..errors import UserError
from ..whole_files import write_whole
from .asking import ask_missing, is_answered, plan_runs, print_left_out, print_refused
from .chat_templates import Chat
from .degeneration import inspect_output
from .extraction import read_answer
from .generations import Generation
from .options import Options, with_options, written_to
from .questions import Question, load_prompt, load_questions, messages
from .scoring import about_problems, pass_rates

PASS_RATES = "pass_rates.json"
# What `pass_rates` returns -> how it is called in the table.
SHARES = {
    "solved": "problems solved at least once",
    "all_right": "problems with right samples only",
    "all_wrong": "problems with wrong samples only",
    "unread": "samples without a readable answer",
    "degenerate": "samples that are empty, loop or repeat",
    "cut_off": "samples cut off at the token limit",
}

Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class SampleOptions(Options):
    """As for other commands, but sampled by default."""

    temperature: Annotated[float, Opt(min=0, help="0: greedy, so that all samples are alike.")] = 1.0


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    data: Annotated[str, Opt(help="A jsonl or parquet file with question and answer (`#### N`), or openai/gsm8k.")],
    output: Annotated[Path, written_to("Folder for the samples; one sub-folder per model or adapter.")],
    samples: Annotated[int, Opt(min=1, help="Samples per problem.")] = 8,
    split: Annotated[str, Opt(help="Split of a Hub data set.")] = "train",
    prompt: Annotated[str, Opt(help="paper (MinorDPO's), plain, or a file that contains {question}.")] = "paper",
    *,
    options: SampleOptions,
) -> None:
    if samples > 1 and options.temperature == 0:
        raise UserError("With --temperature 0 all samples of a problem are alike: write a higher one, or --samples 1.")
    questions, _ = load_questions(data, split, options.limit)
    template = load_prompt(prompt)
    about = {**about_problems(data, questions, template), "samples": samples}
    chats = [messages(question, template, options.system) for question in questions]
    engine, runs = plan_runs(options, chats, about, output)
    plan = Plan(questions, chats, samples, options.seed)
    verdicts = Verdicts(plan, {name: hashes.of_value(manifest)[:16] for name, (_, manifest) in runs.items()})
    replies = ask_missing(engine, plan.asked, runs, watch=verdicts.watch, seeds=plan.seeds, columns=verdicts.columns)
    _summarize(replies, verdicts, output)


# --- samples ---------------------------------------------------------------------------------------------------------


class Plan:
    """Which samples are asked: all of the first problem, then all of the next.

    Args:
        questions: the problems.
        chats: of the problems, in their order.
        samples: per problem.
        seed: of the run.
    """

    def __init__(self, questions: list[Question], chats: list[Chat], samples: int, seed: int) -> None:
        self.questions, self.samples = questions, samples
        self.asked = [chat for chat in chats for _ in range(samples)]
        self.seeds = [sample_seed(seed, question.id, n) for question in questions for n in range(samples)]

    def place(self, index: int) -> tuple[Question, int]:
        """The problem of a sample, and its number among those of the problem, from 0."""
        return self.questions[index // self.samples], index % self.samples


class Verdicts:
    """What is saved beside each sample: what was asked, the number that the tier `strict` reads, whether it is right.

    Args:
        plan: of the samples.
        fingerprints: run -> what tells its samples from those of other runs.
    """

    def __init__(self, plan: Plan, fingerprints: Mapping[str, str]) -> None:
        self.plan, self.fingerprints = plan, fingerprints
        self.rows: dict[str, dict[int, dict[str, Any]]] = {run: {} for run in fingerprints}
        self.right = self.watched = 0

    def columns(self, run: str, reply: Generation) -> dict[str, Any]:
        """The columns of a new reply."""
        (question, sample), turns = self.plan.place(reply.index), self.plan.asked[reply.index]
        number = read_answer(reply.text, "strict").answer
        row = {
            "problem": question.id,
            "sample": sample,
            "seed": self.plan.seeds[reply.index],
            **({"system": turns[0]["content"]} if len(turns) > 1 else {}),
            "instruction": turns[-1]["content"],
            "gold": str(question.gold),
            "answer": None if number is None else str(number),
            "correct": number == question.gold,
            "degenerate": inspect_output(reply.text, reply.token_ids).degenerate,
            "run": self.fingerprints[run],
        }
        self.rows[run][reply.index] = {**row, "finish_reason": reply.finish_reason}
        return row

    def watch(self, run: str, reply: Generation) -> str:
        """The text beside the progress bar: the share of right samples so far."""
        if reply.index not in self.rows[run]:
            self.columns(run, reply)
        self.watched += 1
        self.right += self.rows[run][reply.index]["correct"]
        return f"pass@1 {self.right / self.watched:.1%}"

    def rates(self, run: str, replies: Mapping[int, Generation]) -> dict[str, Any]:
        """The pass rates of a run; samples that the server refused do not count."""
        return pass_rates(self.rows[run][index] for index, reply in replies.items() if is_answered(reply))


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one sample, below 2**32; it does not depend on the other problems."""
    return int.from_bytes(hashlib.sha256(f"{seed} {problem} {sample}".encode()).digest()[:4])


# --- pass rates ------------------------------------------------------------------------------------------------------


def _summarize(replies: Mapping[str, Mapping[int, Generation]], verdicts: Verdicts, output: Path) -> None:
    """Write the pass rates of each run into its folder and those of all above it, and print them as a table."""
    rates = {name: verdicts.rates(name, found) for name, found in replies.items()}
    for name, of_run in rates.items():
        write_whole(output / name / PASS_RATES, json.dumps(of_run, indent=1))
    write_whole(output / PASS_RATES, json.dumps(rates, indent=1))
    print_pass_rates(rates)
    places = list(map(verdicts.plan.place, range(len(verdicts.plan.asked))))
    for name, found in replies.items():
        ids = [f"{question.index + 1} (sample {sample + 1})" for question, sample in places]
        print_refused(output / name, found.values(), ids, "samples")
        print_left_out(output / name, found.values())
    print(f"\nPass rates: {output / PASS_RATES}; each sample: {output}/*/generations.jsonl")


def print_pass_rates(rates: Mapping[str, Mapping[str, Any]]) -> None:
    """Print pass rates as a table, with a column per run."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in rates:
        table.add_column(escape(name), justify="right")
    for key in ("problems", "samples"):
        table.add_row(key, *(f"{found[key]:,}" for found in rates.values()))
    table.add_row("pass@1: samples that are right", *(f"{found['pass@1']:.1%}" for found in rates.values()))
    intervals = (found["wilson_95"] for found in rates.values())
    table.add_row("its 95% interval", *(f"{100 * low:.1f}-{100 * high:.1f}%" for low, high in intervals))
    for key, words in SHARES.items():
        table.add_row(words, *(f"{found[key]:.1%}" for found in rates.values()))
    Console().print(table)
