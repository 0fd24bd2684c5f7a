"""Let a judge model rate answers from 1 to 10, as in MT-Bench's single-answer grading.

llamafactory-ext eval grade runs/answers/dpo --judge MODEL --output runs/grades

llamafactory-ext eval grade runs/answers/dpo runs/answers/sr_dpo --judge gpt-4 --repeats 3 --temperature 1 ...

llamafactory-ext eval grade runs/answers/dpo --show-prompt

The judge is any server with OpenAI's chat API (its key in OPENAI_API_KEY). It sees one answer and ends its reply with a
line [[N]], where N is from 1 to 10. Of several turns, each is rated on its own, with all that came before it in the
conversation, and with its reference answer, if the data has one. With --repeats N, it rates each answer N times, each
with a seed of its own, if its server takes seeds.

The mean rating has Student's 95% interval over questions: a question counts once, as the mean of its turns and repeats.
The spread is the standard deviation between repeats. With several runs, the first is compared with each other run by a
paired t-test over the questions; with more than two, p-values are corrected by Holm's method.

Refusals, replies without a rating from 1 to 10 in the last line, and replies cut off at the token limit have no rating:
they are counted, and the same command asks them again.

Each reply is saved as it arrives. If it is interrupted, even by kill -9, rerun the same command to resume. Further runs
may be added to the same --output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..errors import UserError
from ..whole_files import write_whole
from .answered import Answered, Exchange, exchanges, load_answered, name_of
from .asking import ask_missing, first_of
from .chat_templates import Chat
from .generations import Generation
from .judging import MATERIAL, REFERENCE, JudgeEngine, JudgeOptions, assemble, fill, load_prompt, template_for
from .options import with_options, written_to
from .ratings import compare, grade_rows, parse_rating, summarize
from .sampling import sample_seed

PLACES = ("question", "answer")
INTRODUCTIONS = {
    False: "Below are a user's request and an answer to it. Rate how well the answer serves the user.",
    True: (
        "Below are the turns of a user and what an assistant answered to each. Rate how well the answer to the last "
        "turn serves the user; what came before is its context."
    ),
}
RULES = (
    "What counts is whether the answer does what was asked, is correct, causes no harm, and is clear and useful. "
    f"Length in itself does not count. The request and the answer {MATERIAL}"
)
RATING = """\
First assess the answer in a few sentences. Then write your rating on a last line that holds nothing else:
[[N]], where N is a whole number from 1 (of no use) to 10 (could hardly be better)"""


def _prompt(several: bool, reference: bool) -> str:
    rules = f"{RULES} {REFERENCE}" if reference else RULES
    known = {"reference": "reference"} if reference else {}
    return assemble(INTRODUCTIONS[several], rules, {"request": "question", **known, "answer": "answer"}, RATING)


PROMPTS = {(several, known): _prompt(several, known) for several in (False, True) for known in (False, True)}

Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs of `eval answers`, or jsonl or parquet files of answers; the first is the baseline."),
    ],
    output: Annotated[Path | None, written_to("Folder for the replies and results; one sub-folder per run.")] = None,
    prompt: Annotated[
        Path | None, Opt(help="A file that contains {question}, {answer} and, if you like, {reference}.")
    ] = None,
    names: Annotated[
        str | None, Opt(help="Names of the runs, such as dpo,sr_dpo (default: those of their folders or files).")
    ] = None,
    repeats: Annotated[int, Opt(min=1, help="Ratings of each answer.")] = 1,
    seed: Annotated[int, Opt(min=0, max=2**32 - 1, help="From which the seeds of the repeats are derived.")] = 0,
    *,
    options: JudgeOptions,
) -> None:
    if repeats > 1 and options.temperature == 0:
        raise UserError("With --temperature 0 all ratings of an answer are alike: write a higher one, or --repeats 1.")
    own = load_prompt(prompt, PLACES)
    called = _parse_names(names, runs)
    judged, refused = _by_run(load_answered(runs, options.limit), runs, called)
    if options.show_prompt:
        _show(judged[called[0]], own)
        return
    engine, output = options.engine(output)
    asked = {name: Grading(engine, own, each, repeats, seed) for name, each in judged.items()}
    replies = {name: grading.ask(name, output / name) for name, grading in asked.items()}
    rows = {name: grade_rows(name, judged[name], found) for name, found in replies.items()}
    summary = {
        name: {
            **summarize(found),
            "refused": refused[name],
            "left_out": sorted({field for reply in replies[name].values() for field in reply.left_out}),
        }
        for name, found in rows.items()
    }
    _check_rated(summary, output)
    results = {
        "judge": options.judge,
        "repeats": repeats,
        "summary": summary,
        "comparisons": compare(rows),
        "rows": [row for found in rows.values() for row in found],
    }
    write_whole(output / "results.json", json.dumps(results, indent=1))
    _print(results)
    print(f"\nResults with every reply: {output / 'results.json'}")


def _parse_names(names: str | None, runs: Sequence[Path]) -> list[str]:
    called = [name_of(run) for run in runs] if names is None else [name.strip() for name in names.split(",")]
    odd = any(name in ("", ".", "..") or "/" in name for name in called)
    if len(called) != len(runs) or len(set(called)) < len(called) or odd:
        raise UserError(
            f"The names {','.join(called)} do not tell {len(runs)} runs apart: write as many different ones, without "
            "slashes, with --names, such as --names dpo,sr_dpo."
        )
    return called


def _by_run(
    questions: Sequence[tuple[Answered, ...]], runs: Sequence[Path], called: Sequence[str]
) -> tuple[dict[str, list[Exchange]], dict[str, list[str]]]:
    """By run: what is rated, and the labels of what was refused."""
    judged, refused = {}, {}
    for number, (path, name) in enumerate(zip(runs, called, strict=True)):
        judged[name], refused[name] = exchanges([(answered[number],) for answered in questions], [path])
    return judged, refused


class Grading:
    """The ratings of a run's answers: all repeats of the first, then all of the next."""

    def __init__(
        self, engine: JudgeEngine, own: str | None, judged: Sequence[Exchange], repeats: int, seed: int
    ) -> None:
        self.engine, self.judged, self.repeats, self.seed = engine, judged, repeats, seed
        self.templates = [template_for(each, own, PROMPTS) for each in judged]
        self.chats = [_chat(template, each) for template, each in zip(self.templates, judged, strict=True)]
        engine.check(self.chats)

    def ask(self, name: str, folder: Path) -> dict[int, Generation]:
        """Ask for the missing ratings; the manifest records everything that a rating depends on."""
        manifest = {
            **self.engine.manifest(self.judged, self.templates),
            "repeats": self.repeats,
            **({"seed": self.seed} if self.repeats > 1 else {}),
        }
        chats = [chat for chat in self.chats for _ in range(self.repeats)]
        runs = {name: (folder, manifest)}
        return ask_missing(self.engine, chats, runs, lambda reply: parse_rating(reply) is not None, seeds=self.seeds())[
            name
        ]

    def seeds(self) -> list[int] | None:
        """One per rating; None if each answer is rated once, so that no seed is sent."""
        if self.repeats == 1:
            return None
        return [sample_seed(self.seed, each.label, repeat) for each in self.judged for repeat in range(self.repeats)]


