"""Rows in, pairs out: every row that is read is either written or reported, and a file is whole or not there.

Pairs are written in LLaMA-Factory's alpaca layout for ranking data: one JSON object a line with `instruction`
(the last user message), `chosen` and `rejected`, and where there are such, `system` and `history` (the turns before,
as lists of a user message and its answer).
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..errors import UserError, in_a_line
from ..whole_files import whole_file, write_whole

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


# --- reading ---------------------------------------------------------------------------------------------------------


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
                yield Row(number, _parse(line))
        bar.update(file.tell() - read)


def _parse(line: bytes) -> Fields | BadRow:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # of JSON or of UTF-8; lists in lists in lists
        return BadRow("not a line of JSON")
    return fields if isinstance(fields, dict) else BadRow("not a JSON object")


def _list_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes()
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        if isinstance(_parse(content.lstrip().partition(b"\n")[0]), dict):  # a .jsonl by another name
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
    except (pyarrow.ArrowException, OSError) as error:
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
    _check_characters(value)
    return value


def _check_characters(value: str) -> None:
    if not _is_utf8(value):
        raise BadRow("holds half a character (a lone surrogate), which no tokenizer takes")


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the rows: how many were written how, or dropped why, and the first lines of each kind."""

    written: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    def count(self, counter: Counter[str], what: str, row: Row) -> None:
        counter[what] += 1
        lines = self.first_lines.setdefault(what, [])
        if len(lines) < 5:
            lines.append(row.number)


def write_pairs(
    rows: Iterable[Row], make_pair: Callable[[Row, Fields], tuple[str, Fields]], output: Path, overwrite: bool = False
) -> Tally:
    """Make a pair of each row, and write the pairs, and beside them (`*.dropped.jsonl`) the rows that gave none.

    Args:
        rows: from `read_rows`.
        make_pair: maps a row and its fields to how the pair was made (a word for the tally) and the pair; raises
            BadRow for a row that gives none.
        output: a .jsonl file; it appears when all rows are done.
        overwrite: whether it may replace a file.

    Raises:
        UserError: if `output` may not be written, or no row gave a pair.
    """
    check_output(output, overwrite)
    tally = Tally()
    dropped_path = output.with_name(f"{output.stem}.dropped.jsonl")
    with whole_file(output) as pairs, whole_file(dropped_path) as dropped:
        for row in rows:
            try:
                if isinstance(row.fields, BadRow):
                    raise row.fields
                how, pair = make_pair(row, row.fields)
                if pair["chosen"] == pair["rejected"]:
                    raise BadRow("chosen and rejected are identical")
                line = _json(pair)
                _check_characters(line)
            except BadRow as reason:
                tally.count(tally.dropped, str(reason), row)
                fields = None if isinstance(row.fields, BadRow) else row.fields
                dropped.write(_escaped({"line": row.number, "reason": str(reason), "row": fields}) + "\n")
            else:
                tally.count(tally.written, how, row)
                pairs.write(line + "\n")
        if not tally.written:
            raise UserError(f"no row gave a pair, so nothing was written: {_most_common(tally)}.")
    if not tally.dropped:
        dropped_path.unlink()
    return tally


def _most_common(tally: Tally) -> str:
    if not tally.dropped:
        return "the source is empty"
    reason, count = tally.dropped.most_common(1)[0]
    return f"{reason} ({count:,} rows, the first in line {tally.first_lines[reason][0]})"


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse, before anything is read, an output of another kind, one that is there, or a name that is taken."""
    if output.suffix != ".jsonl":
        raise UserError(f"the output {str(output)!r} must end in .jsonl.")
    if output.exists() and not overwrite:
        raise UserError(f"{str(output)!r} is there already: give another --output, or --overwrite.")
    _registered(output)


def _json(fields: Fields, **options: Any) -> str:
    return json.dumps(fields, default=str, **{"ensure_ascii": False, **options})


def _escaped(fields: Fields, **options: Any) -> str:
    """As JSON that can be written, whatever is in it: half a character only as `\\ud83c`."""
    readable = _json(fields, **options)
    return readable if _is_utf8(readable) else _json(fields, ensure_ascii=True, **options)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- registering -----------------------------------------------------------------------------------------------------

INFO = "dataset_info.json"


def register(output: Path, columns: Iterable[str] = ()) -> bool:
    """Name the pairs in the `dataset_info.json` beside them, so that a recipe can say `dataset: <stem>` at once.

    Args:
        output: the file of pairs.
        columns: which columns its rows have beside instruction, chosen and rejected: system, history.

    Returns:
        Whether the name is new; an entry that names this file already stays as it is.

    Raises:
        UserError: if the name belongs to another file, or dataset_info.json is no JSON object.
    """
    info = _registered(output)
    if output.stem in info:
        return False
    names = {"prompt": "instruction", **{column: column for column in columns}, "chosen": "chosen"}
    info[output.stem] = {"file_name": output.name, "ranking": True, "columns": {**names, "rejected": "rejected"}}
    write_whole(output.with_name(INFO), _escaped(info, indent=2) + "\n")
    return True


def _registered(output: Path) -> Fields:
    """What the `dataset_info.json` beside the output holds, checked that the output's name is free or its own."""
    info = registered(output.parent)
    if output.stem in info and file_of(info, output.stem) != output.name:
        path = str(output.with_name(INFO))
        raise UserError(f"{path!r} has another data set called {output.stem!r}: give another --output.")
    return info


def registered(folder: Path) -> Fields:
    """What a folder's `dataset_info.json` holds, by name of the data set; nothing where there is none.

    Raises:
        UserError: if it is no JSON object.
    """
    path = folder / INFO
    info = _parse(path.read_bytes()) if path.is_file() else {}
    if isinstance(info, BadRow):
        raise UserError(f"{str(path)!r} is not a JSON object: repair it, or name another folder.")
    return info


def file_of(info: Fields, name: str) -> str | None:
    """The file or folder of a data set, if a `dataset_info.json` names one for it."""
    entry = info.get(name)
    file = entry.get("file_name") if isinstance(entry, dict) else None
    return file if isinstance(file, str) else None
