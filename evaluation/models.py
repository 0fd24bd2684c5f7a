"""The models that are asked: their names on the command line, and what their folders hold."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from generations import file_hashes
from questions import UserError

BASE = "base"  # the run of the model itself, beside those of its adapters


class EngineName(StrEnum):
    vllm = "vllm"
    openai = "openai"
    hf = "hf"


def local_model(model: str, engine: EngineName) -> str:
    """The model's folder, fetched from the hub if it is a hub name; a served model is only a name.

    Raises:
        UserError: if there is no such model.
    """
    if not model:
        raise UserError("--model is missing: name a model folder or hub name.")
    if engine is EngineName.openai or Path(model, "config.json").is_file():
        return model
    if model.startswith((".", "/")) or Path(model).exists():
        raise UserError(f"There is no model at {model}: name a folder with config.json, weights and tokenizer.")

    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, ignore_patterns=["original/*", "*.pth", "*.gguf"])
    except Exception as error:
        raise UserError(f"{model} is neither a folder nor to be had from the hub ({error}).") from error


def parse_adapters(words: list[str], engine: EngineName) -> dict[str, str]:
    """LoRA adapters, written as NAME=DIR; a server's are only names.

    Raises:
        UserError: if a word is written otherwise, or a folder holds no adapter.
    """
    adapters = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name == BASE or "/" in name:
            raise UserError(f"--adapter {word}: write NAME=DIR, with a name that is no path and not `{BASE}`.")
        if engine is not EngineName.openai and not Path(folder, "adapter_config.json").is_file():
            raise UserError(f"{folder} holds no adapter_config.json: name the folder of a LoRA adapter with --adapter.")
        adapters[name] = folder
    return adapters


def folder_hashes(folder: str | None) -> dict[str, str] | None:
    """sha256 of the files of a model or adapter; None where there is no folder."""
    return file_hashes(Path(folder)) if folder and Path(folder).is_dir() else None
