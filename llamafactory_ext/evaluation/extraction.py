r"""Reads the final answer from a generated solution: exactly, or not at all.

Three tiers, from strict to flexible:

    strict_prompt   what follows the last `So the answer is:`, the words that the prompt asks for
    strict          what follows the last `(so) the (final) answer is`, in any case, or a line `#### N`
    flexible        the last number of the text

A number is read as written, into a `Decimal`: never rounded or rescaled. Text that could mean two numbers is no answer:

- A number that its context changes is not read, in any tier: `8:30`, `10-12`, `2024-05-01`, `5 million`, `10^6`, `3,5`,
  `40+`, `more than 40`, `± 5`, `- 5`, `A-5`, `2x`, and digits that are not 0 to 9 in some typeface.
- The strict tiers read one sentence. Its numbers must all be the same, repeated after `=` or in brackets (`40 (40.00)`,
  `40, because 5 x 8 = 40`), or operands of a calculation with that result; so `5 boxes (5 x 8 = 40 pens)`,
  `5 boxes of 8` and `5 dollars and ten cents` are no answers.
- `flexible` reads only the last number; if it cannot be read, there is no answer.

English notation applies: `1,234` is above a thousand, `1.234` is not. Approximations and inclusive bounds (`about 40`,
`~40`, `at least 40`) are read as the number. Markers without an answer are skipped; the last one with an answer counts.
The time is linear in the length of the text, and no text raises an error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, Inexact
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal, NamedTuple, get_args

# Recorded with every run: scores from different versions are not comparable.
VERSION = "2"

Tier = Literal["strict_prompt", "strict", "flexible"]
TIERS: tuple[Tier, ...] = get_args(Tier)


@dataclass(frozen=True)
class Reading:
    """The answers in a text: the last valid one, and the first, which a model that keeps generating may contradict."""

    answer: Decimal | None
    first: Decimal | None

    @property
    def conflict(self) -> bool:
        """Whether the first and the last answer differ."""
        return self.answer != self.first


def extract_answer(text: str, tier: Tier = "strict") -> Decimal | None:
    """The final answer of a generated solution, or None if it has none.

    Args:
        text: the generated text, of any length and content.
        tier: how strictly to read; see this module's docstring.

    Raises:
        ValueError: for an unknown tier; never because of the text.
    """
    return read_answer(text, tier).answer


def read_answer(text: str, tier: Tier = "strict") -> Reading:
    """Like `extract_answer`, but returns the first answer as well."""
    if tier not in TIERS:
        raise ValueError(f"{tier!r} is not a tier: write one of {', '.join(TIERS)}.")
    plain = _without_markup(text)
    found = [number.value for number in _numbers(plain)] if tier == "flexible" else list(_marked(plain, tier))
    answers = [value for value in found if value is not None]
    if not answers or (tier == "flexible" and found[-1] is None):
        return Reading(None, None)
    return Reading(answers[-1], answers[0])


# --- markup ----------------------------------------------------------------------------------------------------------

# A noncharacter in place of a numeral that is not read (of another script, circled, Roman): it counts as a number.
_NUMERAL = "\ufdd0"
_CHARACTERS = {**dict.fromkeys("✕✖⨯⨉⋅∙·∗", "×"), **dict.fromkeys("⁄∕", "/"), "−": "-", "\ufe0f": "", "\u20e3": ""}
_LATEX_SYMBOLS = {
    **{"times": "×", "cdot": "×", "div": "÷", "pm": "±", "sim": "~", "approx": "≈", "neq": "≠", "ne": "≠", "lt": "<"},
    **{"gt": ">", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "circ": "°", "pounds": "£", "euro": "€", "dots": "…"},
}


@lru_cache(maxsize=4096)
def _plain_character(char: str) -> str:
    """ASCII for what is the same in another typeface, a stand-in for a numeral, else the character itself."""
    kind = unicodedata.decomposition(char).partition(" ")[0]
    compatible = unicodedata.normalize("NFKC", char)
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    if kind == "<fraction>":
        return compatible.replace("⁄", "/") + " "
    if kind in ("<wide>", "<narrow>", "<font>", "<small>") and compatible.isascii():
        return compatible
    return _NUMERAL if char.isnumeric() else " " if unicodedata.category(char) in ("Zs", "Cf") else char


def _plain_power(run: re.Match[str]) -> str:
    return "^" + unicodedata.normalize("NFKC", run[0]).replace("−", "-")


_FRAC = r"\\[dtc]?frac"
_ARGUMENT = r" ?(?:\{ ?([0-9]{1,30}) ?\}|([0-9]))"
_TEXT = r"\\(?:text(?:bf|it|rm|tt)?|emph|[mf]box|math(?:rm|bf|it|sf)|operatorname|underline)"
# What is replaced, in this order. Characters are replaced one by one, powers before them: `unicodedata.normalize` would
# make `10²` 102, and can take quadratic time.
_MARKUP: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile("[⁰¹²³⁴-⁹⁺⁻]+"), _plain_power),
    (re.compile(r"(?<=\d)(?=[¼-¾⅐-⅟↉])"), " "),
    (re.compile(r"[^\x00-\x7f]"), lambda char: _plain_character(char[0])),
    (re.compile(rf"(?<=[0-9])(?={_FRAC})"), " "),
    (re.compile(rf"{_FRAC}{_ARGUMENT}{_ARGUMENT}"), lambda f: "{}/{} ".format(*filter(None, f.groups()))),
    (re.compile(r"<<[^<>]*>>|<[/|]?[A-Za-z][^<>\n]*>"), " "),  # GSM8K's annotations, tags, special tokens
    (re.compile(r"\^ ?\{? ?\\circ\b ?\}?"), "°"),
    (re.compile(r"\^\{([^{}]*)\}"), r"^\1"),
    (re.compile(r"\} ?\^"), "^"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(rf"{_TEXT}\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(rf"{_FRAC}\{{([^{{}}]*)\}}\{{([^{{}}]*)\}}"), r" (\1)/(\2) "),
    # Commands that only decorate. Any other may compute: it is kept, and text with it is no answer.
    (re.compile(rf"(?:{_TEXT}|\\(?:boxed|displaystyle|textstyle|left|right|q?quad))(?![A-Za-z])"), " "),
    (re.compile(r"\\([A-Za-z]+)"), lambda command: _LATEX_SYMBOLS.get(command[1], command[0])),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\([$%#&_*.~+-])"), r"\1"),
    (re.compile(r"\\[^A-Za-z\n]|\$\$"), " "),
    (re.compile(r"(?<!\w)(_{1,2})([^_\s]{1,40})\1(?!\w)"), r" \2 "),
    # A product keeps its sign: `2 * 3` may not become `2 3`.
    (re.compile(r"(?<=[0-9)%])( ?)\*( ?)(?=\.?[0-9]|[($€£])|(?<=[A-Za-z)])( )\*( )(?=[A-Za-z0-9($€£])"), r"\1\3×\2\4"),
    (re.compile(r"[*`{}]"), " "),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"([A-Za-z]{2}|(?<![A-Za-z])m|/s)\^-?[0-9](?![0-9])"), r"\1"),  # the 2 of `m^2` is no number
]


def _without_markup(text: str) -> str:
    """The text in plain characters, without Markdown and LaTeX decoration of numbers; line breaks are kept."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


