"""Writes pairs to a .jsonl file and registers it: every row is either written, or reported as dropped.

Pairs have LLaMA-Factory's alpaca layout for ranking data: one JSON object per line with `instruction` (the last user
message), `chosen` and `rejected`; and, if present, `system` and `history` (earlier turns, as [user, assistant] lists).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rows import BadRow, Fields, Row, check_characters, is_utf8, parse
from ..whole_files import whole_file, write_whole

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
    """Make a row from each row. What is made goes to `output`, dropped rows to `*.dropped.jsonl` beside it.

    Args:
        rows: from `read_rows`.
        make_row: maps a row and its fields to its kind (for the tally) and what is written; raises BadRow for a row to
            drop.
        output: a .jsonl file; it appears when all rows are done.
        overwrite: whether to replace an existing file.

    Raises:
        UserError: if `output` must not be written, or all rows were dropped.
    """
    check_output(output, overwrite)
    tally = Tally()
    dropped_path = output.with_name(f"{output.stem}.dropped.jsonl")
    with whole_file(output) as pairs, whole_file(dropped_path) as dropped:
        for row in rows:
            try:
                if isinstance(row.fields, BadRow):
                    raise row.fields
                how, made = make_row(row, row.fields)
                line = _json(made)
                check_characters(line)
            except BadRow as reason:
                tally.count(tally.dropped, str(reason), row)
                fields = None if isinstance(row.fields, BadRow) else row.fields
                dropped.write(_escaped({"line": row.number, "reason": str(reason), "row": fields}) + "\n")
            else:
                tally.count(tally.written, how, row)
                pairs.write(line + "\n")
        if not tally.written:
            raise UserError(f"nothing was written, because no row makes a pair: {_most_common(tally)}.")
    if not tally.dropped:
        dropped_path.unlink()
    return tally


def _most_common(tally: Tally) -> str:
    if not tally.dropped:
        return "the source is empty"
    reason, count = tally.dropped.most_common(1)[0]
    return f"{reason} ({count:,} rows, the first in line {tally.first_lines[reason][0]})"


def check_output(output: Path, overwrite: bool, *sources: str) -> None:
    """Refuse, before anything is read, an output with another suffix, an existing one, or a name that is taken.

    Args:
        output: the file of pairs.
        overwrite: whether to replace an existing file.
        sources: the files that pairs are made from; none of them is replaced.

    Raises:
        UserError: says what to write instead.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"the output {str(output)!r} must end in .jsonl.")
    if output.exists() and not overwrite:
        raise UserError(f"{str(output)!r} already exists: choose another --output, or add --overwrite.")
    if output.exists() and any(os.path.exists(source) and output.samefile(source) for source in sources):
        raise UserError(f"{str(output)!r} is what the pairs are made from: choose another --output.")
    _registered(output)


def _json(fields: Fields, **options: Any) -> str:
    return json.dumps(fields, default=str, **{"ensure_ascii": False, **options})


def _escaped(fields: Fields, **options: Any) -> str:
    """JSON that can be written as UTF-8: half a character is escaped, as `\\ud83c`."""
    readable = _json(fields, **options)
    return readable if is_utf8(readable) else _json(fields, ensure_ascii=True, **options)


# --- registering -----------------------------------------------------------------------------------------------------

INFO = "dataset_info.json"


def alpaca(columns: Iterable[str] = ()) -> Fields:
    """The entry in `dataset_info.json` of pairs in the layout of this module.

    Args:
        columns: of its rows beside instruction, chosen and rejected: system, history.
    """
    names = {"prompt": "instruction", **{column: column for column in columns}, "chosen": "chosen"}
    return {"ranking": True, "columns": {**names, "rejected": "rejected"}}


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
