"""What a patch of LLaMA-Factory is, when it is applied, and how it fails on a version that it does not support."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from . import __version__


@dataclass(frozen=True)
class Patch:
    """A change to a module, applied once the module is loaded.

    Args:
        module: its dotted name.
        why: the reason, for readers.
        needs: name in the module (dotted for a member) -> parameters that it must accept.
        apply: changes the module; None to only check `needs`.
    """

    module: str
    why: str
    needs: dict[str, tuple[str, ...]]
    apply: Callable[[ModuleType], None] | None = None


def register(patch: Patch) -> None:
    """Apply a patch as soon as its module is loaded, before other modules import names from it."""
    wrapt.register_post_import_hook(functools.partial(apply, patch), patch.module)


def apply(patch: Patch, module: ModuleType) -> None:
    """Check what a patch needs of a loaded module, then change the module.

    Raises:
        ImportError: as `check` does.
    """
    for name, parameters in patch.needs.items():
        check(module, name, parameters)
    if patch.apply is not None:
        patch.apply(module)


def check(module: ModuleType, name: str, parameters: tuple[str, ...]) -> None:
    """Check that a name in a module exists and accepts the parameters.

    Raises:
        ImportError: if not; the message names both versions and the ones to install.
    """
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise _misfit(f"{module.__name__}.{name} is missing")
        target = getattr(target, part)
    missing = [p for p in parameters if p not in inspect.signature(target).parameters]
    if missing:
        raise _misfit(f"{module.__name__}.{name} does not take {', '.join(missing)}")


def _misfit(what: str) -> ImportError:
    # Not the installed package's version: a source tree has none, and the development version has another name.
    upstream = getattr(sys.modules.get("llamafactory"), "__version__", "of unknown version")
    return ImportError(
        f"llamafactory_ext {__version__} does not support LLaMA-Factory {upstream}: {what}. "
        "Install llamafactory>=0.9.4,<0.9.7, or set LLAMAFACTORY_EXT=0 to run LLaMA-Factory without the plugin."
    )


class replaced:  # noqa: N801  (reads as a verb)
    """A context manager that replaces an attribute of a module or object inside a with block."""

    def __init__(self, module: Any, name: str, value: object) -> None:
        self.module, self.name, self.value = module, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.module, self.name)
        setattr(self.module, self.name, self.value)

    def __exit__(self, *exc_info: object) -> None:
        setattr(self.module, self.name, self.before)
