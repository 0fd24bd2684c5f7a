"""The models that are asked: their names on the command line, and what their folders hold."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from .. import hashes
from ..errors import UserError, in_a_line

BASE = "base"  # the run of the model itself, beside those of its adapters


class EngineName(StrEnum):
    vllm = "vllm"
    openai = "openai"
    hf = "hf"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    return hashes.of_model(Path(folder), ["*"]) if folder and Path(folder).is_dir() else None


def load_tokenizer(model: str) -> Any:
    """transformers' tokenizer of a model, with a chat template.

    Raises:
        UserError: if it cannot be loaded, or has no template that would be taken without naming it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(
            f"The tokenizer of {model} does not load ({in_a_line(error)}): correct its files, or add what is missing."
        ) from error
    template = tokenizer.chat_template
    if template and isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"{model} has chat templates {', '.join(sorted(template))}, and none called `default`: call one of them so."
        )
    if not template:
        raise UserError(f"{model} has no chat template: add a chat_template.jinja to its folder.")
    return tokenizer


def context_length(model: str) -> int | None:
    """How many tokens a model has been made for; None if its configuration does not say.

    Raises:
        UserError: if the configuration cannot be read.
    """
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end an answer, as vLLM has them: generation_config.json's, and the tokenizer's own.

    Without that file, config.json's take its place, as in transformers.

    Raises:
        UserError: if the file cannot be read, or names what is no token.
    """
    file = Path(model, "generation_config.json")
    if file.is_file():
        try:
            named = dict(json.loads(file.read_text(encoding="utf-8"))).get("eos_token_id")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): correct it, or remove it.") from error
    else:
        file = Path(model, "config.json")
        named = getattr(_text_config(model), "eos_token_id", None)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(each) is int for each in ids):
        raise UserError(f"{file} has the eos_token_id {json.dumps(named)}: write a token's id, or a list of them.")
    own = tokenizer.eos_token_id
    return sorted({each for each in ids if each >= 0} | (set() if own is None else {own}))


def _text_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except Exception as error:
        raise UserError(f"The config.json of {model} cannot be read ({in_a_line(error)}): correct it.") from error
