"""The file of scored pairs. Until it is complete it is hidden: a line with its manifest, then a line per pair.

A killed run leaves whole lines and at most one torn one at the end; the next run scores the missing pairs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import UserError
from ..resuming import first_difference, take
from ..whole_files import whole_file, whole_path, write_whole

Row = dict[str, Any]
Batches = Callable[[list[int]], Iterable[list[int]]]  # from the indices of pairs to batches of them


def in_order(batch_size: int) -> Batches:
    """Batches of so many pairs, in the order of the data."""
    return lambda indices: (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def unfinished_path(output: Path) -> Path:
    """Where pairs are kept until all are scored."""
    return output.with_name(f".{output.name}.unfinished")


def check_output(output: Path) -> None:
    """Refuse a file that is there already, or of another kind; one whose last step was cut off is not done yet.

    Raises:
        UserError: if it is refused.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"the output {str(output)!r} does not end in .jsonl or .parquet: name one that does.")
    if output.exists() and not unfinished_path(output).exists():
        raise _is_there(output)


def _is_there(output: Path) -> UserError:
    return UserError(f"{str(output)!r} already exists and is complete: remove it, or choose another --output.")


class ScoreFile:
    """The scores of one data set under one manifest; inside a `with`, this process writes them, and no other.

    Args:
        output: a .jsonl or .parquet file.
        manifest: what the scores depend on, as JSON.
        score: the column that every scored pair has.
    """

    def __init__(self, output: Path, manifest: Row, score: str = "margin") -> None:
        self.output, self.path, self.score = output, unfinished_path(output), score
        self.manifest = json.loads(json.dumps(manifest, sort_keys=True, default=str))
        self.head = json.dumps({"manifest": self.manifest}) + "\n"
        self.lock = FileLock(output.with_name(f".{output.name}.lock"))

    def check(self) -> bytes:
        """The whole lines that are there; touches nothing.

        Raises:
            UserError: if the output is refused (see `check_output`), or was begun with another manifest.
        """
        check_output(self.output)
        if os.path.lexists(self.path) and not self.path.is_file():
            raise UserError(f"{str(self.path)!r} is not a file: remove it, or choose another --output.")
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:  # or it has just been finished by another process
            content = b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole and not whole.startswith(self.head.encode()):
            difference = first_difference(_manifest(whole.split(b"\n", 1)[0]), self.manifest)
            raise UserError(
                f"{str(self.path)!r} was started with other settings, data or models: {difference}. Remove it, or "
                "choose another --output."
            )
        return whole

    def __enter__(self) -> ScoreFile:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        take(self.lock, self.output)
        try:
            whole = self.check()  # again: the other process may have ended since
            if not whole:
                write_whole(self.path, self.head)
            elif len(whole) < self.path.stat().st_size:
                os.truncate(self.path, len(whole))  # of a line that was cut off
            self.done = {row["index"] for row in read_scores(self.path, self.score)}
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def fill(self, total: int, score: Callable[[list[int]], list[Row]], batches: Batches) -> Iterator[tuple[int, int]]:
        """Score what is missing; yields (pairs done, pairs in all) as it goes. The output appears at the end.

        Args:
            total: the number of pairs, whose indices begin with 0.
            score: makes the rows of some pairs, each with its `index`.
            batches: the pairs to score at a time.

        Raises:
            UserError: if the output is there although pairs are missing: it is another one.
        """
        if any(index >= total for index in self.done):
            raise UserError(
                f"{str(self.path)!r} holds pair {max(self.done) + 1} of {total}: remove it, then score again."
            )
        missing = [index for index in range(total) if index not in self.done]
        if missing and self.output.exists():
            raise _is_there(self.output)
        done = total - len(missing)
        yield done, total
        with self.path.open("a", encoding="utf-8") as file:
            for batch in batches(missing):
                file.write("".join(json.dumps(row) + "\n" for row in score(batch)))
                file.flush()
                done += len(batch)
                yield done, total
        self._finish()

    def _finish(self) -> None:
        rows = read_scores(self.path, self.score)
        if self.output.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            names = list(dict.fromkeys(name for row in rows for name in row))  # a skipped row has few
            with whole_path(self.output) as path:
                table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
                pyarrow.parquet.write_table(table, path)
        else:
            with whole_file(self.output) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self.path.unlink()


def _manifest(head: bytes) -> Any:
    """What a first line says that a file was begun with; None if it says nothing."""
    try:
        return dict(json.loads(head)).get("manifest")
    except (ValueError, TypeError, RecursionError):
        return None


def read_scores(path: Path, score: str | None = "margin") -> list[Row]:
    """The scored pairs of a file, finished or not, in the order of the data.

    Args:
        path: the file.
        score: the column that every scored pair must have; None: any.

    Raises:
        UserError: if a line is damaged.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    rows: dict[int, Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            if isinstance(row, dict) and "manifest" in row:
                continue
            _check_row(row, score)
            if row["index"] in rows:
                raise ValueError(f"a second row of pair {row['index']}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is damaged ({error}): remove that line, then run the same command to resume."
            ) from error
        rows[row["index"]] = row
    return [rows[index] for index in sorted(rows)]


def _check_row(row: Any, score: str | None) -> None:
    """
    Raises:
        ValueError: if it is not what scoring makes of a pair.
    """
    if not isinstance(row, dict) or type(row.get("index")) is not int or row["index"] < 0:
        raise ValueError("it names no pair")
    if not isinstance(row.get("skipped"), bool):
        raise ValueError("it does not say whether it was skipped")
    if score is not None and not (row["skipped"] or isinstance(row.get(score), float)):
        raise ValueError(f"it has no {score}")
    other = [name for name, value in row.items() if not (value is None or isinstance(value, int | float))]
    if other:
        raise ValueError(f"{other[0]} is not a number")
