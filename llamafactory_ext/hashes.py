"""SHA-256 fingerprints, as hex, of the inputs that results depend on: values, data, models and recipes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The files of a saved model or adapter.
MODEL_FILES = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors", "*.bin", "*.py")
# The files that decide on its tokens.
TOKENIZER_FILES = ("token*", "*.jinja", "chat_template*", "vocab*", "merges*", "special_tokens_map.json", "*processor*")
# Recipe keys that name models, and those that name files that change the training.
MODEL_KEYS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters")
FILE_KEYS = ("pref_loss_file", "new_special_tokens_config", "deepspeed")


def of_value(value: Any) -> str:
    """Fingerprint of a JSON value; anything in it that JSON cannot hold is converted with `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_file(path: Path) -> str:
    """Fingerprint of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_data(path: Path) -> str:
    """Fingerprint of a file, or of a folder: of the relative paths and contents of all files in it."""
    if path.is_file():
        return of_file(path)
    return of_value(_of_files(path, (each for each in path.rglob("*") if each.is_file() and not _is_made(each))))


def _is_made(path: Path) -> bool:
    """Whether Python has made it beside code that ran."""
    return path.parent.name == "__pycache__"


def of_model(folder: Path, patterns: Iterable[str] = MODEL_FILES) -> dict[str, str]:
    """Fingerprints of the files of a saved model or adapter, by relative path."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return _of_files(folder, (path for path in found if path.is_file()))


def of_named(recipes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Fingerprints of the local models and files, without data, that recipes name, by the path in the recipe."""
    recipes = list(recipes)
    models = {path for each in recipes for key in MODEL_KEYS for path in str(each.get(key) or "").split(",") if path}
    files = {str(each[key]) for each in recipes for key in FILE_KEYS if each.get(key)}
    folders = [path for path in sorted(models) if Path(path).is_dir()]
    found: dict[str, Any] = {path: of_model(Path(path), (*MODEL_FILES, *TOKENIZER_FILES)) for path in folders}
    return found | {path: of_file(Path(path)) for path in sorted(files) if Path(path).is_file()}


def _of_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    files = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(of_file, files), strict=True))
