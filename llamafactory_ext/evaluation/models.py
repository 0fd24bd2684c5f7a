"""The models that are asked: their names on the command line, and the contents of their folders."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from .. import hashes
from ..errors import UserError, in_a_line

BASE = "base"  # the run of the model itself, beside those of its adapters


class EngineName(StrEnum):
    """Values of --engine."""

    vllm = "vllm"
    openai = "openai"
    hf = "hf"


class Dtype(StrEnum):
    """Values of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def local_model(model: str, engine: EngineName) -> str:
    """The model's folder, downloaded from the Hugging Face Hub if needed; for a server, only the name.

    Raises:
        UserError: if the model does not exist.
    """
    if not model:
        raise UserError("--model is missing: write a model folder or a name on the Hub.")
    if engine is EngineName.openai or Path(model, "config.json").is_file():
        return model
    if model.startswith((".", "/")) or Path(model).exists():
        raise UserError(f"{model} is not a model: name a folder with config.json, weights and tokenizer.")

    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, ignore_patterns=["original/*", "*.pth", "*.gguf"])
    except Exception as error:
        raise UserError(f"{model} is neither a folder nor available on the Hub ({error}): correct --model.") from error


def parse_adapters(words: list[str], engine: EngineName) -> dict[str, str]:
    """LoRA adapters by name, from NAME=DIR; for a server, DIR is not read.

    Raises:
        UserError: if a word has another form, or a folder is not an adapter's.
    """
    adapters = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name == BASE or "/" in name:
            raise UserError(f"--adapter {word}: write NAME=DIR, where NAME is not a path and not `{BASE}`.")
        if engine is not EngineName.openai and not Path(folder, "adapter_config.json").is_file():
            raise UserError(f"{folder} has no adapter_config.json: name the folder of a LoRA adapter with --adapter.")
        if name in adapters:
            raise UserError(f"--adapter {word}: the name {name} is taken: write another one.")
        adapters[name] = folder
    return adapters


def folder_hashes(folder: str | None) -> dict[str, str] | None:
    """SHA-256 of each file of a model or adapter; None if there is no folder."""
    return hashes.of_model(Path(folder), ["*"]) if folder and Path(folder).is_dir() else None


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, which has a chat template.

    Raises:
        UserError: if it cannot be loaded, or has no default chat template.
    """
    tokenizer = load_plain_tokenizer(model)
    template = tokenizer.chat_template
    if template and isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"{model} has chat templates {', '.join(sorted(template))}, but no `default`: rename one to `default`."
        )
    if not template:
        raise UserError(f"{model} has no chat template: add a chat_template.jinja to its folder.")
    return tokenizer


def load_plain_tokenizer(model: str) -> Any:
    """The model's tokenizer, with or without a chat template.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UserError(
            f"The tokenizer of {model} cannot be loaded ({in_a_line(error)}): correct or complete its files."
        ) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of a folder without files
        raise UserError(f"{model} holds no tokenizer: add its files, such as tokenizer.json, there.")
    return tokenizer


def context_length(model: str) -> int | None:
    """The context length of a model in tokens; None if its configuration does not say.

    Raises:
        UserError: if the configuration cannot be read.
    """
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end an answer: as in vLLM, those in generation_config.json and the tokenizer's own.

    Without that file, those in config.json are used, as in transformers.

    Raises:
        UserError: if the file cannot be read, or has an eos_token_id that is not a token id.
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
