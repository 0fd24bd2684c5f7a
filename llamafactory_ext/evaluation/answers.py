"""Let models answer open questions, such as MT-Bench's, for `eval judge` to compare.

llamafactory-ext eval answers --model /path/to/model --data questions.jsonl --output runs/dpo

llamafactory-ext eval answers --model /base --adapter dpo=/lora/dpo --adapter sr=/lora/sr --skip-base --data ...

llamafactory-ext eval answers --engine openai --base-url http://127.0.0.1:8000/v1 --model NAME --data ...

The question of a row is `question`, `instruction` (with `input`), `prompt` or the first of `turns`, after its `system`
and `history`. The answers of a run are in OUTPUT/base/answers.jsonl or OUTPUT/ADAPTER/answers.jsonl.

Each answer is saved as it arrives. If it is interrupted, even by kill -9, rerun the same command to resume.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commandline import Command
from ..errors import UserError
from ..rows import Fields
from ..whole_files import write_whole
from .asking import ask_models, print_left_out, print_refused
from .chat_templates import Chat
from .generations import Generation, run_folder
from .options import Options, with_options, written_to
from .questions import located_rows

ANSWERS = "answers.jsonl"
QUESTION_FIELDS = ("question", "instruction", "prompt", "turns")

Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    data: Annotated[Path, Opt(help="A jsonl or parquet file with question, instruction, prompt or turns (the first).")],
    output: Annotated[Path, written_to("Folder for the answers; one sub-folder per model or adapter.")],
    *,
    options: Options,
) -> None:
    queries = load_queries(data, options.limit)
    about = {"data": {"source": str(data), "sha256": content_hash(queries), "questions": len(queries)}}
    answers = ask_models(options, [query.chat(options.system) for query in queries], about, output)
    for name, generations in answers.items():
        write_answers(output / name, queries, generations)
        answered = [generation for generation in generations.values() if generation.refused is None]
        cut_off = sum(generation.finish_reason == "length" for generation in answered)
        print(f"{output / name / ANSWERS}: {len(answered)} answers, {cut_off} cut off at {options.max_tokens} tokens")
        print_refused(output / name, generations.values(), [query.id for query in queries])
        print_left_out(output / name, generations.values())


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """An open question.

    Args:
        id: the row's `id` or `question_id`, else its number, counted from 1.
        messages: the row's system turn and history, if any, and the question as the last user turn.
    """

    id: str
    messages: Chat

    @property
    def text(self) -> str:
        """What a judge reads: the question, or the dialogue that ends with it."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in self.messages)

    def chat(self, system: str | None) -> Chat:
        """What a model is asked. A row without a system turn gets `system`, even an empty one, unless it is None."""
        if system is None or self.messages[0]["role"] == "system":
            return self.messages
        return [{"role": "system", "content": system}, *self.messages]


def load_queries(path: Path, limit: int | None = None) -> list[Query]:
    """The questions of a jsonl or parquet file: `question`, `instruction` (and `input`), `prompt`, or first of `turns`.

    They include LLaMA-Factory's `system` and `history` (pairs of a user and an assistant turn).

    Raises:
        UserError: if the file does not exist, a row has no question, or an id occurs twice.
    """
    queries = [_query(number, *located) for number, located in enumerate(_read(path), start=1)][:limit]
    _by_key(path, [query.id for query in queries], queries)
    return queries


def _query(number: int, where: str, row: Fields) -> Query:
    found = next((row[field] for field in QUESTION_FIELDS if row.get(field)), None)
    text = found[0] if isinstance(found, list) else found
    if not isinstance(text, str):
        raise UserError(f"{where} has no question: write it as `question`, `instruction`, `prompt` or `turns`.")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = []
    for turns in row.get("history") or []:
        if not (isinstance(turns, list) and len(turns) == 2):
            raise UserError(f"{where}: `history` must be a list of pairs, each of a user and an assistant turn.")
        user, assistant = turns
        history += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    question = "\n".join(filter(None, [text, row.get("input")]))
    return Query(_id(row) or str(number), [*system, *history, {"role": "user", "content": question}])


