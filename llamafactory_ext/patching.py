"""How LLaMA-Factory is patched: what a patch is, when it is applied, and how it fails where it does not fit."""

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
    """What is done to a module once it is loaded.

    Args:
        module: its full name.
        why: the reason, for readers.
        needs: name in the module (dotted for a member) -> parameters that it must take.
        apply: the patch; None where the module is only relied upon.
    """

    module: str
    why: str
    needs: dict[str, tuple[str, ...]]
    apply: Callable[[ModuleType], None] | None = None


def register(patch: Patch) -> None:
    """Apply a patch the moment its module has been loaded, before anyone can take a name out of it."""
    wrapt.register_post_import_hook(functools.partial(apply, patch), patch.module)


def apply(patch: Patch, module: ModuleType) -> None:
    for name, parameters in patch.needs.items():
        check(module, name, parameters)
    if patch.apply is not None:
        patch.apply(module)


def check(module: ModuleType, name: str, parameters: tuple[str, ...]) -> None:
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise _misfit(f"{module.__name__}.{name} is missing")
        target = getattr(target, part)
    missing = [p for p in parameters if p not in inspect.signature(target).parameters]
    if missing:
        raise _misfit(f"{module.__name__}.{name} does not take {', '.join(missing)}")


def _misfit(what: str) -> ImportError:
    # Not the distribution's version: a source tree has none, and the development version goes by another name.
    upstream = getattr(sys.modules.get("llamafactory"), "__version__", "of unknown version")
    return ImportError(
        f"llamafactory_ext {__version__} does not fit LLaMA-Factory {upstream}: {what}. "
        "Install llamafactory>=0.9.4,<0.9.7, or set LLAMAFACTORY_EXT=0 to run LLaMA-Factory without the plugin."
    )


class replaced:  # noqa: N801  (reads as a verb)
    """An attribute of a module or an object, replaced for the time of a with block."""

    def __init__(self, module: Any, name: str, value: object) -> None:
        self.module, self.name, self.value = module, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.module, self.name)
        setattr(self.module, self.name, self.value)

    def __exit__(self, *exc_info: object) -> None:
        setattr(self.module, self.name, self.before)
