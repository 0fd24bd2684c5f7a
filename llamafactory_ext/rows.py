"""Rows of a file, a folder or a data set on the Hugging Face Hub: each with its fields or what is wrong with it."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import math
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
# `-00000-of-00002`, `-00000-of-00001-6f3344faa23e9b0a`, `_1`, or a name that is only a number.
SHARD = re.compile(r"(^|[-_])\d+([-_]of[-_]\d+)?(-[0-9a-f]{16})?$")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MEANINGLESS = ("", "data", "default", "part", "shard")  # file and folder names that do not name a split

# Columns with external scores of the two responses.
SCORES = ("score_chosen", "score_rejected")


class BadRow(ValueError):  # noqa: N818  (a reason, not a fault of the program)
    """A row that cannot be used. The message is the reason, the same for all rows of a kind."""


@dataclass(frozen=True)
class Row:
    """A row: its line or number, from 1, and its fields or what is wrong with it."""

    number: int
    fields: Fields | BadRow


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of a file, a folder or a Hub data set, with a progress bar. Only `.json` files are read as a whole.

    Args:
        source: the path of a .jsonl, .jsonl.gz, .json (a list) or .parquet file, a folder of .jsonl, .jsonl.gz or
            .parquet files, or `owner/name` or `owner/name:subset` on the Hugging Face Hub.
        split: of a Hub data set or a folder (see `splits_of`); ignored for a file.

    Raises:
        UserError: if the source or split does not exist, has an unsupported type, or cannot be read to its end.
    """
    return _to_the_end(_rows_of(source, split), source)


def _to_the_end(rows: Iterator[Row], source: str) -> Iterator[Row]:
    """The rows; raises a UserError where the source is damaged or ends within a row."""
    number = 0
    try:
        for row in rows:
            number = row.number
            yield row
    except UserError:
        raise
    except Exception as error:  # whatever the system, gzip, pyarrow or the Hub's client raises
        raise UserError(
            f"{source!r} cannot be read beyond row {number} ({in_a_line(error)}): download it again, or name another."
        ) from error


def _rows_of(source: str, split: str) -> Iterator[Row]:
    path = Path(source)
    if not source:
        raise UserError(f"no data is named: write the path of a {KINDS} file, or owner/name on the Hugging Face Hub.")
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long for a file
        if HUB_NAME.fullmatch(source) and path.suffix not in SUFFIXES:
            return _hub_rows(source, split)
        raise UserError(
            f"{source!r} does not exist: write the path of a {KINDS} file, or owner/name on the Hugging Face Hub."
        )
    if path.is_dir():
        return _folder_rows(path, split)
    _check_content(path)
    if path.suffix == ".parquet":
        return _parquet_rows([path])
    if path.suffix == ".json":
        return _list_rows(path)
    if path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]:
        return _line_rows(path)
    raise UserError(f"{source!r} has an unsupported file type: name a {KINDS} file.")


def _check_content(path: Path) -> None:
    """Refuse a file that cannot be opened, or a pointer from a repository that was cloned without Git LFS."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER)) if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({in_a_line(error)}): name a {KINDS} file.") from error
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{str(path)!r} is encoded as UTF-16: save it as UTF-8.")
    if start == LFS_POINTER:
        raise UserError(
            f"{str(path)!r} is a Git LFS pointer, not the data: run `git lfs pull` in its folder, or download the file."
        )


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a split's files, ordered by file name and numbered across files."""
    splits = {path: splits_of(path.relative_to(folder)) for path in _data_files(folder)}
    if not splits:
        raise UserError(f"the folder {str(folder)!r} contains no parquet or jsonl file: name a {KINDS} file.")
    files = [path for path, names in splits.items() if split in names]
    if not files:
        there = ", ".join(sorted(set().union(*splits.values())))
        raise UserError(f"the folder {str(folder)!r} has no split {split!r}: choose one of {there}.")
    if len({path.suffix == ".parquet" for path in files}) > 1:
        raise UserError(
            f"the folder {str(folder)!r} has the split {split!r} both as parquet and as jsonl: name one of the files."
        )
    for path in files:
        _check_content(path)
    if files[0].suffix == ".parquet":
        return _parquet_rows(files)
    rows = itertools.chain.from_iterable(map(_line_rows, files))
    return (Row(number, row.fields) for number, row in enumerate(rows, start=1))