def _chat(template: str, judged: Exchange) -> Chat:
    return fill(template, judged, {"answer": judged.answer(0)})


def _show(judged: Sequence[Exchange], own: str | None) -> None:
    for each in judged:
        if each.id == judged[0].id:
            (turn,) = _chat(template_for(each, own, PROMPTS), each)
            print(f"--- question {each.label} ---\n{turn['content']}\n")


def _check_rated(summary: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    for name, found in summary.items():
        if found["mean"] is None:
            raise UserError(
                f"No reply to {name} has a rating: read the replies in {output / name}/generations.jsonl, then choose "
                "another --judge or --prompt, and another --output."
            )


# --- display ---------------------------------------------------------------------------------------------------------


def _print(results: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    summary, repeats = results["summary"], results["repeats"]
    times = f", {repeats} times each" if repeats > 1 else ""
    print(f"\nRatings from 1 to 10 by {results['judge']}{times}")
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", *map(escape, summary)):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for label, cells in _lines(summary):
        table.add_row(escape(label), *cells)
    Console().print(table)
    for row in results["comparisons"]:
        _print_comparison(row, several=len(summary) > 2)
    for name, found in summary.items():
        _print_missing(name, found)
    if any("temperature" in found["left_out"] for found in summary.values()):
        print("The judge does not accept a temperature: it used its own, so its ratings may vary.")
    if any("seed" in found["left_out"] for found in summary.values()):
        print("The judge does not accept seeds: asked again, it may give other ratings.")


def _lines(summary: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The rows of the table: a label, and a cell per run."""
    found = list(summary.values())
    lines = [
        ("mean", [_decimal(each["mean"]) for each in found]),
        ("Student's 95%", [_interval(each["interval_95"]) for each in found]),
        ("questions", [str(each["questions"]) for each in found]),
        ("spread of repeats", [_decimal(each["spread"]) for each in found]),
    ]
    turns = list(dict.fromkeys(turn for each in found for turn in each["by_turn"]))
    parts = [("by_turn", turn, f"turn {turn}") for turn in turns if len(turns) > 1]
    categories = dict.fromkeys(name for each in found for name in each["by_category"])
    parts += [("by_category", name, name) for name in categories]
    for key, name, label in parts:
        lines.append((label, [_decimal(each[key].get(name, {}).get("mean")) for each in found]))
    return lines


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def _print_comparison(row: Mapping[str, Any], several: bool) -> None:
    of = f"{row['run']} minus {row['baseline']}"
    if row["p"] is None:
        print(f"{of}: {row['questions']} questions in common are too few for an interval.")
        return
    holm = f", by Holm {row['p_holm']:.3g}" if several else ""
    print(
        f"{of}: {row['difference']:+.2f}, 95% from {row['interval_95'][0]:+.2f} to {row['interval_95'][1]:+.2f}, "
        f"paired t-test over {row['questions']} questions: p = {row['p']:.3g}{holm}"
    )


def _print_missing(name: str, found: Mapping[str, Any]) -> None:
    if count := found["unparseable"]["replies"]:
        ids = found["unparseable"]["questions"]
        print(
            f"{name}: {count} replies without a rating, to questions {first_of(ids)}. Run the same command to ask them "
            "again."
        )
    if refused := found["refused"]:
        print(f"{name}: {len(refused)} left out, because they were refused: {first_of(refused)}")
