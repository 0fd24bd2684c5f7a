"""What resumable outputs share: one process writes, and only what depends on the same is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError

LONGEST = 120  # characters of a value in a sentence


def take(lock: FileLock, output: Path) -> None:
    """Take the lock of an output at once.

    Raises:
        UserError: if another process has it, or the file system has no locks.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is writing to {str(output)!r}: wait for it, or choose another --output."
        ) from None
    except NotImplementedError:
        raise UserError(
            f"{str(output)!r} is on a file system without locks: choose an --output on another one."
        ) from None


def first_difference(recorded: Any, now: Mapping[str, Any]) -> str | None:
    """The first key in which two manifests differ, as part of a sentence; None if they are the same.

    Args:
        recorded: what was read from a file; of another kind than a mapping, it differs in everything.
        now: what would be written now, as JSON holds it.
    """
    before = recorded if isinstance(recorded, dict) else {}
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            was, is_now = _parts_that_differ(before.get(key), now.get(key))
            return f"its {key} is {_short(was)}, not {_short(is_now)}"
    return None


def _parts_that_differ(a: Any, b: Any) -> tuple[Any, Any]:
    """Of two mappings, only what differs."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return a, b
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return {key: a[key] for key in keys if key in a}, {key: b[key] for key in keys if key in b}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
