"""Writes pairs to a .jsonl file and registers it: every row is either written, or reported as dropped.

Pairs have LLaMA-Factory's alpaca layout for ranking data: one JSON object per line with `instruction` (the last user
message), `chosen` and `rejected`; and, if present, `system` and `history` (earlier turns, as [user, assistant] lists).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .. import hashes
from ..errors import UserError
from ..rows import BadRow, Fields, Row, check_characters, is_utf8, parse
from ..whole_files import whole_file, write_whole

INFO = "dataset_info.json"
PAIR = ("chosen", "rejected")  # the columns of a pair's responses

# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the rows: the number written, by kind, and dropped, by reason, and the first lines of each."""

    written: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    def count(self, counter: Counter[str], what: str, row: Row) -> None:
        """Count a row as written or dropped, by its kind or reason."""
        counter[what] += 1
        lines = self.first_lines.setdefault(what, [])
        if len(lines) < 5:
            lines.append(row.number)


class PairFile:
    """A file of pairs that is being written, that of dropped rows beside it, and the tally of both."""

    def __init__(self, pairs: IO[str], dropped: IO[str]) -> None:
        self.pairs, self.dropped, self.tally = pairs, dropped, Tally()

    def write(self, pair: Fields) -> None:
        """Write one pair.

        Raises:
            BadRow: if it contains half a character.
        """
        line = _json(pair)
        check_characters(line)
        self.pairs.write(line + "\n")

    def count(self, kind: str, row: Row) -> None:
        """Count a row that is in a pair."""
        self.tally.count(self.tally.written, kind, row)

    def drop(self, reason: str, row: Row) -> None:
        """Count a row that is in no pair, and keep it with the reason."""
        self.tally.count(self.tally.dropped, reason, row)
        fields = None if isinstance(row.fields, BadRow) else row.fields
        self.dropped.write(_escaped({"line": row.number, "reason": reason, "row": fields}) + "\n")


@contextmanager
def pair_file(output: Path, overwrite: bool = False) -> Iterator[PairFile]:
    """A file of pairs to write to, and `*.dropped.jsonl` beside it for dropped rows; they appear when the block ends.

    Args:
        output: a .jsonl file.
        overwrite: whether to replace an existing file.

    Raises:
        UserError: if `output` must not be written, or no row was counted as written.
    """
    check_output(output, overwrite)
    dropped_path = output.with_name(f"{output.stem}.dropped.jsonl")
    with whole_file(output) as pairs, whole_file(dropped_path) as dropped:
        made = PairFile(pairs, dropped)
        yield made
        if not made.tally.written:
            raise UserError(f"nothing was written, because no row makes a pair: {_most_common(made.tally)}.")
    if not made.tally.dropped:
        dropped_path.unlink()


Make = Callable[[Row, Fields], tuple[str, Fields]]


def write_pairs(rows: Iterable[Row], make_pair: Make, output: Path, overwrite: bool = False) -> Tally:
    """Make a pair from each row, as `write_rows` does; a pair of identical responses is dropped, too."""

    def made(row: Row, fields: Fields) -> tuple[str, Fields]:
        how, pair = make_pair(row, fields)
        if pair["chosen"] == pair["rejected"]:
            raise BadRow("chosen and rejected are identical")
        return how, pair

    return write_rows(rows, made, output, overwrite)


def write_rows(rows: Iterable[Row], make_row: Make, output: Path, overwrite: bool = False) -> Tally:
    """Make a row from each row.

    Args:
        rows: from `read_rows`.
        make_row: maps a row and its fields to its kind (for the tally) and what is written; raises BadRow for a row to
            drop.
        output, overwrite: see `pair_file`.

    Raises:
        UserError: as `pair_file` does.
    """
    with pair_file(output, overwrite) as file:
        for row in rows:
            try:
                if isinstance(row.fields, BadRow):
                    raise row.fields
                how, made = make_row(row, row.fields)
                file.write(made)
            except BadRow as reason:
                file.drop(str(reason), row)
            else:
                file.count(how, row)
    return file.tally


def _most_common(tally: Tally) -> str:
    if not tally.dropped:
        return "the source is empty"
    reason, count = tally.dropped.most_common(1)[0]
    return f"{reason} ({count:,} rows, the first in line {tally.first_lines[reason][0]})"