def write_answers(folder: Path, queries: list[Query], generations: dict[int, Generation]) -> None:
    """Write `answers.jsonl` into a run's folder: one row per question, with id, question, answer and finish_reason.

    A question that the server refused has an empty answer, and `refused` says why.
    """
    answers = [generations[index] for index in range(len(queries))]
    rows = [
        {
            "id": query.id,
            "question": query.text,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            **({} if answer.refused is None else {"refused": answer.refused}),
        }
        for query, answer in zip(queries, answers, strict=True)
    ]
    write_whole(folder / ANSWERS, "".join(json.dumps(row) + "\n" for row in rows))


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A question with the answers of models A and B; without ids in the data, `id` is its number, from 1."""

    id: str
    question: str
    a: str
    b: str


def load_pairs(a: Path, b: Path, limit: int | None = None) -> tuple[list[Pair], list[str]]:
    """Two models' answers to the same questions, in the order of the first file, and the ids of questions left out,
    because a server refused them for either model.

    Rows are matched by `id` (or `question_id`) if every row has one, else by the text of the question.

    Args:
        a: a jsonl or parquet file with `question` and `answer`, the folder of a run of `eval answers`, or a folder that
            contains a single run.
        b: likewise.
        limit: number of pairs to read, None for all.

    Raises:
        UserError: if a row lacks a field, a question occurs twice, the files do not answer the same questions, or every
            question was refused.
    """
    rows_a, rows_b = _answers(a), _answers(b)
    by_id = all(_id(row) for row in [*rows_a, *rows_b])
    keyed_a, keyed_b = (
        _by_key(path, [_id(row) if by_id else row["question"] for row in rows], rows)
        for path, rows in ((a, rows_a), (b, rows_b))
    )
    single = keyed_a.keys() ^ keyed_b.keys()
    if single:
        raise UserError(
            f"{a} and {b} do not answer the same questions: {len(single)} are in only one of them, such as "
            f"{min(single)[:80]!r}. Let both models answer the same file."
        )
    for key, row in keyed_a.items():
        if row["question"] != keyed_b[key]["question"]:
            raise UserError(
                f"{a} and {b} have different questions with the id {key}: let both models answer the same file."
            )
    pairs, refused = [], []
    for number, (key, row) in itertools.islice(enumerate(keyed_a.items(), start=1), limit):
        called = key if by_id else str(number)
        if any(each.get("refused") is not None for each in (row, keyed_b[key])):
            refused.append(called)
        else:
            pairs.append(Pair(called, row["question"], row["answer"], keyed_b[key]["answer"]))
    if not pairs:
        raise UserError(f"Every question was refused for {a} or {b}: run `eval answers` again.")
    return pairs, refused


def _answers(path: Path) -> list[Fields]:
    if path.is_dir():
        folder = path if (path / ANSWERS).is_file() else run_folder(path, ANSWERS)
        if not (folder / ANSWERS).is_file():
            raise UserError(
                f"{path} holds no answers to compare: make them with `llamafactory-ext eval answers --output {path}`."
            )
        path = folder / ANSWERS
    located = _read(path)
    for where, row in located:
        if not all(isinstance(row.get(field), str) for field in ("question", "answer")):
            raise UserError(f"{where} has no text in `question` or `answer`: name a file with both.")
    return [row for _, row in located]


# --- rows ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[tuple[str, Fields]]:
    located = located_rows(str(path))
    if not located:
        raise UserError(f"{path} is empty: write one JSON object per line.")
    return located


def _id(row: Fields) -> str | None:
    found = next((row[field] for field in ("id", "question_id") if row.get(field) is not None), None)
    return None if found is None else str(found)


def _by_key(path: Path, keys: list[Any], values: list[Any]) -> Fields:
    found = dict(zip(keys, values, strict=True))
    if len(found) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{path} has {twice[:80]!r} more than once: give each row an `id` of its own.")
    return found


def content_hash(rows: list[Query] | list[Pair]) -> str:
    """Fingerprint (SHA-256, hex) of the rows in their order."""
    return hashlib.sha256(json.dumps([astuple(row) for row in rows]).encode()).hexdigest()
