"""Test-set contamination: finds test questions in training questions, word for word or by thirteen words in a row.

Chinese, Japanese and Thai have no spaces between words: there, twenty characters in a row count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

import regex

from ..errors import UserError
from ..rows import BadRow, Row, text

QUESTION_COLUMNS = ("question", "query", "problem", "instruction", "prompt")

# The length of the word n-grams that GPT-3's authors compared (arXiv 2005.14165, appendix C), and of the character
# n-grams: a Chinese word has one and a half characters.
NGRAM = 13
CHARACTERS = 20

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CHARACTER = regex.compile(rf"[{_SPACELESS}]\p{{M}}*")
_WORD = regex.compile(rf"{_CHARACTER.pattern}|(?:(?![{_SPACELESS}])[\w\p{{M}}])+")
_ASCII_WORD = re.compile(r"\w+")
_INVISIBLE = regex.compile(r"\p{Cf}+")  # soft hyphens, zero-width spaces


def words(question: str) -> tuple[str, ...]:
    """The words of a question, lower case and without punctuation; in scripts without spaces, its characters."""
    if question.isascii():  # most are, and this is several times as fast
        return tuple(_ASCII_WORD.findall(question.lower()))
    plain = unicodedata.normalize("NFKC", _INVISIBLE.sub("", question)).casefold()
    return tuple(_WORD.findall(plain))


class TestSet:
    """The questions of a test set, indexed by n-grams; a question shorter than an n-gram is one n-gram."""

    __test__ = False  # not a test case, in spite of its name

    def __init__(self, questions: Iterable[str]) -> None:
        self._questions = [words(question) for question in questions]
        self._by_ngram: dict[tuple[str, ...], set[int]] = {}
        for index, question in enumerate(self._questions):
            for ngram in _ngrams(question, min(_size(question), len(question))):
                self._by_ngram.setdefault(ngram, set()).add(index)
        self._lengths = sorted({len(ngram) for ngram in self._by_ngram})

    def __len__(self) -> int:
        return len(self._questions)

    def overlap(self, question: str) -> str:
        """`same` if the question contains a whole test question, `similar` if an n-gram of one, else empty."""
        asked = words(question)
        near: set[int] = set()
        for length in self._lengths:
            for ngram in _ngrams(asked, length):
                near |= self._by_ngram.get(ngram, set())
        if any(_contains(asked, self._questions[index]) for index in near):
            return "same"
        return "similar" if near else ""


def read_test_set(rows: Iterable[Row]) -> TestSet:
    """The questions of a test set's rows.

    Raises:
        UserError: if a row cannot be read, or has no question in any of QUESTION_COLUMNS.
    """
    questions = []
    for row in rows:
        try:
            if isinstance(row.fields, BadRow):
                raise row.fields
            column = next((name for name in QUESTION_COLUMNS if name in row.fields), QUESTION_COLUMNS[0])
            questions.append(text(row.fields, column))
        except BadRow as reason:
            raise UserError(
                f"line {row.number} of the test set: {reason}; a test set needs a column "
                f"{', '.join(QUESTION_COLUMNS[:-1])} or {QUESTION_COLUMNS[-1]}."
            ) from reason
    return TestSet(questions)


def _size(question: tuple[str, ...]) -> int:
    """The n-gram length for a question: in characters if most of it is characters, else in words."""
    characters = sum(_CHARACTER.fullmatch(word) is not None for word in question)
    return CHARACTERS if 2 * characters > len(question) else NGRAM


def _ngrams(question: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
    return (question[start : start + length] for start in range(len(question) - length + 1)) if length else ()


def _contains(longer: tuple[str, ...], shorter: tuple[str, ...]) -> bool:
    return any(ngram == shorter for ngram in _ngrams(longer, len(shorter)))
