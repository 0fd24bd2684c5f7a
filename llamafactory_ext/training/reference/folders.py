"""Folders of reference log-probabilities: where they are by default, what they hold, and their removal.

Needs neither torch nor LLaMA-Factory, so that `llamafactory-ext cache` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import UserError

ABOUT, LOCK, ROWS = "about.json", ".lock", "*.safetensors"
FINGERPRINT = re.compile("[0-9a-f]{32}")


def default_folder() -> Path:
    """Where references are kept if the recipe names no folder: llamafactory_ext/references in the user's cache."""
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without a name; Docker gives it this one
        home = Path("/")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "llamafactory_ext" / "references"


@dataclass(frozen=True)
class Reference:
    """A folder of log-probabilities.

    Args:
        folder: its path, whose name is the fingerprint of the reference.
        model: its name or path in the recipe that computed them; empty if unknown.
        pairs: how many pairs it knows.
        size: in bytes.
        written: when its newest file was written, in seconds since the epoch.
    """

    folder: Path
    model: str
    pairs: int
    size: int
    written: float


def list_references(folder: Path) -> list[Reference]:
    """The references in a folder, the newest first; none if there is no such folder.

    Folders that this package has not written, and links, are none.
    """
    found = [_reference(path) for path in folder.glob("*") if _is_ours(path)]
    return sorted(found, key=lambda reference: -reference.written)


def _is_ours(folder: Path) -> bool:
    """A fingerprint as its name, and a description that says which release of this package wrote it."""
    has_name = FINGERPRINT.fullmatch(folder.name) and not folder.is_symlink()
    return bool(has_name) and "llamafactory_ext" in _about(folder / ABOUT)


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / ABOUT, *folder.glob(ROWS)) if path.is_file() and not path.is_symlink()]


def _reference(folder: Path) -> Reference:
    size, written, pairs = 0, 0.0, 0
    for path in _files(folder):
        with suppress(FileNotFoundError):  # a training has merged it in the meantime
            status = path.stat()
            size, written = size + status.st_size, max(written, status.st_mtime)
            pairs += 0 if path.name == ABOUT else _pairs(path)
    model = str(_about(folder / ABOUT).get("model") or "").encode(errors="replace").decode()
    return Reference(folder, model, pairs, size, written)


def _about(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _pairs(path: Path) -> int:
    """How many pairs a file holds, by its header; a damaged one holds none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return int(file.get_slice("logps").get_shape()[0])
    except (SafetensorError, OSError, IndexError):
        return 0


def choose(
    references: Iterable[Reference], names: Iterable[str], *, everything: bool, older_than: float | None
) -> list[Reference]:
    """The references to remove.

    Args:
        references: those that there are.
        names: the beginnings of folders' names.
        everything: whether all of them are chosen.
        older_than: days since their last change; None: of any age.

    Raises:
        UserError: if nothing says what to remove, or a name fits none or several.
    """
    there, names = list(references), list(names)
    if not names and not everything and older_than is None:
        raise UserError("nothing says what to remove: name references, or write --older-than DAYS or --all.")
    chosen = there
    if names:
        chosen = list({(each := _named(there, name)).folder: each for name in names}.values())
    if older_than is not None:
        chosen = [each for each in chosen if time.time() - each.written > older_than * 24 * 60 * 60]
    return chosen


def _named(references: list[Reference], name: str) -> Reference:
    fitting = [each for each in references if each.folder.name == name]
    fitting = fitting or [each for each in references if each.folder.name.startswith(name)]
    if len(fitting) != 1 or not name:
        found = "none begins like that" if not fitting else f"{len(fitting)} begin like that"
        raise UserError(f"{name!r} is no reference ({found}): write one as `llamafactory-ext cache` lists it.")
    return fitting[0]


def remove(reference: Reference) -> bool:
    """Remove a reference's files, and its folder unless somebody else keeps files there.

    Returns:
        False if a training is computing it; nothing is removed then.

    Raises:
        OSError: if the files may not be removed.
    """
    lock = FileLock(reference.folder / LOCK)
    try:
        with lock.acquire(timeout=0):
            for path in _files(reference.folder):
                path.unlink(missing_ok=True)
    except Timeout:
        return False
    (reference.folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # other files are there
        reference.folder.rmdir()
    return True
