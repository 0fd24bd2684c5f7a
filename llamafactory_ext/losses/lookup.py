"""Losses by name: the package's own, and those of the user's loss file."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..paths import named_path
from . import distributional, logistic, margin, reference_free, unpaired  # noqa: F401  (registers the package's own)
from .registry import LOSSES, Loss

_lock = threading.Lock()


def loss_names() -> list[str]:
    """All current values of `pref_loss`, sorted: the package's own losses and those of loaded loss files."""
    return sorted(LOSSES)


def all_losses() -> list[Loss]:
    """The same losses, by family: the package's own as their modules have them, then those of loaded loss files."""
    families = list(dict.fromkeys(loss.family for loss in LOSSES.values()))
    return sorted(LOSSES.values(), key=lambda loss: (loss.is_users, families.index(loss.family)))


def get_loss(name: str) -> Loss:
    """Look up a loss: `get_loss("minor_dpo")(pairs, beta=0.1)` returns the loss of each pair, shape `(batch,)`.

    Raises:
        ValueError: for an unknown name; the message lists the known names and the closest one.
    """
    known = loss_names()
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(
            f"pref_loss {name!r} is unknown: write one of {', '.join(known)}, "
            f"or name the file that registers it in `pref_loss_file`.{hint}"
        )
    return LOSSES[name]


def load_loss_file(path: str) -> list[str]:
    """Run a user's Python file and return the names of the losses that it registers.

    Args:
        path: the file; a relative path is looked up in the working directory.

    Raises:
        ValueError: if the file does not exist, fails, or registers no loss; the message says which.
    """
    before = dict(LOSSES)
    _load(path)
    names = [name for name, loss in LOSSES.items() if before.get(name) is not loss]
    if not names:
        raise ValueError(
            f"pref_loss_file {path!r} registers no loss: "
            'decorate a function in it with @llamafactory_ext.register_loss("name").'
        )
    return names


def loss_file(path: str) -> Path:
    """The path in `pref_loss_file`, with symbolic links resolved; the file need not exist.

    Raises:
        ValueError: if it is not a valid path, or a link cannot be resolved.
    """
    try:
        return Path(os.path.realpath(named_path("pref_loss_file", path)))  # Path.resolve fails on a loop of links
    except OSError as error:
        raise ValueError(f"pref_loss_file {path!r} cannot be resolved ({error}): write another path.") from error


def load_files_by(load: Callable[[str], None]) -> None:
    """Replace how loss files are loaded, for a process that must not run them itself.

    Args:
        load: called with the path; calls `add` with the losses that the file registers, or raises a ValueError.
    """
    global _load
    _load = load


def add(losses: Iterable[Loss]) -> None:
    """Register losses; they replace others of the same names."""
    LOSSES.update({loss.name: loss for loss in losses})


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Forget losses registered inside the with block at its end, for a process that serves several users.

    One thread at a time may be inside, so that none sees another's losses.
    """
    with _lock:
        before = dict(LOSSES)
        try:
            yield
        finally:
            LOSSES.clear()
            LOSSES.update(before)


def _run_file(path: str) -> None:
    file = loss_file(path)
    if not file.is_file():
        raise ValueError(f"pref_loss_file {path!r} is not a file (looked for {file}): write the path of a Python file.")
    # In sys.modules under its own name, so that dataclasses and pickling work in the user's file.
    name = f"llamafactory_ext_loss_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"pref_loss_file {str(file)!r} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        del sys.modules[name]
        raise ValueError(f"pref_loss_file {str(file)!r} could not be run: {type(error).__name__}: {error}") from error


_load: Callable[[str], None] = _run_file
