r"""Reading the final answer out of a generated solution: exactly, or not at all.

Three tiers, from strict to flexible:

    strict_prompt   what follows the last `So the answer is:`, the words that the prompt asks for
    strict          what follows the last `(so) the (final) answer is`, in any case, or a line `#### N`
    flexible        the last number of the text

A number is read as written, into a `Decimal`: never rounded, never rescaled, never searched for. A passage that could
mean two numbers (`3 hours 30 minutes`, `8:30`, `10-12`) is no answer. A marker without an answer is skipped; among
those with one the last counts. Every step is linear in the length of the text, and no text makes it raise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, Inexact
from itertools import chain, pairwise
from typing import Literal, get_args

# Recorded with every run: scores of different versions are not comparable.
VERSION = "1"

Tier = Literal["strict_prompt", "strict", "flexible"]
TIERS: tuple[Tier, ...] = get_args(Tier)


@dataclass(frozen=True)
class Reading:
    """What a text answers: its last valid answer, and the first one, which a model that keeps going may contradict."""

    answer: Decimal | None
    first: Decimal | None

    @property
    def conflict(self) -> bool:
        return self.answer != self.first


def extract_answer(text: str, tier: Tier = "strict") -> Decimal | None:
    """The final answer of a generated solution, or None if it has none.

    Args:
        text: the generated text, of any length and content.
        tier: how strictly to read; see the head of this module.

    Raises:
        ValueError: for an unknown tier; never because of the text.
    """
    return read_answer(text, tier).answer


def read_answer(text: str, tier: Tier = "strict") -> Reading:
    """Like `extract_answer`, with the first answer beside the last."""
    if tier not in TIERS:
        raise ValueError(f"{tier!r} is not a tier: write one of {', '.join(TIERS)}.")
    plain = _without_markup(text)
    answers = _all_numbers(plain) if tier == "flexible" else [a for a in _marked(plain, tier) if a is not None]
    return Reading(answers[-1], answers[0]) if answers else Reading(None, None)


# --- markup ----------------------------------------------------------------------------------------------------------

_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]{1,30})\}\{([0-9]{1,30})\}")
_LATEX_TEXT = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf|operatorname)\s*\{")
_NO_SIGNS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u00a0": " ",
        "\u202f": " ",
        "*": " ",
        "`": " ",
        "{": " ",
        "}": " ",
    }
)


def _without_markup(text: str) -> str:
    """The text without what decorates numbers in Markdown and LaTeX; line breaks stay."""
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text)
    text = _LATEX_TEXT.sub(" ", text).replace("{,}", ",").replace("\\,", " ")
    # A product keeps its sign: `2 * 3` may not become `2 3`.
    text = re.sub(r"(?<=[0-9)])( ?)\*( ?)(?=[0-9(])", r"\1×\2", text)
    text = text.replace("\\times", "×").replace("\\cdot", "×").replace("\\$", "$").replace("\\%", "%")
    for bracket in ("\\(", "\\)", "\\[", "\\]", "$$"):
        text = text.replace(bracket, " ")
    return text.translate(_NO_SIGNS)


# --- markers ---------------------------------------------------------------------------------------------------------

_PROMPT_MARKER = re.compile(r"So the answer is:")
_ANY_MARKER = re.compile(
    r"(?:\bso[ ,]{1,2})?\bthe (?:final )?answer is\b[ ]?:?|^[ ]?####", re.IGNORECASE | re.MULTILINE
)
# Where a sentence ends; what follows explains the answer or starts something else.
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)")
_HEADING_ANSWER = re.compile(r"\s*[-+]?[$€£¥₹]?[-+]?\.?[0-9](?:[0-9,./]*[0-9])?(?: ?[%A-Za-z][A-Za-z ]{0,40})?\.?\s*$")


def _marked(text: str, tier: Tier) -> Iterable[Decimal | None]:
    """What each marker of the tier is followed by: a number, or None."""
    marker = _PROMPT_MARKER if tier == "strict_prompt" else _ANY_MARKER
    for match, following in pairwise(chain(marker.finditer(text), [None])):
        assert match is not None
        segment = text[match.end() : following.start() if following else len(text)]
        if match.group().lstrip().startswith("####"):
            line = segment.partition("\n")[0]
            # Not a Markdown heading such as `#### 2. Next step`.
            yield _single_number(line.strip().rstrip(".")) if _HEADING_ANSWER.match(line) else None
        else:
            yield _after_marker(segment)


def _after_marker(segment: str) -> Decimal | None:
    """The answer on the marker's line; where that line ends at the marker, a next line that is nothing but a number."""
    line, _, rest = segment.partition("\n")
    if line.strip(" :$"):
        return _in_line(line)
    following = rest.lstrip().partition("\n")[0]
    return _single_number(following.strip().rstrip(".")) if _HEADING_ANSWER.match(following) else None


def _in_line(line: str) -> Decimal | None:
    line = _SENTENCE_END.split(line, maxsplit=1)[0]
    _, equals, right = line.rpartition("=")
    part = right if equals else line
    if re.match(r"\s*not\b", part, re.IGNORECASE):
        return None
    return _single_number(part)


