"""The rows of a file, a folder or a data set of the hub: each with its fields or what is wrong with it."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from .errors import UserError, in_a_line

Fields = dict[str, Any]

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SUFFIXES = (".jsonl", ".gz", ".json", ".parquet")
KINDS = ".jsonl, .jsonl.gz, .json or .parquet"
IN_FOLDERS = re.compile(r"\.(jsonl|jsonl\.gz|parquet)$")  # a .json there may be anything
# `-00000-of-00002`, `-00000-of-00001-6f3344faa23e9b0a`, `_1`, and a number that is all of the name.
SHARD = re.compile(r"(^|[-_])\d+([-_]of[-_]\d+)?(-[0-9a-f]{16})?$")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MEANINGLESS = ("", "data", "default", "part", "shard")  # names of files and folders that are no split's


class BadRow(ValueError):  # noqa: N818  (a reason, not a fault of the program)
    """A row that no pair can be made of; the message is the reason, the same for all rows of a kind."""


@dataclass(frozen=True)
class Row:
    """A row of a source: its line or number, from 1, and its fields or what is wrong with it."""

    number: int
    fields: Fields | BadRow


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of a file or of a hub's data set, with a progress bar; nothing is held in memory but for `.json`.

    Args:
        source: a path ending in .jsonl, .jsonl.gz, .json (a list) or .parquet, a folder of such files but .json, or an
            `owner/name` or `owner/name:subset` of the Hugging Face hub.
        split: the hub's or the folder's split (see `splits_of`); a file has none.

    Raises:
        UserError: if there is no such source or split, it is of another kind, or cannot be read to its end.
    """
    return _to_the_end(_rows_of(source, split), source)


def _to_the_end(rows: Iterator[Row], source: str) -> Iterator[Row]:
    """The rows; a source that ends within one, or is damaged, raises a sentence."""
    number = 0
    try:
        for row in rows:
            number = row.number
            yield row
    except UserError:
        raise
    except Exception as error:  # whatever the system, gzip, pyarrow or the hub's client raises
        raise UserError(
            f"{source!r} cannot be read beyond row {number} ({in_a_line(error)}): download it again, or name another."
        ) from error


def _rows_of(source: str, split: str) -> Iterator[Row]:
    path = Path(source)
    if not os.path.exists(path):  # unlike Path.exists, also of a name that is too long for a file's
        if HUB_NAME.fullmatch(source) and path.suffix not in SUFFIXES:
            return _hub_rows(source, split)
        raise UserError(f"{source!r} is not there: write the path of a {KINDS} file, or owner/name of the hub.")
    if path.is_dir():
        return _folder_rows(path, split)
    _check_content(path)
    if path.suffix == ".parquet":
        return _parquet_rows([path])
    if path.suffix == ".json":
        return _list_rows(path)
    if path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]:
        return _line_rows(path)
    raise UserError(f"{source!r} is of no kind that can be read: name a {KINDS} file.")


def _check_content(path: Path) -> None:
    """Refuse what stands for a file in a git repository that was cloned without Git LFS."""
    try:
        with path.open("rb") as file:
            is_pointer = path.is_file() and file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({in_a_line(error)}): name a {KINDS} file.") from error
    if is_pointer:
        raise UserError(
            f"{str(path)!r} is not the data but a pointer of Git LFS: write `git lfs pull` in its folder, or download "
            "the file."
        )


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a split's files in the order of their names, numbered through."""
    splits = {path: splits_of(path.relative_to(folder)) for path in _data_files(folder)}
    if not splits:
        raise UserError(f"the folder {str(folder)!r} holds no parquet or jsonl file: name a {KINDS} file.")
    files = [path for path, names in splits.items() if split in names]
    if not files:
        there = ", ".join(sorted(set().union(*splits.values())))
        raise UserError(f"the folder {str(folder)!r} has no split {split!r}: write one that is there ({there}).")
    if len({path.suffix == ".parquet" for path in files}) > 1:
        raise UserError(
            f"the folder {str(folder)!r} has the split {split!r} as parquet and as jsonl: name a {KINDS} file."
        )
    for path in files:
        _check_content(path)
    if files[0].suffix == ".parquet":
        return _parquet_rows(files)
    rows = itertools.chain.from_iterable(map(_line_rows, files))
    return (Row(number, row.fields) for number, row in enumerate(rows, start=1))


