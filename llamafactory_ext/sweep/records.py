"""How a command of a sweep went, read from its folder: a record, and a log that is locked while anybody prints to it.

    to do --(locks the log, writes `running`)--> running --> done | failed        (the command writes how it ended)
                                                 running --> interrupted          (the lock is gone, without a word)
    interrupted, failed --> running                                               (the next attempt)

Files change in one step each, so that a kill leaves one of these states, whenever it comes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal, get_args

from pydantic import TypeAdapter

from ..errors import UserError
from ..whole_files import write_whole
from .shapes import check, damaged

Step = Literal["train", "score", "pairs", "lm_eval", "answers", "judge"]
STEPS: tuple[Step, ...] = get_args(Step)
State = Literal["to do", "running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Record:
    """How a command went: `to do` where it has not begun, `interrupted` where its process is gone without a word.

    Args:
        fingerprint: of the task.
        seconds: of the last attempt, None until it has ended.
        error: the last line of a failure.
        started: of the last attempt, in UTC.
        resumed: whether the last attempt went on from what an earlier one had left: its seconds are not those of the
            whole then.
    """

    state: State
    command: tuple[str, ...] = ()
    fingerprint: str = ""
    started: str | None = None
    seconds: float | None = None
    error: str | None = None
    resumed: bool = False


_RECORD = TypeAdapter(Record)


def read_record(folder: Path, step: Step) -> Record:
    """What the last command of this step in a folder has recorded."""
    record = written_record(folder, step)
    while record.state == "running" and not is_held(log_file(folder, step)):
        # It may have ended between the two looks: then there is another record.
        before, record = record, written_record(folder, step)
        if record == before:
            return replace(record, state="interrupted")
    return record


def written_record(folder: Path, step: Step) -> Record:
    """What stands in the record, which is `to do` where there is none, or nothing that can be read as one.

    What a later release has added to it is left out.
    """
    try:
        written = json.loads(_record_file(folder, step).read_bytes())
        known = {field.name: written[field.name] for field in fields(Record) if field.name in written}
        return _RECORD.validate_python(known)
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return Record("to do")


def write_record(folder: Path, step: Step, record: Record) -> None:
    write_whole(_record_file(folder, step), json.dumps(asdict(record), indent=1))


def log_file(folder: Path, step: Step) -> Path:
    return folder / f"{step}.log"


def _record_file(folder: Path, step: Step) -> Path:
    return folder / f"{step}.json"


def read_object(path: Path, shape: Any) -> dict[str, Any]:
    """What a file of the sweep's holds; empty where there is none.

    Args:
        shape: what it must hold at least; see `shapes`.

    Raises:
        UserError: if it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(path)
    check(found, shape, path)
    return found


# --- the lock --------------------------------------------------------------------------------------------------------


def check_locks() -> None:
    """
    Raises:
        UserError: on a system without the locks by which a sweep knows what goes on.
    """
    _fcntl()


def hold(log: IO[bytes]) -> None:
    """Wait until nobody prints to the log; the lock stays with the copies of its descriptor."""
    locks = _fcntl()
    locks.flock(log, locks.LOCK_EX)


def is_held(log: Path) -> bool:
    """Whether a process still prints to the log; to one that is not there, nobody does."""
    locks = _fcntl()
    if not log.is_file():  # nor to what is none, such as a pipe, which would wait for somebody
        return False
    try:
        with log.open("rb") as file:
            locks.flock(file, locks.LOCK_SH | locks.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _fcntl() -> ModuleType:
    try:
        import fcntl
    except ImportError as error:
        raise UserError(
            "A sweep needs the file locks of Linux or macOS, which this system lacks: run it there, or in WSL instead."
        ) from error
    return fcntl