def check_output(output: Path, overwrite: bool, *sources: str, responses: tuple[str, ...] = PAIR) -> None:
    """Refuse, before anything is read, an output with another suffix, an existing one, or a name that is taken.

    Args:
        output: the file of pairs.
        overwrite: whether to replace an existing file.
        sources: the files that pairs are made from; none of them is replaced.
        responses: the columns of the responses.

    Raises:
        UserError: says what to write instead.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"the output {str(output)!r} must end in .jsonl.")
    if output.exists() and not overwrite:
        raise UserError(f"{str(output)!r} already exists: choose another --output, or add --overwrite.")
    if output.exists() and any(os.path.exists(source) and output.samefile(source) for source in sources):
        raise UserError(f"{str(output)!r} is what the pairs are made from: choose another --output.")
    entry = _registered(output).get(output.stem)
    columns = entry.get("columns") if isinstance(entry, dict) else None
    if isinstance(columns, dict) and not set(responses) <= set(columns):
        raise UserError(
            f"{str(output.with_name(INFO))!r} registers {output.stem!r} without the columns {' and '.join(responses)}: "
            "choose another --output, or remove that entry."
        )


def _json(fields: Fields, **options: Any) -> str:
    return json.dumps(fields, default=str, **{"ensure_ascii": False, **options})


def _escaped(fields: Fields, **options: Any) -> str:
    """JSON that can be written as UTF-8: half a character is escaped, as `\\ud83c`."""
    readable = _json(fields, **options)
    return readable if is_utf8(readable) else _json(fields, ensure_ascii=True, **options)


# --- registering -----------------------------------------------------------------------------------------------------


def alpaca(columns: Iterable[str] = (), responses: tuple[str, ...] = PAIR) -> Fields:
    """The entry in `dataset_info.json` of pairs in the layout of this module.

    Args:
        columns: of its rows beside instruction and responses: system, history.
        responses: the columns of the responses.
    """
    names = {"prompt": "instruction", **{column: column for column in (*columns, *responses)}}
    return {"ranking": True, "columns": names}


def register(output: Path, entry: Fields) -> bool:
    """Register the pairs in the `dataset_info.json` beside them, so that a recipe can say `dataset: <stem>`.

    Args:
        output: the file of pairs.
        entry: what it says of them, without the name of the file.

    Returns:
        Whether the name is new; an existing entry for this file is kept.

    Raises:
        UserError: if the name belongs to another file, or dataset_info.json is not a JSON object.
    """
    info = _registered(output)
    if output.stem in info:
        return False
    info[output.stem] = {"file_name": output.name, **entry}
    write_whole(output.with_name(INFO), _escaped(info, indent=2) + "\n")
    return True


def _registered(output: Path) -> Fields:
    """The content of the `dataset_info.json` beside the output; the output's name must be free or its own."""
    info = registered(output.parent)
    if output.stem in info and file_of(info, output.stem) != output.name:
        path = str(output.with_name(INFO))
        raise UserError(f"{path!r} already has another data set named {output.stem!r}: choose another --output.")
    return info


def registered(folder: Path) -> Fields:
    """The content of a folder's `dataset_info.json`, by name of the data set; empty if there is no such file.

    Raises:
        UserError: if it is not a JSON object.
    """
    path = folder / INFO
    info = parse(path.read_bytes()) if path.is_file() else {}
    if isinstance(info, BadRow):
        raise UserError(f"{str(path)!r} is not a JSON object: correct it, or choose another folder.")
    return info


def file_of(info: Fields, name: str) -> str | None:
    """The file or folder of a data set, or None if its entry in `dataset_info.json` names none."""
    entry = info.get(name)
    file = entry.get("file_name") if isinstance(entry, dict) else None
    return file if isinstance(file, str) else None


def hash_of_data(folder: str, name: str) -> str | None:
    """Of what a folder's dataset_info.json says that a data set is; None if that is no local file or folder."""
    file = file_of(registered(Path(folder)), name)
    return None if file is None or not Path(folder, file).exists() else hashes.of_data(Path(folder, file))


def hash_of_entry(folder: str, name: str) -> str:
    """Of what a folder's dataset_info.json says of a data set, such as its columns."""
    return hashes.of_value(registered(Path(folder)).get(name))
