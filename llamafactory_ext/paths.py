"""Paths that a recipe names."""

from __future__ import annotations

import os
from pathlib import Path


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
