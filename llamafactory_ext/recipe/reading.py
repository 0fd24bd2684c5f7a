"""Read and check a recipe as `llamafactory-cli train` does, without starting anything."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..errors import UserError, in_a_line

Settings = dict[str, Any]

UNCUT = 2**31 - 1  # a cutoff_len that cuts nothing


def read_recipe(words: list[str]) -> Settings:
    """The settings of a command line like `recipe.yaml key=value …`, or of `key=value …` alone.

    Raises:
        UserError: if the file is missing or no mapping, or a word is no `key=value`.
    """
    from omegaconf import OmegaConf

    config: Any = OmegaConf.create()
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        path, *words = words
        if not Path(path).is_file():
            raise UserError(f"there is no recipe {path!r}: write a YAML file, then key=value words to change its keys.")
        try:
            config = OmegaConf.load(path)
        except OSError:  # which the command line says by itself
            raise
        except Exception as error:  # whatever the YAML parser raises
            raise UserError(f"the recipe {path!r} is not YAML ({error}).") from error
    for word in words:
        if "=" not in word:
            raise UserError(f"{word!r} is neither a YAML file nor key=value: write a recipe, then key=value words.")
    try:
        settings = OmegaConf.to_container(OmegaConf.merge(config, OmegaConf.from_cli(words)))
    except Exception as error:  # whatever the YAML parser and omegaconf raise: a list, an open bracket
        raise UserError(f"the recipe cannot be read ({in_a_line(error)}): correct it.") from error
    if not isinstance(settings, dict):
        raise UserError("the recipe is not a mapping of keys to values.")
    return {str(key): value for key, value in settings.items()}


def parse_recipe(settings: Settings) -> tuple[Any, Any, Any]:
    """LLaMA-Factory's model, data and fine-tuning arguments, every key and value of them checked.

    Training arguments are not built, because they start the distributed set-up that they ask for.

    Raises:
        UserError: for a key that no part of LLaMA-Factory or the plugin knows, or a value that they refuse.
    """
    from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments
    from transformers import HfArgumentParser

    kinds = (ModelArguments, DataArguments, FinetuningArguments)
    ours = {field.name for kind in kinds for field in fields(kind)}
    known = ours | {field.name for field in fields(TrainingArguments)}
    for key in settings:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"{key!r} is not a key of LLaMA-Factory or this plugin: correct or remove it.{hint}")

    parser = HfArgumentParser(kinds)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    try:
        model_args, data_args, finetuning_args = parser.parse_dict({k: v for k, v in settings.items() if k in ours})
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        check_numbers(settings, hints)  # which the checks of LLaMA-Factory take for granted
        raise UserError(str(error) or type(error).__name__) from error
    check_numbers(settings, hints)
    if model_args.adapter_name_or_path is not None and finetuning_args.finetuning_type not in ("lora", "oft"):
        raise UserError(
            f"LLaMA-Factory reads `adapter_name_or_path` with `finetuning_type: lora` only, not "
            f"{finetuning_args.finetuning_type!r}: write finetuning_type=lora."
        )
    for key in ("model_name_or_path", "ref_model", "dataset_dir"):
        if not isinstance(settings.get(key, ""), str | None):
            raise UserError(f"{key} is {settings[key]!r}: write a path or a name.")
    for key in ("model_name_or_path", "ref_model", "adapter_name_or_path", "ref_model_adapters"):
        check_folders(key, settings.get(key))
    return model_args, data_args, finetuning_args


def check_folders(key: str, value: Any, also: Sequence[str] = ()) -> None:
    """Refuse paths of models or adapters that do not exist; the hub would be asked for them.

    Args:
        key: of the recipe.
        value: its value: paths or names on the hub, with commas between them.
        also: what else a path begins with, besides `/` and `.`.

    Raises:
        UserError: for a path that does not exist.
    """
    for name in value.split(",") if isinstance(value, str) else ():
        if name.startswith(("/", ".", *also)) and not Path(name).exists():
            raise UserError(f"{key}: there is no {name}: write an existing folder, or a name on the hub.")


def check_numbers(settings: Settings, hints: dict[str, Any]) -> None:
    """Refuse values that are not the number a key needs; no library checks this, and all calculate with them.

    Args:
        settings: a recipe's.
        hints: the types of the keys that may be checked.

    Raises:
        UserError: for a text such as `1e3`, which YAML takes for no number, an empty value, or half a step.
    """
    for key in settings.keys() & hints.keys():
        value, allowed = settings[key], set(get_args(hints[key])) or {hints[key]}
        if not allowed <= {int, float, NoneType}:
            continue
        is_number = isinstance(value, int) or (float in allowed and isinstance(value, float) and math.isfinite(value))
        if not is_number and not (value is None and NoneType in allowed):
            raise UserError(f"{key} is {value!r}: write a {'' if float in allowed else 'whole '}number, or remove it.")


def check_sizes(data_args: Any) -> None:
    """Refuse sizes that would leave no data.

    Raises:
        UserError: for a number below 1.
    """
    for key in ("max_samples", "preprocessing_num_workers", "cutoff_len"):
        value = getattr(data_args, key)
        if value is not None and value < 1:
            raise UserError(f"{key} is {value}: write a whole number of at least 1.")


def data_sets(names: Sequence[str] | None, folder: str) -> list[Any]:
    """LLaMA-Factory's descriptions of data sets.

    Args:
        names: as `dataset` has them.
        folder: as `dataset_dir` has it.

    Raises:
        UserError: if dataset_info.json is missing or damaged, or does not say where one of the data sets is.
    """
    from llamafactory.data.parser import get_dataset_list

    named: list[Any] = list(names) if isinstance(names, list | tuple) else [] if names is None else [names]
    if not all(isinstance(name, str) for name in named):
        raise UserError(f"dataset is {', '.join(map(repr, named))}: write names from dataset_info.json.")
    try:
        return list(get_dataset_list(named, folder))
    except ValueError as error:
        raise UserError(f"{error} Write a `dataset` that it lists, and its folder as `dataset_dir`.") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the dataset_info.json in {folder!r} has no entry that LLaMA-Factory can read for each of "
            f'{", ".join(named)}: write one as an object with a "file_name", a "hf_hub_url" or the like '
            f"({type(error).__name__}: {error})."
        ) from error
