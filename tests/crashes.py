"""What is killed at any moment leads to the same end: an exhaustive walk over all crashes, and kills at random.

A piece of work is a function that gets a folder, and goes on from whatever it finds there. It runs in forks of this
process, so that a kill costs milliseconds and takes with it what kill -9 takes: locks, buffers, `finally`.
"""

from __future__ import annotations

import builtins
import io
import marshal
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamafactory_ext.whole_files import UNFINISHED

Work = Callable[[Path], None]
Content = dict[str, bytes | None]  # of a folder: None for a folder in it
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
CHANGES |= {"fcntl.flock"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def walk(
    work: Work,
    folder: Path,
    result: Callable[[Path], Any],
    essence: Callable[[str, bytes], Any] = lambda name, content: content,
    witness: Work | None = None,
    most: int = 500,
) -> int:
    """Every prefix of the work's file operations is a crash, also of the work that goes on from an earlier crash.

    Each write is two operations, so that it may be cut off. From every state that is found so, the work goes on to its
    end, which must be that of the work that nobody interrupted, with no unfinished file.

    Args:
        work: what is interrupted.
        folder: is emptied for every run.
        result: what counts of the end.
        essence: what counts of a file, by name and content, where states are told apart: no times, for instance.
        witness: what somebody who outlives a crash may do then; it may crash too.
        most: an error in place of a walk without end.

    Returns:
        The number of different states.
    """
    expected = None
    queue: list[Content] = [{}]
    seen = {_digest({}, essence)}
    while queue:
        state = queue.pop()
        found = _states(witness, folder, state) if witness and state else []
        found += _states(work, folder, state)
        expected = expected or result(folder)
        assert result(folder) == expected, f"from {state}"
        assert not any(UNFINISHED.fullmatch(path.name) for path in folder.rglob("*"))
        for after in found:
            digest = _digest(after, essence)
            if digest not in seen:
                seen.add(digest)
                queue.append(after)
        assert len(seen) < most, "too many states"
    return len(seen)


def kill_at_random(work: Work, folder: Path, result: Callable[[Path], Any], kills: int = 20) -> None:
    """Kill the work so many times, each time when it has run for a random while, and let it go on to the same end."""
    rng = random.Random(0)
    _restore(folder, {})
    begun = time.monotonic()
    assert _wait(_fork(work, folder)) == 0
    longest, expected = time.monotonic() - begun, result(folder)
    while kills > 0:
        _restore(folder, {})
        is_done = False
        while not is_done:
            process = _fork(work, folder)
            if kills > 0:
                time.sleep(rng.uniform(0, longest / 2))
                os.kill(process, signal.SIGKILL)
            status = _wait(process)
            assert status in (0, -signal.SIGKILL)
            is_done = status == 0
            kills -= not is_done
        assert result(folder) == expected


def _states(work: Work, folder: Path, begin: Content) -> list[Content]:
    """The content of the folder before each operation of the work, which is what a kill at this moment leaves."""
    _restore(folder, begin)
    reading, writing = os.pipe()

    def watched(folder: Path) -> None:
        states = [begin]

        def note() -> None:
            content = _content(folder)
            if content != states[-1]:
                states.append(content)

        _before_every_operation(note)
        work(folder)
        note()
        with open(writing, "wb") as pipe:
            marshal.dump(states, pipe)

    process = _fork(watched, folder)
    os.close(writing)
    with open(reading, "rb") as pipe:
        states = pipe.read()
    assert _wait(process) == 0
    return marshal.loads(states)


def _fork(work: Callable[[Path], Any], folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    try:
        sys.dont_write_bytecode = True
        work(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# --- operations ------------------------------------------------------------------------------------------------------


def _before_every_operation(step: Callable[[], None]) -> None:
    """Call `step` before everything that this process does to files from now on."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            step()

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            content = bytes(data)
            step()
            half = len(content) // 2
            if half:
                super().write(content[:half])
                step()
            return half + super().write(content[half:])

        def truncate(self, size: int | None = None) -> int:
            step()
            return super().truncate(size)

    plain = io.open

    def counted(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return plain(file, mode, *more, **options)
        raw = Counted(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        named = dict(zip(("buffering", "encoding", "errors", "newline"), more, strict=False)) | options
        named.pop("buffering", None)
        return io.TextIOWrapper(buffered, **named)

    io.open = builtins.open = counted
    os.fsync = lambda descriptor: None  # what a power cut leaves is not walked through, and this takes most of the time
    sys.addaudithook(watch)


# --- folders ---------------------------------------------------------------------------------------------------------


def _content(folder: Path) -> Content:
    found: Content = {}
    folders = [""]
    while folders:
        inside = folders.pop()
        for entry in os.scandir(folder / inside):
            name = os.path.join(inside, entry.name)
            if entry.is_dir():
                found[name] = None
                folders.append(name)
            else:
                descriptor = os.open(entry, os.O_RDONLY)
                found[name] = os.read(descriptor, 1 << 20)
                os.close(descriptor)
    return found


def _restore(folder: Path, content: Content) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in sorted(content):
        written = content[name]
        if written is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(written)


def _digest(content: Content, essence: Callable[[str, bytes], Any]) -> str:
    """Temporary files have random names, and nobody reads them: what counts is which of them there are."""
    parts = []
    for name, written in content.items():
        owner = UNFINISHED.fullmatch(Path(name).name)
        plain = name.replace(name[name.rindex(owner["machine"]) :], "") if owner else name
        parts.append((plain, None if written is None else "unfinished" if owner else essence(name, written)))
    return repr(sorted(parts, key=repr))
