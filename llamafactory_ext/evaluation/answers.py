"""Let models answer open questions, such as MT-Bench's, for `eval judge` and `eval grade`.

llamafactory-ext eval answers --model /path/to/model --data questions.jsonl --output runs/dpo

llamafactory-ext eval answers --model /base --adapter dpo=/lora/dpo --adapter sr=/lora/sr --skip-base --data ...

llamafactory-ext eval answers --engine openai --base-url http://127.0.0.1:8000/v1 --model NAME --data ...

The question of a row is `question`, `instruction` (with `input`), `prompt` or `turns`, after its `system` and
`history`. Of several `turns`, each is asked on top of the model's own answers to the earlier ones: all first turns are
asked, then all second ones, and so on. A turn is recorded as refused if an earlier answer of its question was refused
or is empty, or if it does not fit the context after them. `category` and `reference` are passed on.

The answers of a run are in OUTPUT/base/answers.jsonl or OUTPUT/ADAPTER/answers.jsonl.

Each answer is saved as it arrives. If it is interrupted, even by kill -9, rerun the same command to resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..whole_files import write_whole
from .answered import ANSWERS, turn_label
from .asking import Rounds, ask_rounds, is_answered, plan_runs, print_left_out, print_refused
from .chat_templates import Chat
from .engines import Engine
from .generations import Generation
from .open_questions import Query, content_hash, load_queries
from .options import Options, with_options, written_to

Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    data: Annotated[Path, Opt(help="A jsonl or parquet file with question, instruction, prompt or turns.")],
    output: Annotated[Path, written_to("Folder for the answers; one sub-folder per model or adapter.")],
    *,
    options: Options,
) -> None:
    queries = load_queries(data, options.limit)
    contents = [[query.id, query.messages, *([query.later] if query.later else [])] for query in queries]
    about = {"data": {"source": str(data), "sha256": content_hash(contents), "questions": len(queries)}}
    # Whole conversations, with the shortest of answers: what cannot be asked then is a fault of the data.
    chats = [query.chat(options.system, ["."] * len(query.later)) for query in queries]
    engine, runs = plan_runs(options, chats, about, output)
    turns = Turns(engine, queries, options.system)
    for name, replies in ask_rounds(engine, turns.rounds(), runs).items():
        write_answers(output / name, turns, replies)
        _print_run(output / name, turns, replies, options.max_tokens)


class Turns:
    """The turns of all questions: the first of each, then the second of each that has one, and so on.

    A reply has the index of its turn in this order.
    """

    def __init__(self, engine: Engine, queries: list[Query], system: str | None) -> None:
        self.engine, self.queries, self.system = engine, queries, system
        most = max(len(query.turns) for query in queries)
        self.by_turn = [[n for n, query in enumerate(queries) if turn < len(query.turns)] for turn in range(most)]
        self.places = [(number, turn) for turn, numbers in enumerate(self.by_turn) for number in numbers]
        self.index = {place: index for index, place in enumerate(self.places)}

    def rounds(self) -> Rounds:
        """A round per turn."""
        rounds = [[self.index[number, turn] for number in numbers] for turn, numbers in enumerate(self.by_turn)]
        follows = {index: self.index[number, turn - 1] for index, (number, turn) in enumerate(self.places) if turn}
        return Rounds(rounds, self.chat, follows)

    def chat(self, index: int, replies: Mapping[int, Generation]) -> Chat | str:
        """What to ask on top of a run's own answers to the earlier turns, or why it cannot be asked."""
        number, turn = self.places[index]
        answers = []
        for earlier in range(turn):
            reply = replies[self.index[number, earlier]]
            if reply.refused is not None:
                return f"turn {earlier + 1} of the question was refused: {reply.refused}"
            if not reply.text.strip():
                return f"the answer to turn {earlier + 1} of the question is empty"
            answers.append(reply.text)
        chat = self.queries[number].chat(self.system, answers)
        return (self.engine.refusal(chat, number + 1) or chat) if turn else chat

    def label(self, index: int) -> str:
        """The question's id, with the turn if it has several."""
        number, turn = self.places[index]
        query = self.queries[number]
        return turn_label(query.id, turn + 1, len(query.turns))

    def of(self, number: int, replies: Mapping[int, Generation]) -> list[Generation]:
        """The replies to each turn of the question with this number, from 0."""
        return [replies[self.index[number, turn]] for turn in range(len(self.queries[number].turns))]


def write_answers(folder: Path, turns: Turns, replies: Mapping[int, Generation]) -> None:
    """Write `answers.jsonl` into a run's folder: one row per question.

    A question of one turn has `id`, `question`, `answer` and `finish_reason`, one of several has `id` and the lists
    `turns`, `answers` and `finish_reasons`. Both have `category` and `reference` (a list), where the data has them.
    What was refused has an empty answer, and `refused` says why; it is a list, too, in a question of several turns.
    """
    rows = [_row(query, turns.of(number, replies)) for number, query in enumerate(turns.queries)]
    write_whole(folder / ANSWERS, "".join(json.dumps(row) + "\n" for row in rows))


def _row(query: Query, answers: list[Generation]) -> dict[str, Any]:
    refused = [answer.refused for answer in answers]
    more = {
        **({"category": query.category} if query.category else {}),
        **({"reference": query.references} if query.references else {}),
    }
    if not query.later:
        (answer,) = answers
        columns = {"question": query.text, "answer": answer.text, "finish_reason": answer.finish_reason}
        return {"id": query.id, **columns, **more, **({} if refused == [None] else {"refused": answer.refused})}
    lists = {
        "turns": query.turns,
        "answers": [answer.text for answer in answers],
        "finish_reasons": [answer.finish_reason for answer in answers],
    }
    return {
        "id": query.id,
        **lists,
        **more,
        **({"refused": refused} if any(each is not None for each in refused) else {}),
    }


def _print_run(folder: Path, turns: Turns, replies: Mapping[int, Generation], max_tokens: int) -> None:
    answered = [reply for reply in replies.values() if is_answered(reply)]
    cut_off = sum(reply.finish_reason == "length" for reply in answered)
    print(f"{folder / ANSWERS}: {len(answered)} answers, {cut_off} cut off at {max_tokens} tokens")
    several = len(turns.places) > len(turns.queries)
    ids = [turns.label(index) for index in range(len(turns.places))]
    print_refused(folder, replies.values(), ids, "turns" if several else "problems")
    print_left_out(folder, replies.values())