# --- markers ---------------------------------------------------------------------------------------------------------

_PROMPT_MARKER = re.compile(r"So the answer is:")
_ANY_MARKER = re.compile(
    r"(?:\bso[ ,]{1,2})?\bthe (?:final )?answer is\b[ ]?:?|^[ ]?####", re.IGNORECASE | re.MULTILINE
)
_HEADING_ANSWER = re.compile(r"\s*[-+]?[$€£¥₹]?[-+]?\.?[0-9](?:[0-9,./]*[0-9])?(?: ?[%A-Za-z][A-Za-z ]{0,40})?\.?\s*$")


def _marked(text: str, tier: Tier) -> Iterable[Decimal | None]:
    """For each marker of the tier, the number after it, or None."""
    marker = _PROMPT_MARKER if tier == "strict_prompt" else _ANY_MARKER
    for match, following in pairwise(chain(marker.finditer(text), [None])):
        assert match is not None
        segment = text[match.end() : following.start() if following else len(text)]
        if match.group().lstrip().startswith("####"):
            line = segment.partition("\n")[0]
            # Not a Markdown heading such as `#### 2. Next step`.
            yield _sentence(line) if _HEADING_ANSWER.match(line) else None
        else:
            yield _after_marker(segment)


def _after_marker(segment: str) -> Decimal | None:
    """The answer on the marker's line; if nothing follows the marker there, a next line that is only a number."""
    line, _, rest = segment.partition("\n")
    if line.strip(" :$\r"):
        return _sentence(line)
    following = rest.lstrip().partition("\n")[0]
    return _sentence(following) if _HEADING_ANSWER.match(following) else None


