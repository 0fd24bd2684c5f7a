"""Word problems of two to four steps, for a model that learns to solve them from scratch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from llamafactory_ext.data.corruption import Problem

NAMES = [
    "Ana",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mei",
    "Noor",
]
THINGS = ["pens", "shells", "stickers", "marbles", "cards", "buttons", "beads", "stamps", "badges", "coins"]
GAINS = ["finds {n} more", "buys {n} more", "is given {n} more", "wins {n} more in a game"]
LOSSES = ["gives {n} to a friend", "sells {n} of them", "loses {n} on the way home", "puts {n} aside for later"]
FACTORS = ["swaps each of them for {n} others", "trades every one for {n} smaller ones"]
SHARES = [
    "splits them into {n} equal piles and keeps one pile",
    "shares them equally among {n} people, one of them {name}",
]

MOST = 99  # no number in a story is larger


@dataclass(frozen=True)
class Kind:
    """What stories are made of.

    Args:
        steps: the fewest and the most.
        signs: the calculations that there may be.
        largest_change: of what is added or taken away.
    """

    steps: tuple[int, int] = (2, 4)
    signs: str = "+-*/"
    largest_change: int = 20


def story(rng: random.Random, kind: Kind) -> Problem:
    """One problem: a number of things, changed a few times; a line of the solution per change."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    number = rng.randint(4, 40)
    sentences = [f"{name} has {number} {things}."]
    lines = []
    for place in range(rng.randint(*kind.steps)):
        phrase, symbol, n, result = _change(number, rng, kind)
        opening = name if place == 0 else f"Then {name}"
        sentences.append(f"{opening} {phrase.format(n=n, name='being ' + name)}.")
        lines.append(f"{number} {symbol} {n} = {result} {things}.")
        number = result
    sentences.append(f"How many {things} does {name} have now?")
    return Problem(" ".join(sentences), "\n".join(lines), str(number))


def _change(number: int, rng: random.Random, kind: Kind) -> tuple[str, str, int, int]:
    """A phrase, its sign, the number in it, and what becomes of `number`; results are whole, positive, at most MOST."""
    divisors = [n for n in range(2, 10) if number % n == 0 and number > n]
    factors = [n for n in range(2, 10) if number * n <= MOST]
    signs = ["+"] * (number < MOST) + ["-"] * (number > 1) + ["*"] * bool(factors) + ["/"] * bool(divisors)
    sign = rng.choice([sign for sign in signs if sign in kind.signs])
    if sign == "+":
        n = rng.randint(1, min(kind.largest_change, MOST - number))
        return rng.choice(GAINS), "+", n, number + n
    if sign == "-":
        n = rng.randint(1, min(kind.largest_change, number - 1))
        return rng.choice(LOSSES), "-", n, number - n
    if sign == "*":
        n = rng.choice(factors)
        return rng.choice(FACTORS), "*", n, number * n
    n = rng.choice(divisors)
    return rng.choice(SHARES), "/", n, number // n


def stories(seed: int, kind: Kind = Kind()) -> Iterator[Problem]:
    """An endless stream of problems, never the same question twice; the same seed gives the same stream."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        problem = story(rng, kind)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem
