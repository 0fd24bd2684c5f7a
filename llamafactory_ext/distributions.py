"""Installed distributions by import name: a fork has another distribution name, a source tree may have none."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import Distribution, PackageNotFoundError, distributions, packages_distributions
from importlib.metadata import distribution as by_name
from typing import Any


def distribution(package: str) -> Distribution | None:
    """The distribution that a package comes from, like `llamafactory-kt` for `llamafactory`.

    None if it is not installed, or runs from a source tree that has no metadata.
    """
    for name in (package, *_providers().get(package.replace("-", "_"), ())):
        try:
            found = by_name(name)
        except PackageNotFoundError:
            continue
        if package != "llamafactory" or _code_version() in (_metadata(found, "version"), None):
            return found
    return None


def version(package: str) -> str | None:
    """The installed version, or None; LLaMA-Factory's is that of its code, with or without metadata."""
    found = distribution(package)
    if found is None and package == "llamafactory":
        return _code_version()
    return None if found is None else _metadata(found, "version")


def requires(package: str) -> list[str]:
    """The requirements in a package's metadata; an empty list if there is no metadata."""
    found = distribution(package)
    return [] if found is None else _metadata(found, "requires") or []


def unreadable() -> list[str]:
    """Metadata folders that are not valid text. A single one keeps transformers from being imported."""
    return [str(getattr(each, "_path", each)) for each in distributions() if _metadata(each, "metadata") is None]


def _metadata(found: Distribution, field: str) -> Any:
    """A field of a distribution's metadata; None if it is missing or cannot be read."""
    try:
        return getattr(found, field)
    except (KeyError, UnicodeDecodeError):
        return None


@functools.cache
def _providers() -> dict[str, list[str]]:
    """Import name -> distribution names, empty if any metadata is damaged. Takes half a second, hence the cache."""
    try:
        return {package: sorted(set(names)) for package, names in packages_distributions().items()}
    except UnicodeDecodeError:
        return {}


def _code_version() -> str | None:
    """The version in LLaMA-Factory's code; it decides between several distributions of the package."""
    try:
        code: str = importlib.import_module("llamafactory.extras.env").VERSION
    except ImportError:
        return None
    return code
