"""The recipes, DeepSpeed settings, sample data and evaluation scripts that `llamafactory-ext examples` writes.

Recipes refer to them by relative paths, such as examples/deepspeed/zero3.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

FOLDERS = ("examples", "data", "evaluation")
PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The folder that contains FOLDERS: in the package, or in the checkout of an editable install."""
    shipped = PACKAGE / "share"
    return shipped if shipped.is_dir() else PACKAGE.parent


def write_examples(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Copy FOLDERS into a folder and yield each file with whether it is new. Existing files are kept.

    Raises:
        UserError: if a folder is where a file must be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file: choose a folder.")
    for source in _sources():
        target = folder / source.relative_to(home())
        if target.is_dir():
            raise UserError(f"{str(target)!r} is a folder, and a file must be written there: choose another folder.")
        if target.exists():
            yield target, False
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        yield target, True


def _sources() -> Iterator[Path]:
    """The files to copy: without the repository's own scripts and without data made from the samples."""
    for name in FOLDERS:
        for path in sorted((home() / name).rglob("*")):
            if is_shipped(path.relative_to(home())):
                yield path


def is_shipped(path: Path) -> bool:
    """Whether a file belongs to the examples; setup.py uses this as well.

    Args:
        path: relative to `home()`.
    """
    if path.parts[0] == "data":
        return path.name.endswith("_sample.jsonl") or path.name in ("dataset_info.json", "arithmetic_pairs.jsonl")
    if path.parts[0] == "evaluation":
        return path.suffix in (".py", ".txt")
    return path.suffix in (".yaml", ".json") or (path.parts[:2] == ("examples", "custom_loss") and path.suffix == ".py")
