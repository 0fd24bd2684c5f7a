"""The losses by name: the package's own, and those of the user's file."""

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
from . import logistic, margin, reference_free, unpaired  # noqa: F401  (registers the package's own)
from .registry import LOSSES, Loss

_lock = threading.Lock()


def loss_names() -> list[str]:
    """Every name that `pref_loss` can take now, sorted: the package's own and those of loaded loss files."""
    return sorted(LOSSES)


def get_loss(name: str) -> Loss:
    """Look a loss up: `get_loss("minor_dpo")(pairs, beta=0.1)` gives the loss of each pair, shape `(batch,)`.

    Raises:
        ValueError: for an unknown name; the message lists the known ones and the nearest.
    """
    known = loss_names()
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"pref_loss {name!r} is unknown: write one of {', '.join(known)}, "
            f"or name the file that registers it with pref_loss_file.{hint}"
        )
    return LOSSES[name]


def load_loss_file(path: str) -> list[str]:
    """Run a user's Python file and return the names of the losses that it registers.

    Args:
        path: the file; a relative path is looked up in the working directory.

    Raises:
        ValueError: if there is no such file, it registers nothing, or it fails; the message says which.
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
    """The file that `pref_loss_file` names, symbolic links resolved; there need be none.

    Raises:
        ValueError: if it cannot be a path, or may not be followed.
    """
    try:
        return Path(os.path.realpath(named_path("pref_loss_file", path)))  # `resolve` fails at links in a circle
    except OSError as error:
        raise ValueError(f"pref_loss_file {path!r} cannot be followed ({error}): write another path.") from error


def load_files_by(load: Callable[[str], None]) -> None:
    """For a process that must not run files itself: what is called with the path, in place of running it.

    It is to call `add` with what the file registers, or to raise a ValueError.
    """
    global _load
    _load = load


def add(losses: Iterable[Loss]) -> None:
    """Register losses as they are, in place of others of their names."""
    LOSSES.update({loss.name: loss for loss in losses})


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Losses that are registered in a with block are forgotten at its end, for a process that serves several users.

    One thread at a time, so that none sees another's losses.
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
    # Under its own name in sys.modules, so that dataclasses and pickling work in the user's file.
    name = f"llamafactory_ext_loss_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"pref_loss_file {str(file)!r} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a main guard may end the process
        del sys.modules[name]
        raise ValueError(f"pref_loss_file {str(file)!r} could not be run: {type(error).__name__}: {error}") from error


_load: Callable[[str], None] = _run_file
