"""A sweep is a state machine over files: from every state that a kill can leave, it comes to the same end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from llamafactory_ext.errors import UserError
from llamafactory_ext.sweep import records
from llamafactory_ext.sweep.records import (
    Record,
    hold,
    is_held,
    log_file,
    read_object,
    read_record,
    write_record,
    written_record,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_memory(tmp_path):
    """A folder for thousands of small files, which wait for each other on a busy disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield folder


def test_from_every_crash_the_sweep_comes_to_the_same_end(in_memory):
    """The command or everything dies, at any of its file operations and at twenty random moments."""
    places = (ROOT, ROOT / "tests", ROOT / "evaluation")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, str(Path(__file__).with_name("states.py")), in_memory]
    walked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert walked.returncode == 0, walked.stderr
    assert int(walked.stdout) >= 200


# --- what others see -------------------------------------------------------------------------------------------------


def moments(folder, ends):
    """What is on disk before a command, once it holds its log, while it runs, once it has ended, once it is gone."""

    def look():
        return written_record(folder, "train"), is_held(log)

    log = log_file(folder, "train")
    yield look()
    with log.open("ab") as file:
        hold(file)
        yield look()
        write_record(folder, "train", Record("running", started="now"))
        yield look()
        if ends:
            write_record(folder, "train", Record("done", started="now"))
            yield look()
    yield look()


@pytest.mark.parametrize("ends", [True, False])
def test_whoever_looks_on_sees_a_state_that_was_there(ends, tmp_path, monkeypatch):
    """A reader looks at the record, at the lock, and at the record again: at any moments of a command."""
    seen = list(moments(tmp_path, ends))
    states = ["to do", "to do", "running", *(["done", "done"] if ends else ["running"])]
    assert [record.state for record, _ in seen] == states
    assert [held for _, held in seen] == [False, True, True, *[True] * ends, False]
    for first, lock, second in combinations_with_replacement(range(len(seen)), 3):
        shown = iter([seen[first][0], seen[second][0]])
        monkeypatch.setattr(records, "written_record", lambda *_, shown=shown: next(shown))
        monkeypatch.setattr(records, "is_held", lambda _, held=seen[lock][1]: held)
        told = read_record(tmp_path, "train").state
        there = {seen[moment][0].state for moment in range(first, second + 1)}
        if not ends and second == len(seen) - 1:
            there |= {"interrupted"}
        assert told in there, (first, lock, second)


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (b"", "to do"),
        (b"{", "to do"),
        (b"\xff", "to do"),
        (b"[]", "to do"),
        (b"{}", "to do"),
        (b'{"state": "paused", "command": []}', "to do"),
        (b'{"state": "done", "command": null}', "to do"),
        (b'{"state": "done", "command": ["x"], "gpus": [3]}', "done"),
        (b'{"state": "running", "command": []}', "interrupted"),  # without a log
    ],
)
def test_a_record_that_is_damaged_newer_or_without_its_log(content, state, tmp_path):
    (tmp_path / "train.json").write_bytes(content)
    assert read_record(tmp_path, "train").state == state


def test_a_damaged_file_of_the_sweep_is_named(tmp_path):
    for content in (b"", b"[]", b"\xff"):
        (tmp_path / "sweep.json").write_bytes(content)
        with pytest.raises(UserError, match="is damaged: remove it, then run `llamafactory-ext sweep` again"):
            read_object(tmp_path / "sweep.json", dict)
    assert read_object(tmp_path / "none.json", dict) == {}


def test_a_log_that_is_no_file_is_nobodys(tmp_path):
    write_record(tmp_path, "train", Record("running"))
    os.mkfifo(tmp_path / "train.log")
    assert read_record(tmp_path, "train").state == "interrupted"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b'{"a":' * 9999, b'{"state": "done", "command": 5}'])
def test_a_record_that_nobody_has_written_is_to_do(content, tmp_path):
    (tmp_path / "train.json").write_bytes(content)
    assert read_record(tmp_path, "train").state == "to do"


def test_a_folder_is_no_record(tmp_path):
    (tmp_path / "train.json").mkdir()
    assert read_record(tmp_path, "train").state == "to do"
