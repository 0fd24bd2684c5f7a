"""Pairs out: every row that is read is either written or reported, and a file is whole or not there.

Pairs are written in LLaMA-Factory's alpaca layout for ranking data: one JSON object a line with `instruction`
(the last user message), `chosen` and `rejected`, and where there are such, `system` and `history` (the turns before,
as lists of a user message and its answer).
"""

from __future__ import annotations

import json
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
                check_characters(line)
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
    return readable if is_utf8(readable) else _json(fields, ensure_ascii=True, **options)


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
    info = parse(path.read_bytes()) if path.is_file() else {}
    if isinstance(info, BadRow):
        raise UserError(f"{str(path)!r} is not a JSON object: repair it, or name another folder.")
    return info


def file_of(info: Fields, name: str) -> str | None:
    """The file or folder of a data set, if a `dataset_info.json` names one for it."""
    entry = info.get(name)
    file = entry.get("file_name") if isinstance(entry, dict) else None
    return file if isinstance(file, str) else None
