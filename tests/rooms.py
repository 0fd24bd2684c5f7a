"""The package's rooms, and which modules import which: `python tests/rooms.py` prints both.

A room may import those before it in ROOMS, never those behind it, also not within a function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = "llamafactory_ext"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# From what everything rests on to what a user calls.
ROOMS = (
    "__init__",
    "errors",
    "examples",
    "whole_files",
    "paths",
    "hashes",
    "resuming",
    "rows",
    "plots",
    "distributions",
    "commandline",
    "patching",
    "evaluation",
    "losses",
    "recipe",
    "training",
    "scoring",
    "data",
    "planning",
    "environment",
    "sweep",
    "report",
    "webui",
    "seam",
    "_startup",
    "cli",
)


def modules() -> dict[str, Path]:
    """Every module by its name below the package; a package goes by `name.__init__`."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    return module.partition(".")[0]


def imports() -> dict[str, set[str]]:
    """By module, the package's modules that it imports anywhere, in functions and for annotations, too."""
    known = modules()
    return {name: set(_imported(name, path, known)) - {name} for name, path in known.items()}


def _imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = _below_the_package(name, node)
            if base is None:
                continue
            for alias in node.names:
                member = _joined(base, alias.name)
                meant = (member, _joined(member, "__init__"), base, _joined(base, "__init__"))
                yield next(each for each in meant if each in known)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith(PACKAGE) for alias in node.names), f"{name}: import from the package"


def _below_the_package(name: str, node: ast.ImportFrom) -> str | None:
    """What follows `from`, as a name below the package; None where it is another package's."""
    module = node.module or ""
    if node.level:
        parents = name.split(".")[: -node.level]
        return _joined(*parents, module)
    package, _, rest = module.partition(".")
    return rest if package == PACKAGE else None


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def in_order(graph: dict[str, set[str]]) -> list[str]:
    """The modules, each behind those that it imports.

    Raises:
        graphlib.CycleError: if some import each other in a circle.
    """
    return list(TopologicalSorter(graph).static_order())


if __name__ == "__main__":
    graph = imports()
    in_order(graph)
    for name in sorted(graph, key=lambda name: (ROOMS.index(room(name)), name)):
        print(f"{name:28} {' '.join(sorted(graph[name]))}".rstrip())