# --- sentences -------------------------------------------------------------------------------------------------------

_CURRENCY = "$€£¥₹₩₽₱₦₺₫₪฿¢₴₵"
# Text after it explains the answer or starts something else, except in `5. 3`, `4! = 24`, `80 sq. ft.` and `Dr. Lee`.
_SENTENCE_END = re.compile(rf"(?<!\b(?:Dr|Mr|Ms|Rs))(?<!\bMrs)[.!?](?=\s|$)(?!\s+[{_CURRENCY}]?[-+–×*÷/=(.a-z0-9])")
_EXPLANATION = re.compile(r"\b(?i:because|since|which|as|so)\b")
_CLAUSE_END = re.compile(rf"[,;:](?=\s|$)|{_EXPLANATION.pattern}")
_EQUALS = re.compile(r"[=≈≅]+>?|\bequals\b")
_BRACKETED_EQUATION = re.compile(r"\(([^()=≈≅]*[=≈≅][^()]*)\)")
_REPEATED = re.compile(rf"[^0-9]*[(\[] ?[-{_CURRENCY}]{{0,2}}")  # between `40 eggs` and its repetition `(40.0)`
_LEDGER = re.compile(rf"\s*[{_CURRENCY}]?\( ?[{_CURRENCY}]?[0-9][0-9,.]* ?\)[\s.]*")  # `(40)` may be -40
# What computes, and a negation in front of the number.
_NO_ANSWER = re.compile(r".*(?:\\[A-Za-z]|[√∛∜∓∞∑∏∫π])|[^0-9]*(?:\b(?i:not|cannot|never)\b|n['’]t\b|≠|!=)")
_PARTS = "(?:half|halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)"
_SCALES = "(?:hundred|thousand|[mbtr]+illion|dozen|lakh|lac|crore|gross|score|grand|mil|mln|mn|bn|tn)s?"
_WORDS = (
    "(?:zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|infinity|"
    "(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|[mbtr]+illion|dozen|lakh|crore)s?|twice|thrice|double|"
    "triple|half|halves"
)
_NUMBER_WORD = re.compile(
    # The known size of a group, and one of something, are not the answer's: `40 for all three days`, `40 in one week`.
    rf"\b(?:the|all|these|those|his|her|their|its|other|last|next|first|second|each|every) (?:{_WORDS}|one)\b"
    rf"|\b(?:in|per|for|on|at|any|no|this|that|with) one\b(?! (?:{_WORDS}|{_PARTS}))|\bper (?:dozen|hundred|thousand)\b"
    rf"|(?P<number>\b(?:{_WORDS}|one|an? (?:quarter|third)|(?:quarters?|{_PARTS}) of)\b)",
    re.IGNORECASE,
)


def _sentence(line: str) -> Decimal | None:
    """The one number in the first sentence of a line, or None.

    A further clause, or brackets with a `=`, may repeat the number as the result of an equation.
    """
    part = _SENTENCE_END.split(line, maxsplit=1)[0]
    words = _NUMBER_WORD.finditer(_EXPLANATION.split(part, maxsplit=1)[0])
    if _NO_ANSWER.match(part) or any(word["number"] for word in words):
        return None
    clauses = _BRACKETED_EQUATION.findall(part) + _CLAUSE_END.split(_BRACKETED_EQUATION.sub(" ", part))
    clauses = [clause for clause in clauses if _has_number(clause)]
    values = [value for clause in clauses for value in _sides(clause)]
    stated = sum(_EQUALS.search(clause) is None for clause in clauses)
    return values[0] if values and stated <= 1 and all(value == values[0] for value in values) else None


def _sides(clause: str) -> list[Decimal | None]:
    """The numbers of the sides of a clause's equation, without calculations beside their result."""
    sides = [side for side in _EQUALS.split(clause) if _has_number(side)]
    results = [side for side in sides if not _is_calculation(side)] or sides
    return [_one_number(side) for side in results]


