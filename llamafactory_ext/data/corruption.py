"""Pairs from worked solutions: the rejected answer is the chosen one with one intermediate result corrupted.

The manner of MetaMath's DPO pairs (arXiv 2402.13228): the chosen answer is a correct solution, the rejected one is the
same text with one intermediate result changed, and everything after it, the final answer included, as it was. What
the final answer is, the evaluation's reader says (evaluation/extraction.py): the two must not differ.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import MAX_PREC, Context, Decimal, localcontext

from ..evaluation.extraction import extract_answer
from ..rows import BadRow, Fields, text

# The evaluation prompt of arXiv 2408.09834; a question follows on the next line.
PROMPT = (
    "You are a helpful assistant. Please answer follow question step by step and give final answer in a separate line "
    "using the brief format So the answer is: . Below is the question:\n"
)
ANSWER_MARKER = "So the answer is: "

# The columns of a question and its worked solution: GSM8K, MetaMathQA, MATH, alpaca.
COLUMNS = (("question", "answer"), ("query", "response"), ("problem", "solution"), ("instruction", "output"))

_ENDING = re.compile(r"####|(?:\bso[ ,]{1,2})?\bthe (?:final )?answer is\b:?", re.IGNORECASE)
_ANNOTATION = re.compile(r"<<[^<>]*=[^<>]*>>")
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# A number behind an annotation of GSM8K's (`<<6/2=3>>3`), which is always a result; or one behind a `=` that does not
# go on as a part of the next sum.
_RESULT = re.compile(
    rf"(?:>>|(?P<equals>=)\s*)\\?[$€£]?(?P<number>{_NUMBER.pattern})"
    r"(?!\d)(?(equals)(?![\d,.]*\s*(?:[-+*/x×÷=^]|\\(?:times|cdot|div)\b)))"
)


@dataclass(frozen=True)
class Problem:
    """A question, the steps of its solution (each result after a `=` or an annotation), and the final answer."""

    question: str
    steps: str
    answer: str

    @property
    def solution(self) -> str:
        """The steps without GSM8K's annotations, and the answer on a line of its own behind the marker."""
        return f"{_ANNOTATION.sub('', self.steps)}\n{ANSWER_MARKER}{self.answer}"


def parse_solution(question: str, solution: str) -> Problem:
    """A worked solution as a problem: its steps, and what stands behind the last `####` or `The answer is`.

    MetaMathQA's solutions end in both, which say the same; neither belongs to the steps then.

    Raises:
        BadRow: if the solution has no such ending.
    """
    endings = list(_ENDING.finditer(solution))
    if not endings:
        raise BadRow("the solution ends in no line `#### N` and no `The answer is`")
    answer = solution[endings[-1].end() :].strip().removesuffix(".")
    start = endings[-1].start()
    if len(endings) > 1 and solution[endings[-2].end() : start].strip() == answer:
        start = endings[-2].start()
    if not answer:
        raise BadRow("nothing follows the solution's `####` or `The answer is`")
    return Problem(question.strip(), solution[:start].strip(), answer)


def corrupt_steps(steps: str, answer: str, rng: random.Random) -> str | None:
    """The steps with one intermediate result changed and everything else kept.

    Results equal to the final answer are left alone, because with one of them changed the text would contradict its
    own last line instead of only its reasoning.

    Args:
        steps: a worked solution without its answer line.
        answer: the final answer; where it is not one number (`4:53`, `(3, 5)`), all numbers in it are left alone, and
            where it has none (`yes`), the last result.
        rng: decides which result is changed, and to what: the same state gives the same text.

    Returns:
        The corrupted steps, which differ from `steps` outside of annotations, or None if they hold no intermediate
        result.
    """
    annotated = [match.span() for match in _ANNOTATION.finditer(steps)]
    results = [
        match
        for match in _RESULT.finditer(steps)
        if not any(start <= match.start("number") < end for start, end in annotated)
    ]
    final = _final_results(answer) or {_decimal(match["number"]) for match in results[-1:]}
    intermediate = [match for match in results if _decimal(match["number"]) not in final]
    if not intermediate:
        return None

    result = rng.choice(intermediate)
    start, end = result.span("number")
    return steps[:start] + _other_number(result["number"], final, rng) + steps[end:]


def _final_results(answer: str) -> set[Decimal]:
    """The number that the evaluation reads in an answer, or all numbers of one that it does not read."""
    read = extract_answer(ANSWER_MARKER + answer)
    return {read} if read is not None else {_decimal(number) for number in _NUMBER.findall(answer)}


def make_pair(problem: Problem, rng: random.Random, prompt: str = PROMPT) -> dict[str, str] | None:
    """A preference pair in LLaMA-Factory's ranking layout, or None if the solution has nothing to corrupt."""
    steps = corrupt_steps(problem.steps, problem.answer, rng)
    if steps is None:
        return None
    rejected = Problem(problem.question, steps, problem.answer)
    return {
        "instruction": prompt + problem.question,
        "chosen": problem.solution,
        "rejected": rejected.solution,
    }


def corrupt_row(fields: Fields, seed: int, prompt: str = PROMPT) -> dict[str, str]:
    """A pair from a row of any of the layouts in `COLUMNS`; it depends on the seed and the row's text alone.

    Raises:
        BadRow: for a row of another layout, and where there is nothing to corrupt.
    """
    columns = next((pair for pair in COLUMNS if set(pair) <= set(fields)), None)
    if columns is None:
        known = "; ".join(" and ".join(pair) for pair in COLUMNS)
        raise BadRow(f"none of these columns: {known}")
    question, solution = (text(fields, column) for column in columns)
    pair = make_pair(parse_solution(question, solution), random.Random(f"{seed} {question} {solution}"), prompt)
    if pair is None:
        raise BadRow("nothing to corrupt: no intermediate result differs from the final answer")
    return pair


def _other_number(number: str, final: set[Decimal], rng: random.Random) -> str:
    """A wrong number that looks as plausible: off by up to a tenth (at least 9), same decimals, not the answer."""
    with localcontext(Context(prec=MAX_PREC)):  # a number of any length keeps its digits
        value = _decimal(number)
        unit = Decimal(1).scaleb(min(int(value.as_tuple().exponent), 0))
        reach = max(9, int(abs(value) / unit // 10))
        while True:
            wrong = value + unit * rng.randint(1, reach) * rng.choice((-1, 1))
            if wrong > 0 and wrong not in final:
                return f"{wrong:,f}" if "," in number else f"{wrong:f}"


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