def _data_files(folder: Path) -> list[Path]:
    """The parquet and jsonl files in a folder and below, but for hidden ones."""
    found = (path for path in folder.glob("**/*") if IN_FOLDERS.search(path.name))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def splits_of(path: Path) -> set[str]:
    """The names that a file of a data set's folder has as a split's: its own, without the number of a shard, and those
    of the folders that it is in. Where none of them says anything, it is `train`, as on the hub.

    Args:
        path: relative to the folder: `data/test-00000-of-00002.parquet`, `test.jsonl`, `test/0000.parquet`.
    """
    own = SHARD.sub("", IN_FOLDERS.sub("", path.name))
    return {name for name in (own, *path.parts[:-1]) if name not in MEANINGLESS} or {"train"}


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file, _bar(path.name, path.stat().st_size, unit="B", unit_scale=True) as bar:
        lines: IO[bytes] = io.BufferedReader(gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
        read = 0
        for number, line in enumerate(lines, start=1):
            if number % 1000 == 0:
                bar.update(file.tell() - read)
                read = file.tell()
            if line.strip():
                yield Row(number, parse(line))
        bar.update(file.tell() - read)


def parse(line: bytes) -> Fields | BadRow:
    """The fields of a line of JSON, or what is wrong with it."""
    try:
        fields = json.loads(line)
    except UnicodeDecodeError:
        return BadRow("not UTF-8: save the file in that encoding")
    except (ValueError, RecursionError):  # lists in lists in lists
        return BadRow("not a line of JSON")
    return fields if isinstance(fields, dict) else BadRow("not a JSON object")


def _list_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes()
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        if isinstance(parse(content.lstrip().partition(b"\n")[0]), dict):  # a .jsonl by another name
            yield from _line_rows(path)
            return
        raise UserError(f"{str(path)!r} is not JSON ({error}): name a {KINDS} file.") from error
    if not isinstance(rows, list):
        raise UserError(f"{str(path)!r} holds no list of rows: name a {KINDS} file.")
    for number, fields in enumerate(_bar(path.name, rows), start=1):
        yield Row(number, fields if isinstance(fields, dict) else BadRow("not a JSON object"))


def _parquet_rows(paths: list[Path]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        files = [pyarrow.parquet.ParquetFile(path) for path in paths]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{str(paths[0])!r} cannot be read as parquet ({error}): name a {KINDS} file.") from error
    return _batched_rows(files, paths[0].name)


def _batched_rows(files: list[Any], name: str) -> Iterator[Row]:
    number = 0
    with _bar(name, sum(file.metadata.num_rows for file in files)) as bar:
        for file in files:
            for batch in file.iter_batches(batch_size=1000):
                for fields in _fields_of(batch):
                    number += 1
                    yield Row(number, fields)
                bar.update(batch.num_rows)


def _fields_of(batch: Any) -> list[Fields | BadRow]:
    """The rows of a batch of Arrow's; parquet holds texts that are not UTF-8, and times that Python has no word for."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            return [BadRow("holds a text that is not UTF-8, or a value out of range")]
        return [fields for number in range(batch.num_rows) for fields in _fields_of(batch.slice(number, 1))]


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        repository, _, subset = name.partition(":")
        rows = datasets.load_dataset(repository, subset or None, split=split, streaming=True)
    except Exception as error:  # whatever the hub's client raises: no such name, no such split, no network
        raise UserError(
            f"{name!r} with split {split!r} cannot be had from the hub ({type(error).__name__}: {error}): "
            "check both, or download it and name the file."
        ) from error
    return (Row(number, fields) for number, fields in enumerate(_bar(name, rows), start=1))


def _bar(name: str, rows_or_total: Any, **options: Any) -> Any:
    """A progress bar on a terminal, and silence in a log."""
    what = {"total": rows_or_total} if isinstance(rows_or_total, int) else {"iterable": rows_or_total}
    return tqdm(desc=name, disable=None, leave=False, **{"unit": " rows", **what, **options})


def text(fields: Fields, column: str) -> str:
    """A column that must hold text.

    Raises:
        BadRow: if it is missing, empty or no text, or holds half a character.
    """
    value = fields.get(column)
    if not isinstance(value, str):
        raise BadRow(f"no text in the column {column!r}")
    if not value.strip():
        raise BadRow(f"the column {column!r} is empty")
    check_characters(value)
    return value


def check_characters(value: str) -> None:
    """Refuse a text that cannot be written as UTF-8.

    Raises:
        BadRow: if it holds one half of a surrogate pair, as a text does that was cut within an emoji.
    """
    if not is_utf8(value):
        raise BadRow("holds half a character (a lone surrogate), which no tokenizer takes")


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
