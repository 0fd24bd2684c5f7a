"""Files that appear whole or not at all, whoever else writes them and whatever is killed meanwhile.

A writer fills a hidden file of its own beside the target, which takes the target's name when it is on the disk: of
several writers the last one counts. What a killed writer leaves is removed by the next one in that folder.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from stat import S_IMODE
from typing import IO

UNFINISHED = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}\.unfinished")
LONGEST = 24 * 60 * 60  # seconds without a write, after which another machine's writer is taken for gone


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """A path to write a file to, which gets its name when the block ends, and is removed if the block raises.

    A link stays one, and what it leads to is replaced. A file that is there keeps its permissions, a new one has those
    that `open` would give it. What is no file, a pipe or /dev/null, is written to as it is.

    Raises:
        OSError: if the folder cannot be written, or the disk is full; what was there is untouched.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    owner = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = target.with_name(f".{target.name}.{owner}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        _keep_permissions(target, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name when the block ends, and not at all if it raises; see `whole_path`."""
    with whole_path(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        yield file


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file at once, text as UTF-8; see `whole_path`."""
    with whole_path(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder; what somebody may still be writing stays."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            owner = UNFINISHED.fullmatch(entry.name)
            if owner and _is_left(entry, owner):
                os.unlink(entry)


def _is_left(entry: os.DirEntry[str], owner: re.Match[str]) -> bool:
    if owner["machine"] == _machine() and os.name == "posix" and not _lives(int(owner["process"])):
        return True
    return time.time() - entry.stat().st_mtime > LONGEST


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@cache
def _machine() -> str:
    """Where the id of a process means something: this machine, or one container on it."""
    processes = "/proc/self/ns/pid"
    within = os.readlink(processes) if os.path.lexists(processes) else ""
    return f"{zlib.crc32(f'{platform.node()} {within}'.encode()):08x}"


def _keep_permissions(target: Path, unfinished: Path) -> None:
    if target.exists():
        mode = S_IMODE(target.stat().st_mode)
        if mode != S_IMODE(unfinished.stat().st_mode):
            unfinished.chmod(mode)


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too, where the system can: Windows opens no folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
