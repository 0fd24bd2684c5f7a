"""Problems and the prompts that they are asked with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

# The prompt of arXiv 2408.09834, to the letter; the question follows on the next line.
PAPER_PROMPT = (
    "You are a helpful assistant. Please answer follow question step by step and give final answer in a separate line "
    "using the brief format So the answer is: . Below is the question:\n{question}"
)
PROMPTS = {"paper": PAPER_PROMPT, "plain": "{question}"}


class UserError(Exception):
    """Something that the user can mend; the message says how."""


def one_line(error: Exception) -> str:
    """What a library says of an error, as part of a sentence."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Question:
    index: int
    text: str
    gold: Decimal

    @property
    def id(self) -> str:
        """The same for the same text and gold answer, wherever the problem stands."""
        return hashlib.sha256(_content(self)).hexdigest()[:16]


def load_questions(source: str, split: str = "test", limit: int | None = None) -> tuple[list[Question], str]:
    """The problems of a jsonl or parquet file, or of a hub data set (`openai/gsm8k`), and the sha256 of what was read.

    Raises:
        UserError: if the source does not exist, is empty, or a row lacks `question` or an answer that ends in `#### N`.
    """
    path = Path(source)
    if path.is_file():
        rows = read_file(path)
    elif path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute() or source.startswith("."):
        raise UserError(f"There is no data file {source}: write the path of a jsonl or parquet file, or openai/gsm8k.")
    else:
        rows = _read_hub(source, split)

    questions = [_question(index, row) for index, row in enumerate(rows)][:limit]
    if not questions:
        raise UserError(f"{source} holds no problems: write a file with rows of `question` and `answer`.")
    return questions, problems_hash(questions)


def problems_hash(questions: Iterable[Question]) -> str:
    """sha256 of the problems in their order: what a run was asked, whichever file it came from."""
    return hashlib.sha256(b"".join(map(_content, questions))).hexdigest()


def _content(question: Question) -> bytes:
    return json.dumps([question.text, str(question.gold)]).encode()


def read_file(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """The rows of a jsonl or parquet file, each with where it is.

    Raises:
        UserError: for a line that is not JSON.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error}): write one object per line.") from error
    return rows


def _read_hub(name: str, split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, "main", split=split)
    except Exception as error:
        raise UserError(
            f"{name} could not be read from the hub ({error}): name a local jsonl or parquet file."
        ) from error
    return [(f"{name}, row {number}", row) for number, row in enumerate(data, start=1)]


def _question(index: int, located: tuple[str, dict[str, Any]]) -> Question:
    where, row = located
    if not isinstance(row, dict) or not {"question", "answer"} <= set(row):
        raise UserError(f"{where} has no fields `question` and `answer`: name data with both.")
    _, marker, final = str(row["answer"]).rpartition("####")
    try:
        gold = Decimal(final.strip().replace(",", "").lstrip("$"))
    except InvalidOperation:
        gold = Decimal("NaN")
    if not marker or not gold.is_finite():
        raise UserError(f"{where}: the answer must end in a line `#### N` with a number N, as in GSM8K.")
    return Question(index, str(row["question"]), gold)


def load_prompt(name: str) -> str:
    """A prompt by name, or the text of a template file that holds `{question}`.

    Raises:
        UserError: if there is no such prompt or file, or the file lacks `{question}`.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--prompt {name} is neither {' nor '.join(PROMPTS)} nor a file: write one of these.")
    template = path.read_text(encoding="utf-8").rstrip("\n")
    if "{question}" not in template:
        raise UserError(f"The prompt file {name} does not hold {{question}}: write it where the question belongs.")
    return template


def messages(question: Question, prompt: str, system: str | None) -> list[dict[str, str]]:
    """The chat of one problem: the prompt as one user turn, and a system turn, also an empty one, if given."""
    turn = {"role": "user", "content": prompt.replace("{question}", question.text)}
    return [turn] if system is None else [{"role": "system", "content": system}, turn]
