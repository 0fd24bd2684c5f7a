"""Paths in recipes and command lines."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import typer


def named_path(key: str, value: str) -> Path:
    """The path in a recipe's key, with `~` expanded; it need not exist.

    Raises:
        ValueError: if it cannot be a path.
    """
    try:
        return _expanded(value)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{key}` is {value!r}, which cannot be a path ({error}): write another one.") from error


def output_path(value: str | Path) -> Path:
    """An option's path to write to, with `~` expanded: shells do not expand it in `--output=~/x`.

    Raises:
        typer.BadParameter: if it is empty, as from an unset variable, or cannot be a path.
    """
    if not str(value):
        raise typer.BadParameter("it is empty: write a path.")
    try:
        return _expanded(str(value))
    except (OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{str(value)!r} cannot be a path ({error}): write another one.") from error


def _expanded(value: str) -> Path:
    """The path with `~` expanded.

    Raises:
        OSError, ValueError, RuntimeError: if it is too long, is not text, or names an unknown user.
    """
    path = Path(value).expanduser()
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        os.lstat(path)
    return path