def _one_number(side: str) -> Decimal | None:
    """The number of a passage without `=`, which may repeat it in brackets."""
    numbers = list(_numbers(side))
    repeated = all(_REPEATED.fullmatch(side, a.end, b.start) for a, b in pairwise(numbers))
    if not repeated or _LEDGER.fullmatch(side) or any(number.value != numbers[0].value for number in numbers):
        return None
    return numbers[0].value


def _has_number(part: str) -> bool:
    return next(_numbers(part), None) is not None


# --- calculations ----------------------------------------------------------------------------------------------------

_OPERAND = re.compile(rf"\.?[0-9]+(?:[.,][0-9]+)*|{_NUMERAL}")
_TOKEN = re.compile(r"[a-z]+|[^\sa-z]")
_RATE = re.compile(r"/ ?(?=[A-Za-z])|(?<=[0-9])-(?=[A-Za-z])")  # `8 pens/box`, `5-gallon`
_SUMS, _MINUS = {*"+-–", "plus", "minus"}, {*"-–"}
_OPERATORS = {*_SUMS, *"×*÷/^x", "times", "of", "divided", "multiplied"}
_UNITS = {*_CURRENCY, *"%°()[]'\"′″mghls"}  # a letter that is not among them is a variable
_CONNECTORS = {"and", "or", "but", "then", "to", "is", "are"}
_UNFINISHED = re.compile(r"[+×*÷/^]|\bx\b|[-–] ")


def _is_calculation(side: str) -> bool:
    """Whether every two neighbouring numbers are joined by one operator, and nothing else is computed.

    `5 - 5 x 8` is not one: it may be an answer and its explanation.
    """
    side = _RATE.sub(" ", side)
    runs = list(_OPERAND.finditer(side))
    if len(runs) < 2 or side.count("(") != side.count(")"):
        return False
    if _UNFINISHED.search(side, 0, runs[0].start()) or _UNFINISHED.search(side, runs[-1].end()):
        return False
    operators = [_operator(side[a.end() : b.start()], side[b.end() : b.end() + 80]) for a, b in pairwise(runs)]
    return None not in operators and (operators[0] not in _MINUS or _SUMS.issuperset(operators))


def _operator(gap: str, following: str) -> str | None:
    """The only operator in the gap between two numbers, or None; a minus after a word needs the same word again.

    `20 pens - 2 pens` is a difference, `5 boxes - 8` may be two statements.
    """
    if gap in ("(", ")("):
        return "×"
    tokens: list[str] = _TOKEN.findall(gap.lower())
    if tokens[-1:] == ["-"] and len(tokens) > 1 and not gap.endswith(" "):
        tokens.pop()  # the sign of the next number
    operators = [token for token in tokens if token in _OPERATORS]
    words = [token for token in tokens if token not in _OPERATORS and token not in _UNITS]
    if len(operators) != 1 or any(len(word) == 1 or word in _CONNECTORS for word in words):
        return None
    if operators[0] in _MINUS and _TOKEN.findall(following.lower())[: len(words)] != words:
        return None
    return operators[0]


# --- numbers ---------------------------------------------------------------------------------------------------------

