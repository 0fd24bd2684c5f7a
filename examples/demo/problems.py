"""Arithmetic word problems of our own making, each with a worked solution of two steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

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


def finds(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    had, found = rng.randint(3, 9), rng.randint(2, 9)
    total = had + found
    given = rng.randint(2, total - 1)
    return Problem(
        f"{name} has {had} {things}, finds {found} more and then gives away {given}. How many {things} are left?",
        f"With the new ones there are {had} + {found} = {total} {things}.\n"
        f"After giving some away, {total} - {given} = {total - given} are left.",
        str(total - given),
    )


def boxes(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count, each, more = rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 9)
    total = count * each
    return Problem(
        f"{name} has {count} boxes with {each} {things} in each and buys {more} more {things}. "
        f"How many {things} does {name} have?",
        f"The boxes hold {count} * {each} = {total} {things}.\n"
        f"With the new ones, {name} has {total} + {more} = {total + more}.",
        str(total + more),
    )


def savings(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    first, second, spent = rng.randint(4, 12), rng.randint(3, 9), rng.randint(2, 6)
    saved = first + second
    return Problem(
        f"{name} saves {first} dollars in May and {second} dollars in June, and spends {spent} dollars. "
        f"How many dollars are left?",
        f"In both months {name} saves {first} + {second} = {saved} dollars.\n"
        f"After spending some, {saved} - {spent} = {saved - spent} are left.",
        str(saved - spent),
    )


def sharing(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, lost = rng.randint(2, 4), rng.randint(2, 5), rng.randint(2, 6)
    kept = friends * each
    return Problem(
        f"{name} had {kept + lost} {things}, lost {lost}, and shares the rest equally among {friends} friends. "
        f"How many {things} does each friend get?",
        f"After the loss, {kept + lost} - {lost} = {kept} {things} remain.\n"
        f"Each friend gets {kept} / {friends} = {each}.",
        str(each),
    )


KINDS: list[Callable[[random.Random], Problem]] = [finds, boxes, savings, sharing]


def generate(seed: int) -> Iterator[Problem]:
    """An endless stream of problems, never the same question twice; the same seed gives the same stream."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        problem = rng.choice(KINDS)(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem
