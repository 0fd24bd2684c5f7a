"""Atomic writes: a file appears complete or not at all, even with several writers or if a writer is killed.

A writer fills a hidden file beside the target and renames it to the target once it is on disk; of several writers, the
last one wins. The next writer in the folder removes what a killed writer has left.
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
LONGEST = 24 * 60 * 60  # seconds without a write after which a writer on another machine counts as dead


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it is renamed to `path` when the block ends, and removed if the block raises.

    A symbolic link is kept and its target replaced. An existing file keeps its permissions; a new one gets those that
    `open` would give it. A pipe or a device such as /dev/null is written to directly.

    Raises:
        OSError: if the folder cannot be written, or the disk is full; an existing file is unchanged then.
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
    """A UTF-8 text file that appears when the block ends, and not at all if the block raises; see `whole_path`."""
    with whole_path(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        yield file


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8; see `whole_path`."""
    with whole_path(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder; files that may still be written to are kept."""
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
    """Identifies the process-ID namespace: this machine, or one container on it."""
    processes = "/proc/self/ns/pid"
    within = os.readlink(processes) if os.path.lexists(processes) else ""
    return f"{zlib.crc32(f'{platform.node()} {within}'.encode()):08x}"


def _keep_permissions(target: Path, unfinished: Path) -> None:
    if target.exists():
        mode = S_IMODE(target.stat().st_mode)
        if mode != S_IMODE(unfinished.stat().st_mode):
            unfinished.chmod(mode)


def _sync_folder(folder: Path) -> None:
    """Write the new name to disk as well, where possible: Windows cannot open folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