def _data_files(folder: Path) -> list[Path]:
    """The parquet and jsonl files in a folder and its subfolders, without hidden ones."""
    found = (path for path in folder.glob("**/*") if IN_FOLDERS.search(path.name))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def splits_of(path: Path) -> set[str]:
    """The splits that a file in a data set's folder belongs to: its own name without the shard number, and the names of
    the folders that it is in. If none of these names a split, it is `train`, as on the Hugging Face Hub.

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
                yield Row(number, parse(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line))
        bar.update(file.tell() - read)


def parse(line: bytes) -> Fields | BadRow:
    """The fields of one line of a .jsonl file, or what is wrong with it."""
    try:
        fields = json.loads(line.decode())  # of bytes, json would guess the encoding
    except UnicodeDecodeError:
        return BadRow("not UTF-8: save the file as UTF-8")
    except (ValueError, RecursionError):  # too deeply nested
        return BadRow("not valid JSON")
    return fields if isinstance(fields, dict) else BadRow("not a JSON object")


def _list_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        if isinstance(parse(content.lstrip().partition(b"\n")[0]), dict):  # a .jsonl file with another suffix
            yield from _line_rows(path)
            return
        raise UserError(
            f"{str(path)!r} is not valid JSON ({error}): correct it, or name another {KINDS} file."
        ) from error
    if not isinstance(rows, list):
        raise UserError(_no_list(path, rows))
    for number, fields in enumerate(_bar(path.name, rows), start=1):
        yield Row(number, fields if isinstance(fields, dict) else BadRow("not a JSON object"))


def _no_list(path: Path, content: Any) -> str:
    """What to write in place of a .json file that is not a list; some hold the list in an object, as `{"data": []}`."""
    lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    if len(lists) == 1:
        what = f"an object, not a list of rows: if {lists[0]!r} holds the rows, write only that list to the file"
    else:
        what = "not a list of rows: write one"
    return f"{str(path)!r} is {what}, as [{{…}}, {{…}}]."


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
    """The rows of an Arrow batch, one by one if one of them holds invalid UTF-8 or a time out of Python's range."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            return [BadRow("contains text that is not UTF-8, or a value out of range")]
        return [fields for number in range(batch.num_rows) for fields in _fields_of(batch.slice(number, 1))]


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        repository, _, subset = name.partition(":")
        rows = datasets.load_dataset(repository, subset or None, split=split, streaming=True)
    except Exception as error:  # whatever the Hub's client raises: no such name, no such split, no network
        raise UserError(
            f"{name!r} with split {split!r} cannot be loaded from the Hugging Face Hub ({type(error).__name__}: "
            f"{error}): check the name and the split, or download the data and name the file."
        ) from error
    return (Row(number, fields) for number, fields in enumerate(_bar(name, rows), start=1))


def _bar(name: str, rows_or_total: Any, **options: Any) -> Any:
    """A progress bar on a terminal; nothing in a log."""
    what = {"total": rows_or_total} if isinstance(rows_or_total, int) else {"iterable": rows_or_total}
    return tqdm(desc=name, disable=None, leave=False, **{"unit": " rows", **what, **options})


def text(fields: Fields, column: str) -> str:
    """The text in a column.

    Raises:
        BadRow: if it is missing, not text or empty, or contains half a character.
    """
    value = fields.get(column)
    if not isinstance(value, str):
        raise BadRow(f"no text in the column {column!r}")
    if not value.strip():
        raise BadRow(f"the column {column!r} is empty")
    check_characters(value)
    return value


def number(value: Any) -> float | None:
    """A finite score, or None for anything else: a column that mixes text and numbers cannot be loaded."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and -math.inf < value < math.inf else None


def check_characters(value: str) -> None:
    """Refuse text that cannot be written as UTF-8.

    Raises:
        BadRow: if it contains half of a surrogate pair, as text does that was cut within an emoji.
    """
    if not is_utf8(value):
        raise BadRow("contains half a character (a lone surrogate), which no tokenizer accepts")


def is_utf8(text: str) -> bool:
    """Whether text can be written as UTF-8: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
