"""Preference data: pairs made from worked solutions by corrupting one intermediate result.

The manner of MetaMath's DPO pairs: the chosen answer is a correct solution, the rejected one is the same text with
one intermediate result changed, and everything after it, the final answer included, as it was.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import Decimal

# The evaluation prompt of arXiv 2408.09834; a question follows on the next line.
PROMPT = (
    "You are a helpful assistant. Please answer follow question step by step and give final answer in a separate line "
    "using the brief format So the answer is: . Below is the question:\n"
)
ANSWER_MARKER = "So the answer is: "

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(r"=\s*[$€£]?(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?![\d,.]*\s*[-+*/x×÷=])")


@dataclass(frozen=True)
class Problem:
    """A question, the steps of its solution (one per line, each result after a `=`), and the final answer."""

    question: str
    steps: str
    answer: str

    @property
    def solution(self) -> str:
        """The steps, and the answer on a line of its own behind the marker."""
        return f"{self.steps}\n{ANSWER_MARKER}{self.answer}"


def parse_gsm8k(question: str, answer: str) -> Problem:
    """A row of GSM8K as a problem; the `<<a*b=c>>` annotations are dropped, the text around them stays.

    Raises:
        ValueError: if the answer does not end in a line `#### N`.
    """
    steps, marker, final = answer.rpartition("####")
    if not marker:
        raise ValueError(f"this GSM8K answer has no line `#### N`: {answer!r}.")
    return Problem(question.strip(), _ANNOTATION.sub("", steps).strip(), final.strip())


def corrupt_steps(steps: str, answer: str, rng: random.Random) -> str | None:
    """The steps with one intermediate result changed and everything else kept.

    Results equal to the final answer are left alone, because with one of them changed the text would contradict its
    own last line instead of only its reasoning.

    Args:
        steps: a worked solution without its answer line.
        answer: the final answer, a number.
        rng: decides which result is changed, and to what: the same state gives the same text.

    Returns:
        The corrupted steps, never equal to `steps`, or None if they hold no intermediate result.
    """
    final = _decimal(answer)
    results = [match for match in _RESULT.finditer(steps) if _decimal(match["number"]) != final]
    if not results:
        return None

    result = rng.choice(results)
    start, end = result.span("number")
    return steps[:start] + _other_number(result["number"], final, rng) + steps[end:]


def make_pair(problem: Problem, rng: random.Random) -> dict[str, str] | None:
    """A preference pair in LLaMA-Factory's ranking layout, or None if the solution has nothing to corrupt."""
    steps = corrupt_steps(problem.steps, problem.answer, rng)
    if steps is None:
        return None
    rejected = Problem(problem.question, steps, problem.answer)
    return {
        "instruction": PROMPT + problem.question,
        "input": "",
        "chosen": problem.solution,
        "rejected": rejected.solution,
    }


def _other_number(number: str, final: Decimal | None, rng: random.Random) -> str:
    """A wrong number that looks as plausible: off by up to a tenth (at least 9), same decimals, not the answer."""
    value = Decimal(number.replace(",", ""))
    unit = Decimal(1).scaleb(min(int(value.as_tuple().exponent), 0))
    reach = max(9, int(abs(value) / unit / 10))
    while True:
        wrong = value + unit * rng.randint(1, reach) * rng.choice((-1, 1))
        if wrong > 0 and wrong != final:
            return f"{wrong:,}" if "," in number else str(wrong)


def _decimal(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", "").strip().lstrip("$€£"))
    except ArithmeticError:
        return None