# A run of digits and of characters between digits; which runs are numbers is decided afterwards.
_RUN = re.compile(rf"\.?[0-9{_NUMERAL}](?:[0-9,.:/{_NUMERAL}]*[0-9{_NUMERAL}])?(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?")
_PLAIN = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_SCIENTIFIC = re.compile(r"[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]{1,3}")
_FRACTION = re.compile(r"([0-9]{1,30})/([0-9]{1,30})")
_POWER_OF_TEN = re.compile(r" ?[x×] ?10 ?(?:\^|\*\*) ?([-+]?[0-9]{1,3})(?![0-9])")
_MIXED_FRACTION = re.compile(r" ([0-9]{1,30})/([0-9]{1,30})(?![0-9/])")
_SIGN = re.compile(rf"(?P<outer>[-+]?)(?:(?:\b[A-Z]{{1,2}})?[{_CURRENCY}]{{1,2}} ?)?(?P<inner>[-+]?)\Z")
# Before a number: words and signs that change it; only the listed characters may touch it.
_CHANGED_BEFORE = re.compile(
    r"(?:[-+±×*÷/^<>√–—]|(?<!no (?:more|less) )\bthan|\b(?:minus|negative|plus|times|over|under|above|below|x)"
    r"|\b(?:exceeding|exceeds|sqrt|log|ln|sin|cos|tan)|\b(?:root|square|cube|factorial)(?: of)?) *\(? *\Z"
    rf"|[^\s{_CURRENCY}(\[\"'“‘«:=≈≅~≥≤.,;#&|]\Z|[0-9][\"'“‘«~≥≤.,;#&|]\Z",
    re.IGNORECASE,
)
# After it: words and letters that multiply it, variables, operators, and the rest of a range.
_CHANGED_BEHIND = re.compile(
    rf"[ -]?(?:[kKMB]s?|(?i:{_SCALES}|{_PARTS}))\b|[abeijnoqruyzEIO](?![A-Za-z])|[xXͰ-Ͽ]"
    r"| (?i:x|squared|cubed|pi|choose|factorial|plus|minus|divided|multiplied)\b"
    rf"| ?\)? ?[+×*÷^√±]| ?\)? ?[-–/] ?[{_CURRENCY}]?[(.0-9]|[_@{_NUMERAL}]"
)
_MONEY_SCALE = re.compile(r" ?(?:mm?|b|t)\b", re.IGNORECASE)
# Python's default context rounds every operation to 28 digits, also a change of sign.
_WIDE = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)
_EXACT_QUOTIENT = Context(prec=200, traps=[Inexact])  # a finite quotient of 30-digit numbers has fewer digits
_NEAR = 24  # characters before a number that can change it


class _Number(NamedTuple):
    """A number: the start of its digits, its end, and its value if that is certain."""

    start: int
    end: int
    value: Decimal | None


def _numbers(text: str) -> Iterator[_Number]:
    """All numbers in the text, including those that cannot be read."""
    position = 0
    while run := _RUN.search(text, position):
        number = _number(text, run)
        position = number.end
        yield number


def _number(text: str, run: re.Match[str]) -> _Number:
    """The number that starts with this run of digits, with its sign, fraction and power of ten."""
    start, end = run.span()
    value = _value(run.group())
    power, fraction = _POWER_OF_TEN.match(text, end), _MIXED_FRACTION.match(text, end)
    if value is not None and power:
        value, end = value.scaleb(int(power[1]), _WIDE), power.end()
    elif value is not None and fraction and run.group().isdigit():
        below_one = int(fraction[1]) < int(fraction[2])
        rest = _exact_fraction(int(fraction[1]), int(fraction[2])) if below_one else None
        value, end = None if rest is None else _WIDE.add(value, rest), fraction.end()

    before = text[max(0, start - _NEAR) : start]
    sign = _SIGN.search(before)
    assert sign is not None  # it matches nothing, too
    signs, in_front = sign["outer"] + sign["inner"], before[: sign.start()]
    changed = (
        len(signs) > 1
        or _CHANGED_BEFORE.search(in_front)
        or (signs and in_front.endswith("|"))
        or _CHANGED_BEHIND.match(text, end)
        or (sign.group().strip("+- ") and _MONEY_SCALE.match(text, end))
        or ("." in run.group() and text.startswith(("..", "…"), end))  # 0.333... continues
        or unicodedata.category(text[end : end + 1] or " ")[0] == "M"  # struck out, or repeating
    )
    if value is None or changed:
        return _Number(start, end, None)
    return _Number(start, end, value.copy_negate() if signs == "-" else value)


def _value(run: str) -> Decimal | None:
    if _PLAIN.fullmatch(run):
        return Decimal(run.replace(",", ""))
    if _SCIENTIFIC.fullmatch(run):
        return Decimal(run)
    fraction = _FRACTION.fullmatch(run)
    return _exact_fraction(int(fraction[1]), int(fraction[2])) if fraction else None


def _exact_fraction(numerator: int, denominator: int) -> Decimal | None:
    """numerator / denominator if it is a finite decimal, else None: 3/4 is 0.75, 1/3 is None."""
    if denominator == 0:
        return None
    try:
        return _EXACT_QUOTIENT.divide(Decimal(numerator), Decimal(denominator))
    except Inexact:
        return None
