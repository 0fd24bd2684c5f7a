"""Paths that a recipe or a command names."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def named_path(key: str, value: str) -> Path:
    """The path that a recipe's key names, with its `~` resolved; there need be nothing there.

    Raises:
        ValueError: if nothing can be there.
    """
    try:
        path = Path(value).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, not text, of an unknown user
        raise ValueError(f"`{key}` is {value!r}, which cannot be a path ({error}): write another one.") from error
    return path


def output_path(value: str | Path) -> Path:
    """What a command's option names to be written, with its `~` resolved: shells leave that of `--output=~/x`.

    Raises:
        typer.BadParameter: if it is empty, as after a variable that is not set, or cannot be a path.
    """
    if not str(value):
        raise typer.BadParameter("it is empty: write a path.")
    try:
        return named_path("--output", str(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
