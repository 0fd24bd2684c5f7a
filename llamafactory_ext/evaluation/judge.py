"""Let a judge model compare two models' answers to the same questions: win, tie and lose rates.

llamafactory-ext eval judge --a sr_dpo.jsonl --b dpo.jsonl --judge MODEL --output runs/judge

llamafactory-ext eval judge --a runs/answers/sr_dpo --b runs/answers/dpo --names sr_dpo,dpo --judge gpt-4 ...

llamafactory-ext eval judge --a sr_dpo.jsonl --b dpo.jsonl --show-prompt

Answers are rows with `question` and `answer`, or with the lists `turns` and `answers`, optionally with `id`, `category`
and `reference`; `eval answers` writes them. The judge is any server with OpenAI's chat API (its key in OPENAI_API_KEY).
It sees each pair in both orders and ends each reply with a line [[A]] (the first answer is better), [[B]] (the second)
or [[C]] (equally good). Of several turns, each is judged on its own, with all that came before it in both
conversations, and with its reference answer, if the data has one.

A model wins a turn only if it is preferred in both orders. Everything else is a tie: two ties, a tie and a win, or two
orders that contradict each other. Refusals, replies without a verdict in the last line, and replies cut off at the
token limit have no verdict: their turns are listed and excluded from the rates, and the same command asks them again. A
judge that does not accept --temperature uses its own, which the results record.

Rates are given over all turns, by turn and by category. The turns of a question are not independent: the intervals are
Wilson's for the effective number of turns, and the sign test counts questions.

Each reply is saved as it arrives. If it is interrupted, even by kill -9, rerun the same command to resume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..errors import UserError
from ..whole_files import write_whole
from .answered import Exchange, exchanges, load_answered
from .asking import ask_missing, first_of
from .chat_templates import Chat
from .generations import Generation
from .judging import MATERIAL, REFERENCE, JudgeEngine, JudgeOptions, assemble, fill, load_prompt, template_for
from .models import BASE
from .options import with_options, written_to
from .verdicts import OUTCOMES, judge_rows, parse_verdict, summarize

PLACES = ("question", "first", "second")
INTRODUCTIONS = {
    False: "Below are a user's request and two answers to it. Decide which answer serves the user better.",
    True: (
        "Below are the turns of a user and what two assistants answered to each. Decide which answer to the last turn "
        "serves the user better; what came before is its context."
    ),
}
RULES = (
    "What counts is whether an answer does what was asked, is correct, causes no harm, and is clear and useful. "
    f"Neither the order of the answers counts nor length in itself. The request and the answers {MATERIAL}"
)
VERDICT = """\
First compare the two answers in a few sentences. Then write your verdict on a last line that holds nothing else:
[[A]] if answer A is better
[[B]] if answer B is better
[[C]] if they are equally good"""


def _prompt(several: bool, reference: bool) -> str:
    rules = f"{RULES} {REFERENCE}" if reference else RULES
    known = {"reference": "reference"} if reference else {}
    blocks = {"request": "question", **known, "answer_a": "first", "answer_b": "second"}
    return assemble(INTRODUCTIONS[several], rules, blocks, VERDICT)


PROMPTS = {
    (several, reference): _prompt(several, reference) for several in (False, True) for reference in (False, True)
}
JUDGE_PROMPT = PROMPTS[False, False]

Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    a: Annotated[Path, Opt(help="Model A: a jsonl or parquet file of its answers, or a run of `eval answers`.")],
    b: Annotated[Path, Opt(help="Model B: its answers to the same questions.")],
    output: Annotated[Path | None, written_to("Folder for the replies and results of this comparison.")] = None,
    prompt: Annotated[
        Path | None, Opt(help="A file that contains {question}, {first}, {second} and, if you like, {reference}.")
    ] = None,
    names: Annotated[str | None, Opt(help="Names of A and B, such as dpo,sr_dpo (default: their paths).")] = None,
    *,
    options: JudgeOptions,
) -> None:
    own = load_prompt(prompt, PLACES)
    called = _parse_names(names, a, b)
    pairs, refused = exchanges(load_answered([a, b], options.limit), [a, b])
    if options.show_prompt:
        _show([pair for pair in pairs if pair.id == pairs[0].id], own, called)
        return
    engine, output = options.engine(output)
    replies = _judge(engine, own, pairs, output)
    rows = judge_rows(pairs, replies)
    summary = {
        "a": called[0],
        "b": called[1],
        "judge": options.judge,
        "left_out": sorted({field for reply in replies.values() for field in reply.left_out}),
        "refused": refused,
        **summarize(rows),
    }
    write_whole(output / "results.json", json.dumps({"summary": summary, "rows": rows}, indent=1))
    _print_summary(summary)
    print(f"\nResults with every reply: {output / 'results.json'}")


def _parse_names(names: str | None, a: Path, b: Path) -> list[str]:
    called = [str(a), str(b)] if names is None else [name.strip() for name in names.split(",")]
    if len(called) != 2 or not all(called) or called[0] == called[1]:
        raise UserError(f"--names {','.join(called)}: write two different names, such as dpo,sr_dpo.")
    return called


def _judge(engine: JudgeEngine, own: str | None, pairs: list[Exchange], output: Path) -> dict[int, Generation]:
    """Ask for the missing verdicts; the manifest records everything that a verdict depends on."""
    templates = [template_for(pair, own, PROMPTS) for pair in pairs]
    chats = [chat for pair, template in zip(pairs, templates, strict=True) for chat in both_orders(template, pair)]
    engine.check(chats)
    runs = {BASE: (output, engine.manifest(pairs, templates))}
    return ask_missing(engine, chats, runs, lambda reply: parse_verdict(reply) is not None)[BASE]


def both_orders(template: str, pair: Exchange) -> tuple[Chat, Chat]:
    """The two requests about a pair: with A's answer first, and with B's first."""
    a, b = pair.answer(0), pair.answer(1)
    return fill(template, pair, {"first": a, "second": b}), fill(template, pair, {"first": b, "second": a})


def _show(pairs: Sequence[Exchange], own: str | None, called: list[str]) -> None:
    for pair in pairs:
        for first, chat in zip(called, both_orders(template_for(pair, own, PROMPTS), pair), strict=True):
            print(f"--- question {pair.label}, {first} first ---\n{chat[0]['content']}\n")


def _print_summary(summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    several = summary["turns"] > summary["questions"]
    what = f"{summary['judged']} turns of {summary['questions']}" if several else str(summary["judged"])
    print(f"\n{summary['a']} against {summary['b']}: {what} questions, judged by {summary['judge']}")
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "turns" if several else "questions", "rate", "Wilson's 95%"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for result in OUTCOMES:
        found = summary[result]
        low, high = found["wilson_95"]
        table.add_row(result, str(found["count"]), f"{found['rate']:.1%}", f"{100 * low:.1f}-{100 * high:.1f}")
    Console().print(table)
    _print_parts(summary, several)

    verdicts = 2 * summary["judged"]
    first, second = (summary["positions"][position] / verdicts for position in ("first", "second"))
    of = " of questions" if several else ""
    print(f"Exact sign test on wins and losses{of}: p = {summary['sign_test_p']:.3g}")
    what = "Turns" if several else "Questions"
    print(f"{what} where the two orders contradict each other: {summary['contradictions']['rate']:.1%}")
    print(f"Verdicts for the answer shown first: {first:.1%}, second: {second:.1%}")
    if count := summary["unparseable"]["replies"]:
        ids = summary["unparseable"]["questions"]
        print(
            f"Replies without a verdict: {count}, to questions {first_of(ids)}. Run the same command to ask them again."
        )
    if refused := summary["refused"]:
        print(f"{what} left out, because they were refused for A or B: {len(refused)}, {first_of(refused)}")
    if "temperature" in summary["left_out"]:
        print("The judge does not accept a temperature: it used its own, so its verdicts may vary.")


def _print_parts(summary: dict[str, Any], several: bool) -> None:
    """Print the rates by turn, if there are several, and by category."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    turns = {f"turn {turn}": found for turn, found in summary["by_turn"].items()} if several else {}
    parts = {**turns, **summary["by_category"]}
    if not parts:
        return
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "turns" if several else "questions", *OUTCOMES, "sign test p"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, found in parts.items():
        rates = [f"{found[result]['rate']:.1%}" for result in OUTCOMES]
        table.add_row(escape(name), str(found["judged"]), *rates, f"{found['sign_test_p']:.3g}")
    Console().print(table)
