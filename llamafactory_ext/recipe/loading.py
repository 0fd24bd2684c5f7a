"""Load a recipe's tokenizer and pairs with LLaMA-Factory's functions; errors name the file and the line."""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, in_a_line
from ..rows import SUFFIXES, BadRow, Fields, Row, is_utf8, read_rows
from .reading import check_sizes, data_sets


@dataclass(frozen=True)
class Tokenization:
    """What makes tokens of a conversation.

    Args:
        tokenizer: as LLaMA-Factory prepares it.
        processor: of pictures and sounds; None where the model has none.
        template: LLaMA-Factory's.
        chat_template: the one that the tokenizer came with.
    """

    tokenizer: Any
    processor: Any
    template: Any
    chat_template: str | None


def load_tokenization(model_args: Any, data_args: Any) -> Tokenization:
    """The tokenization of a recipe.

    Raises:
        UserError: if the tokenizer cannot be loaded, there is no such template, or none can be read off its own.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    _check_template(data_args.template)
    try:
        tools = load_tokenizer(model_args)
        tokenizer = tools["tokenizer"]
        own_template = tokenizer.chat_template
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
    except Exception as error:  # whatever transformers, and a chat template that is tried out, raise
        name = model_args.model_name_or_path
        hint = "" if data_args.template else " Write a `template`, as none is named."
        raise UserError(f"the tokenizer of {name!r} cannot be used: {in_a_line(error).rstrip('.,')}.{hint}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of a folder without files
        raise UserError(
            f"{model_args.model_name_or_path!r} holds no tokenizer: add its files, such as tokenizer.json, there."
        )
    return Tokenization(tokenizer, tools["processor"], template, own_template)


def _check_template(name: Any) -> None:
    from llamafactory.data.template import TEMPLATES

    if name is not None and not (isinstance(name, str) and name in TEMPLATES):
        nearest = difflib.get_close_matches(str(name), TEMPLATES, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"template is {name!r}, which LLaMA-Factory does not have: correct it.{hint}")


def load_pairs(model_args: Any, data_args: Any) -> Any:
    """The pairs of the recipe's data sets in LLaMA-Factory's standard format, none skipped yet.

    Raises:
        UserError: if they cannot be loaded: as the training would stop, but with the file and the line.
    """
    from llamafactory.data.loader import _get_merged_dataset
    from transformers import TrainingArguments

    descriptions = data_sets(data_args.dataset, data_args.dataset_dir)
    check_sizes(data_args)
    training_args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    try:
        return _get_merged_dataset(data_args.dataset, model_args, data_args, training_args, stage="rm")
    except Exception as error:  # whatever datasets, pyarrow and LLaMA-Factory raise
        said_by_us = str(error).startswith("data set ")  # which names the row itself
        reason = (None if said_by_us else next(_faults(descriptions, data_args), None)) or _in_words(error)
        names = ", ".join(data_args.dataset)
        raise UserError(f"the data sets {names} cannot be loaded: {reason.rstrip('.!')}.") from error


def source_files(description: Any, dataset_dir: str) -> list[Path]:
    """The files that LLaMA-Factory reads of a data set in a folder, in its order; none where it reads others too."""
    if description.load_from != "file":
        return []
    path = Path(dataset_dir, description.dataset_name)
    files = [path / name for name in os.listdir(path)] if path.is_dir() else [path]  # of every split, as they come
    return [] if any(file.suffix not in SUFFIXES for file in files) else files


def source_rows(description: Any, dataset_dir: str) -> Iterator[Row]:
    """The rows that LLaMA-Factory reads of a data set, in its order; none where they cannot be read like that."""
    if description.load_from == "hf_hub":
        name, subset = description.dataset_name, description.subset
        return read_rows(f"{name}:{subset}" if subset else name, description.split)
    return itertools.chain.from_iterable(read_rows(str(file)) for file in source_files(description, dataset_dir))


def _compressed(description: Any, dataset_dir: str) -> list[Path]:
    path = Path(dataset_dir, description.dataset_name)
    return [path] if description.load_from == "file" and path.suffix == ".gz" and path.is_file() else []


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _in_words(error: Exception) -> str:
    if isinstance(error, StopIteration):  # LLaMA-Factory asks for a first row
        return "they hold no rows: add at least one"
    return in_a_line(error)


def _faults(descriptions: Iterable[Any], data_args: Any) -> Iterator[str]:
    """What keeps local files from being loaded, each with the file and the line."""
    for description in descriptions:
        if not description.ranking:
            yield f'{description.dataset_name} is not marked as pairs in dataset_info.json: write "ranking": true there'
        wanted = description.num_samples
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            yield f"num_samples is {wanted!r} in dataset_info.json: write a whole number of at least 1"
        for file in _compressed(description, data_args.dataset_dir):
            yield f"{str(file)!r} is compressed, which LLaMA-Factory does not read: unpack it, and name what comes out"
        for file in source_files(description, data_args.dataset_dir):
            try:
                fault = _first_fault(file, description, data_args)
            except UserError as error:  # that the file cannot be read at all
                fault = str(error)
            if fault is not None:
                yield fault


def _first_fault(file: Path, description: Any, data_args: Any) -> str | None:
    """The first row of a file that does not go with those before, or that LLaMA-Factory cannot make a pair of."""
    if file.suffix == ".jsonl" and (twice := _first_key_written_twice(file)) is not None:
        return twice
    seen: dict[str, tuple[str, str]] = {}
    columns: Fields = {}
    number = 0
    for number, fields in _numbered(file):
        where = f"{str(file)!r}, {_place(file, number)}"
        if isinstance(fields, BadRow):
            return f"{where}: {fields}: correct or remove it"
        columns |= dict.fromkeys(fields)
        for place, kind in _kinds(fields):
            if kind == HALF:
                return f"{where}: {place} holds {HALF}, which no tokenizer accepts: remove it"
            before, first = seen.setdefault(place, (kind, _place(file, number)))
            if kind != before:
                return f"{where}: {place} holds {kind} there, and {before} in {first}: write the same kind in all rows"
    return _first_refused(file, columns, description, data_args) if number else f"{str(file)!r} holds no rows"


def _first_key_written_twice(file: Path) -> str | None:
    """Which Python's json takes, with the last value, and pyarrow does not."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            raise KeyError(next(key for key in keys if keys.count(key) > 1))
        return fields

    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line, object_pairs_hook=check)
            except KeyError as error:
                return f"{str(file)!r}, line {number}: it has the key {error} twice: remove one"
            except (ValueError, RecursionError):  # told by who reads the rows
                continue
    return None


