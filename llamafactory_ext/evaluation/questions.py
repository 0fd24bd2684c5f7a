"""The problems of GSM8K and the prompts that ask them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from ..errors import UserError
from ..rows import HUB_NAME, BadRow, Fields, Row, read_rows

# The prompt of arXiv 2408.09834, to the letter; the question follows on the next line.
PAPER_PROMPT = (
    "You are a helpful assistant. Please answer follow question step by step and give final answer in a separate line "
    "using the brief format So the answer is: . Below is the question:\n{question}"
)
PROMPTS = {"paper": PAPER_PROMPT, "plain": "{question}"}


@dataclass(frozen=True)
class Question:
    """A problem: its index in the data, from 0, its text, and its gold answer."""

    index: int
    text: str
    gold: Decimal

    @property
    def id(self) -> str:
        """A fingerprint of the text and the gold answer, the same at any index."""
        return hashlib.sha256(_content(self)).hexdigest()[:16]


def load_questions(source: str, split: str = "test", limit: int | None = None) -> tuple[list[Question], str]:
    """The problems of a file or a Hub data set (`openai/gsm8k`), and their `problems_hash`.

    Raises:
        UserError: if the source does not exist or is empty, or a row lacks `question` or an answer ending in `#### N`.
    """
    rows = located_rows(source, split)
    questions = [_question(index, row) for index, row in enumerate(rows)][:limit]
    if not questions:
        raise UserError(f"{source} has no problems: write rows with `question` and `answer`.")
    return questions, problems_hash(questions)


def problems_hash(questions: Iterable[Question]) -> str:
    """Fingerprint (SHA-256, hex) of the problems in their order; it does not depend on the file."""
    return hashlib.sha256(b"".join(map(_content, questions))).hexdigest()


def _content(question: Question) -> bytes:
    return json.dumps([question.text, str(question.gold)]).encode()


def located_rows(source: str, split: str = "train") -> list[tuple[str, Fields]]:
    """The rows of a data file, or of a Hub data set (subset `main`), each with its place for messages.

    Raises:
        UserError: as `read_rows`, and for a row that is not an object.
    """
    is_hub = HUB_NAME.fullmatch(source) and not Path(source).exists()
    rows = read_rows(f"{source}:main" if is_hub and ":" not in source else source, split)
    unit = "line" if source.endswith((".jsonl", ".gz")) else "row"
    return [_located(f"{source}, {unit} {row.number}", row) for row in rows]


def _located(where: str, row: Row) -> tuple[str, Fields]:
    if isinstance(row.fields, BadRow):
        raise UserError(f"{where} is {row.fields}: write one JSON object per line.")
    return where, row.fields


def _question(index: int, located: tuple[str, Fields]) -> Question:
    where, row = located
    if not {"question", "answer"} <= set(row):
        raise UserError(f"{where} needs `question` and `answer`: name data with both.")
    _, marker, final = str(row["answer"]).rpartition("####")
    try:
        gold = Decimal(final.strip().replace(",", "").lstrip("$"))
    except InvalidOperation:
        gold = Decimal("NaN")
    if not marker or not gold.is_finite():
        raise UserError(f"{where}: the answer must end in a line `#### N` with a number N, as in GSM8K.")
    if not isinstance(row["question"], str):
        raise UserError(f"{where}: `question` is not text: correct it.")
    return Question(index, row["question"], gold)


def load_prompt(name: str) -> str:
    """A prompt by name, or the text of a template file that contains `{question}`.

    Raises:
        UserError: if the prompt or file does not exist, or the file lacks `{question}`.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--prompt {name} is neither {' nor '.join(PROMPTS)} nor a file: write one of these.")
    try:
        template = path.read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt file {name} is not UTF-8: save it as UTF-8.") from error
    if "{question}" not in template:
        raise UserError(f"The prompt file {name} does not contain {{question}}: write it where the question belongs.")
    return template


def messages(question: Question, prompt: str, system: str | None) -> list[dict[str, str]]:
    """The chat of one problem: the prompt as a user turn, after a system turn, even an empty one, unless it is None."""
    turn = {"role": "user", "content": prompt.replace("{question}", question.text)}
    return [turn] if system is None else [{"role": "system", "content": system}, turn]