# --- numbers ---------------------------------------------------------------------------------------------------------

# A run of digits and of what can stand between digits; which runs are numbers is decided afterwards.
_RUN = re.compile(r"\.?[0-9](?:[0-9,.:/]*[0-9])?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?")
_PLAIN = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_SCIENTIFIC = re.compile(r"[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]{1,3}")
_FRACTION = re.compile(r"([0-9]{1,30})/([0-9]{1,30})")
_POWER_OF_TEN = re.compile(r" ?[x×] ?10 ?(?:\^|\*\*) ?([-+]?[0-9]{1,3})(?![0-9])")
_MIXED_FRACTION = re.compile(r" ([0-9]{1,30})/([0-9]{1,30})(?![0-9/])")
# Behind a number: letters that multiply it, so that reading the number alone would be wrong.
_SCALE = re.compile(r" ?(?:hundred|thousand|million|billion|trillion|dozen|[kKMB])s?\b")
_CURRENCY = "$€£¥₹"
# Python's default context rounds every operation to 28 digits, also a change of sign.
_WIDE = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
_EXACT_QUOTIENT = Context(prec=200, traps=[Inexact])  # a finite quotient of 30-digit numbers has fewer digits


def _single_number(part: str) -> Decimal | None:
    """The number of a passage that holds exactly one, or None."""
    values: list[Decimal | None] = []
    position = 0
    while run := _RUN.search(part, position):
        if not _is_unit_exponent(part, run.start()):
            value, position = _number(part, run)
            values.append(value)
        position = max(position, run.end())
        if values and (values[0] is None or values[-1] != values[0]):
            return None
    return values[0] if values else None


def _all_numbers(text: str) -> list[Decimal]:
    """Every number of the text that can be read exactly, each run of digits on its own."""
    values: list[Decimal] = []
    for run in _RUN.finditer(text):
        value = _value(run.group())
        if value is not None:
            values.append(value.copy_negate() if _is_negative(text, run.start()) else value)
    return values


def _number(part: str, run: re.Match[str]) -> tuple[Decimal | None, int]:
    """The number that begins with this run of digits, with its sign, fraction and power of ten, and where it ends."""
    start, end = run.span()
    value = _value(run.group())
    power, fraction = _POWER_OF_TEN.match(part, end), _MIXED_FRACTION.match(part, end)
    if value is not None and power:
        value, end = value.scaleb(int(power[1]), _WIDE), power.end()
    elif value is not None and fraction and value == int(value):
        below_one = int(fraction[1]) < int(fraction[2])
        rest = _exact_fraction(int(fraction[1]), int(fraction[2])) if below_one else None
        value, end = None if rest is None else _WIDE.add(value, rest), fraction.end()

    if value is None or not _stands_alone(part, start, end):
        return None, end
    return (value.copy_negate() if _is_negative(part, start) else value), end


def _value(run: str) -> Decimal | None:
    if _PLAIN.fullmatch(run):
        return Decimal(run.replace(",", ""))
    if _SCIENTIFIC.fullmatch(run):
        return Decimal(run)
    fraction = _FRACTION.fullmatch(run)
    return _exact_fraction(int(fraction[1]), int(fraction[2])) if fraction else None


def _exact_fraction(numerator: int, denominator: int) -> Decimal | None:
    """numerator / denominator where that is a finite decimal, else None: 3/4 is 0.75, 1/3 is nothing."""
    if denominator == 0:
        return None
    try:
        return _EXACT_QUOTIENT.divide(Decimal(numerator), Decimal(denominator))
    except Inexact:
        return None


def _stands_alone(part: str, start: int, end: int) -> bool:
    """Whether nothing around the number changes what it says."""
    glued = start > 0 and (part[start - 1].isalpha() or part[start - 1] in "_^/")
    # In front of its own sign and currency: a word or a loose dash that could be a sign.
    before = part[max(0, start - 16) : start].rstrip(_CURRENCY)
    before = before[:-1].rstrip(_CURRENCY) if before.endswith(("-", "+")) else before
    worded_sign = before.lower().split()[-1:] in (["minus"], ["negative"], ["plus"], ["-"], ["+"])
    operated = re.match(r" ?[-+×x/^] ?[0-9]", part[end : end + 4]) is not None
    return not (glued or worded_sign or operated or _SCALE.match(part, end))


def _is_negative(text: str, start: int) -> bool:
    """Whether a minus sign belongs to the number: directly before it or its currency, and not between two numbers."""
    at = start - 1
    while at >= 0 and start - at <= 2 and text[at] in _CURRENCY:
        at -= 1
    if at < 0 or text[at] != "-":
        return False
    before = text[at - 1] if at > 0 else " "
    return not (before.isalnum() or before in ")].")


def _is_unit_exponent(part: str, start: int) -> bool:
    """Whether the digits are the 2 of `m^2`."""
    return start >= 2 and part[start - 1] == "^" and part[start - 2].isalpha()
