"""Numbers, intervals and settings, as all tables of the report write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .look import Look
from .table import Group, Interval

SETTING = ("method", "learning\nrate", "β")  # heads


def setting(group: Group) -> dict[str, Any]:
    return {"method": group.method, "learning rate": group.learning_rate, "beta": group.beta}


def shown_setting(group: Group, look: Look) -> tuple[str, str, str]:
    return look.labels[group.variant], f"{group.learning_rate:g}", f"{group.beta:g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """Three digits, trailing zeros included, so that the rows of a column have as many."""
    return "" if value is None else signed(f"{value:#.3g}".rstrip("."))


def signed(written: str) -> str:
    """With the sign for minus in place of the hyphen."""
    return f"−{written[1:]}" if written.startswith("-") else written


def percent_interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{percent(interval[0])}–{percent(interval[1])}"


def number_interval(interval: Interval | None) -> str:
    """With a word between the bounds, which may be below 0."""
    return "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def counts(several: Iterable[int]) -> str:
    """One number where all are equal, otherwise the least and the most."""
    low, *_, high = sorted({*several}) * 2
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def with_interval(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name} low": low, f"{name} high": high}
