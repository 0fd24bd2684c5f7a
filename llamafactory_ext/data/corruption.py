"""Pairs from worked solutions: the rejected response is the chosen one with one intermediate result changed.

As in MetaMath's DPO pairs (arXiv 2402.13228), the chosen response is a correct solution; in the rejected one, the rest
of the text and the final answer are unchanged. The final answer is read as the evaluation reads it
(evaluation/extraction.py).
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
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+")
# A number after a GSM8K annotation (`<<6/2=3>>3`), which is always a result; or one after a `=` that is not an operand
# of a further calculation.
_RESULT = re.compile(
    rf"(?:>>|(?P<equals>=)\s*)\\?[$€£]?(?P<number>{_NUMBER.pattern})"
    r"(?!\d)(?(equals)(?![\d,.]*\s*(?:[-+*/x×÷=^]|\\(?:times|cdot|div)\b)))"
)


@dataclass(frozen=True)
class Problem:
    """A question, the steps of its solution (each result follows a `=` or an annotation), and the final answer."""

    question: str
    steps: str
    answer: str

    @property
    def solution(self) -> str:
        """The steps without GSM8K's annotations, and the final answer on its own line after ANSWER_MARKER."""
        return f"{_ANNOTATION.sub('', self.steps)}\n{ANSWER_MARKER}{self.answer}"


def parse_solution(question: str, solution: str) -> Problem:
    """Split a worked solution into its steps and the final answer after the last `####` or `The answer is`.

    MetaMathQA's solutions end in both, with the same answer; then neither belongs to the steps.

    Raises:
        BadRow: if the solution has no such ending, or nothing follows it.
    """
    endings = list(_ENDING.finditer(solution))
    if not endings:
        raise BadRow("the solution has no line `#### N` and no `The answer is`")
    answer = solution[endings[-1].end() :].strip().removesuffix(".")
    start = endings[-1].start()
    if len(endings) > 1 and solution[endings[-2].end() : start].strip() == answer:
        start = endings[-2].start()
    if not answer:
        raise BadRow("nothing follows the solution's `####` or `The answer is`")
    return Problem(question.strip(), solution[:start].strip(), answer)


def corrupt_steps(steps: str, answer: str, rng: random.Random) -> str | None:
    """The steps with one intermediate result changed and everything else kept.

    Results equal to the final answer are not changed: the text would then contradict its last line, not only its
    reasoning.

    Args:
        steps: a worked solution without its answer line.
        answer: the final answer; if it is not one number (`4:53`, `(3, 5)`), none of its numbers is changed in the
            steps; if it has none (`yes`), the last result is not changed.
        rng: chooses the result and its new value; the same state gives the same text.

    Returns:
        The corrupted steps, which differ from `steps` outside of annotations, or None without an intermediate result.
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
    """The number that the evaluation reads from an answer, or all its numbers if the evaluation reads none."""
    read = extract_answer(ANSWER_MARKER + answer)
    return {read} if read is not None else {_decimal(number) for number in _NUMBER.findall(answer)}


def make_pair(problem: Problem, rng: random.Random, prompt: str = PROMPT) -> dict[str, str] | None:
    """A preference pair in LLaMA-Factory's ranking layout, or None if there is no intermediate result to change."""
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
    """A pair from a row with any of the columns in `COLUMNS`; it depends on the seed and the row's text alone.

    Raises:
        BadRow: for a row without such columns, or without an intermediate result to change.
    """
    columns = next((pair for pair in COLUMNS if set(pair) <= set(fields)), None)
    if columns is None:
        known = "; ".join(" and ".join(pair) for pair in COLUMNS)
        raise BadRow(f"has none of these pairs of columns: {known}")
    question, solution = (text(fields, column) for column in columns)
    pair = make_pair(parse_solution(question, solution), random.Random(f"{seed} {question} {solution}"), prompt)
    if pair is None:
        raise BadRow("nothing to change: no positive intermediate result other than the final answer")
    return pair


def _other_number(number: str, final: set[Decimal], rng: random.Random) -> str:
    """A plausible wrong number: off by up to a tenth (or up to 9 units), as many decimals, not the final answer."""
    with localcontext(Context(prec=MAX_PREC)):  # a number of any length keeps its digits
        value = _decimal(number)
        unit = Decimal(1).scaleb(min(int(value.as_tuple().exponent), 0))
        reach = max(9, int(abs(value) / unit // 10))
        while True:
            wrong = value + unit * rng.randint(1, reach) * rng.choice((-1, 1))
            if wrong > 0 and wrong not in final:
                written = f"{wrong:,f}" if "," in number else f"{wrong:f}"
                return written.removeprefix("0") if number.startswith(".") else written


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
