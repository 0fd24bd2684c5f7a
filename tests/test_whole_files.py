"""Files are whole or not there, whoever else writes them; what killed writers leave does not pile up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from crashes import walk

from llamafactory_ext import whole_files
from llamafactory_ext.whole_files import UNFINISHED, remove_leftovers, whole_file, whole_path, write_whole

# Writes the same file again and again, in two halves, as `python -c WRITER path letter`.
WRITER = """
import sys
from pathlib import Path
from llamafactory_ext.whole_files import whole_file
while True:
    with whole_file(Path(sys.argv[1])) as file:
        file.write(sys.argv[2] * 5000)
        file.flush()
        file.write(sys.argv[2] * 5000)
"""


def names(folder):
    return {path.name for path in folder.iterdir()}


def leftover(folder, process, machine=None):
    path = folder / f".a.{machine or whole_files._machine()}-{process}-00000000.unfinished"
    assert UNFINISHED.fullmatch(path.name)
    path.touch()
    return path


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def no_room(path):
    """A library that fails while it writes."""
    path.write_text("half")
    raise OSError("no room")


def test_text_and_bytes(tmp_path):
    write_whole(tmp_path / "new" / "text", "ü\r\n")
    write_whole(tmp_path / "new" / "bytes", b"\xff")
    with whole_file(tmp_path / "new" / "lines") as file:
        file.write("a\nb\r\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {
        "text": b"\xc3\xbc\r\n",
        "bytes": b"\xff",
        "lines": b"a\nb\r\n",
    }


def test_a_failure_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "a", "before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as file:
        file.write(f"half{1 / 0}")
    with pytest.raises(OSError, match="no room"), whole_path(tmp_path / "b") as path:
        no_room(path)
    assert names(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "before"


def test_two_writers_do_not_meet_and_the_last_one_counts(tmp_path):
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        first.write("first")
        second.write("second")
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == {"a"}


def test_many_writers_at_once(tmp_path):
    contents = [str(n) * 10_000 for n in range(8)]
    failures = []

    def write(content):
        try:
            for _ in range(20):
                write_whole(tmp_path / "a", content)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (tmp_path / "a").read_text() in contents
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", "")
        (tmp_path / "b").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_file_keeps_its_permissions(tmp_path):
    write_whole(tmp_path / "a", "")
    (tmp_path / "a").chmod(0o640)
    write_whole(tmp_path / "a", "again")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_written(is_there, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    if is_there:
        (tmp_path / "elsewhere" / "b").write_text("before")
    (tmp_path / "a").symlink_to("elsewhere/b")
    write_whole(tmp_path / "a", "after")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "elsewhere" / "b").read_text() == "after"
    assert names(tmp_path) | names(tmp_path / "elsewhere") == {"a", "b", "elsewhere"}


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    write_whole(tmp_path / "pipe", "through it")
    assert reader.communicate()[0] == b"through it"
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "")


def test_leftovers_of_dead_writers_go_and_others_stay(tmp_path):
    dead = leftover(tmp_path, dead_process())
    alive = leftover(tmp_path, os.getpid())
    elsewhere = leftover(tmp_path, dead_process(), machine="00000000")
    forgotten = leftover(tmp_path, 1, machine="11111111")
    day_ago = time.time() - whole_files.LONGEST - 60
    os.utime(forgotten, (day_ago, day_ago))
    own = tmp_path / ".a.unfinished"  # what `llamafactory-ext score` goes on from is no leftover
    own.touch()
    write_whole(tmp_path / "b", "")
    assert names(tmp_path) == {alive.name, elsewhere.name, own.name, "b"}
    assert not dead.exists()
    remove_leftovers(tmp_path / "nowhere")


def test_killed_at_random_moments_the_file_is_always_whole(tmp_path):
    rng = random.Random(0)
    contents = [letter * 10_000 for letter in "ab"]
    target = tmp_path / "file"
    for _ in range(20):
        processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(target), letter]) for letter in "ab"]
        while not any(UNFINISHED.fullmatch(name) for name in names(tmp_path)):
            assert all(process.poll() is None for process in processes)
        time.sleep(rng.uniform(0, 0.02))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            assert process.wait() == -signal.SIGKILL
        assert not target.exists() or target.read_text() in contents
    write_whole(target, "end")
    assert names(tmp_path) == {"file"}


def test_every_crash_leaves_the_old_file_or_the_new_one(tmp_path):
    def work(folder):
        if not (folder / "a").exists():
            write_whole(folder / "a", "old")
        assert (folder / "a").read_text() in ("old", "new")
        with whole_file(folder / "a") as file:
            file.write("ne")
            file.flush()
            file.write("w")

    assert walk(work, tmp_path / "folder", result=lambda folder: (folder / "a").read_text()) >= 6
