"""sha256 of what results depend on, so that they are never taken for those of something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# What makes up a saved model or adapter.
MODEL_FILES = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors", "*.bin", "*.py")


def of_value(value: Any) -> str:
    """Of a value that JSON can hold; of another one in it, what `str` makes of that."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_data(path: Path) -> str:
    """Of a file, or of a folder: of the names and contents of all files in it."""
    if path.is_file():
        return of_file(path)
    return of_value(_of_files(path, (each for each in path.rglob("*") if each.is_file())))


def of_model(folder: Path) -> dict[str, str]:
    """Of each file of a saved model or adapter, by name."""
    return _of_files(folder, {path for pattern in MODEL_FILES for path in folder.glob(pattern)})


def _of_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    files = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(of_file, files), strict=True))
