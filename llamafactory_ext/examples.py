"""Recipes, DeepSpeed settings, sample data and the evaluation, which `llamafactory-ext examples` writes out.

Recipes name them by paths from the folder that holds these, such as examples/deepspeed/zero3.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

FOLDERS = ("examples", "data", "evaluation")
PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The folder that holds FOLDERS: the package's own, or the checkout of an editable install."""
    shipped = PACKAGE / "share"
    return shipped if shipped.is_dir() else PACKAGE.parent


def write_examples(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Copy the examples into a folder, as FOLDERS; yields each file and whether it is new.

    A file that is there already stays as it is, whatever it holds.

    Raises:
        UserError: if a folder has the name of a file.
    """
    for source in _sources():
        target = folder / source.relative_to(home())
        if target.is_dir():
            raise UserError(f"{str(target)!r} is a folder where a file would be: name another folder.")
        if target.exists():
            yield target, False
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        yield target, True


def _sources() -> Iterator[Path]:
    """What is versioned of them: no scripts of the repository's own, nothing that was made from the samples."""
    for name in FOLDERS:
        for path in sorted((home() / name).rglob("*")):
            if is_shipped(path.relative_to(home())):
                yield path


def is_shipped(path: Path) -> bool:
    """Whether a file belongs to the examples; setup.py asks this, too.

    Args:
        path: from the folder that holds these.
    """
    if path.parts[0] == "data":
        return path.name.endswith("_sample.jsonl") or path.name in ("dataset_info.json", "arithmetic_pairs.jsonl")
    if path.parts[0] == "evaluation":
        return path.suffix in (".py", ".txt")
    return path.suffix in (".yaml", ".json") or (path.parts[:2] == ("examples", "custom_loss") and path.suffix == ".py")