def _first_refused(file: Path, columns: Fields, description: Any, data_args: Any) -> str | None:
    from llamafactory.data.converter import get_dataset_converter

    if getattr(description, "answers", None) is not None:  # another converter's, whose errors name the row
        return None
    try:
        converter = get_dataset_converter(description.formatting, description, data_args)
    except ValueError:  # there is none, which LLaMA-Factory says itself
        return None
    for number, fields in _numbered(file):
        where = f"{str(file)!r}, {_place(file, number)}"
        try:
            converter({**columns, **fields})
        except KeyError as error:
            what = f"it has no column {error}, which dataset_info.json names"
            if error.args == (None,):
                what = f"dataset_info.json names no column for what formatting {description.formatting!r} needs"
            return f"{where}: {what}"
        except Exception as error:  # whatever the converter does not expect
            return f"{where}: LLaMA-Factory cannot make a pair from it ({in_a_line(error)})"
    return None


def _numbered(file: Path) -> Iterator[tuple[int, Any]]:
    return ((row.number, row.fields) for row in read_rows(str(file)))


def _place(file: Path, number: int) -> str:
    return f"{'row' if file.suffix in ('.json', '.parquet') else 'line'} {number}"


HALF = "half a character (a lone surrogate)"
_KINDS: dict[type, str] = {str: "text", bool: "true or false", int: "a number", float: "a number"}


def _kinds(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every place in a row, such as `'history'[]`, with the kind of what is there; a null is of any kind."""
    if isinstance(value, dict):
        if place:
            yield place, "an object"
        for key, part in value.items():
            yield from _kinds(part, f"{place}.{key}" if place else repr(key))
    elif isinstance(value, list):
        yield place, "a list"
        for part in value:
            yield from _kinds(part, f"{place}[]")
    elif isinstance(value, str) and not is_utf8(value):
        yield place, HALF
    elif value is not None:
        yield place, _KINDS.get(type(value), type(value).__name__)
