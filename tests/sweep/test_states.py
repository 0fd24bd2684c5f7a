"""A sweep as what it is, a state machine over files: from every state that a kill can leave, it comes to the same end."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
from crashes import kill_at_random, walk

from llamafactory_ext.sweep import records
from llamafactory_ext.sweep.records import Record, is_held, read_record, written_record
from llamafactory_ext.sweep.work import Task, carry_out, ended

# What a training does: a checkpoint, whose state comes last; then the model. It goes on from a whole checkpoint.
TRAIN = """
import sys
from pathlib import Path
model = Path(sys.argv[0]).parent / "model"
checkpoint = model / "checkpoint-1"
if not checkpoint.exists():
    assert not model.exists(), "something was left that nothing can be gone on from"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("half")
    (checkpoint / "trainer_state.json").write_text('{"step": 1}')
assert (checkpoint / "weights").read_text() == "half"
(model / "weights").write_text("whole")
"""
# What a scoring does: it goes on from the lines that it finds, and knows them by their model.
SCORE = """
import sys
from pathlib import Path
cell = Path(sys.argv[0]).parent
scores = cell / "scores"
scores.mkdir(exist_ok=True)
lines = scores / "lines"
found = lines.read_text() if lines.exists() else ""
for line in ("a\\n", "b\\n"):
    if line not in found:
        with lines.open("a") as file:
            file.write(line)
(scores / "results.json").write_text("{}") if not (scores / "results.json").exists() else None
"""


def tasks(folder):
    """A cell: its training, and its scoring."""
    cell = folder / "cell"
    cell.mkdir(exist_ok=True)
    scripts = {"train": TRAIN, "score": SCORE}
    for step, code in scripts.items():
        if not (cell / f"{step}.py").exists():
            (folder / f"{step}.new").write_text(code)
            (folder / f"{step}.new").replace(cell / f"{step}.py")
    train, score = (
        {"name": "cell", "step": step, "folder": cell, "words": (sys.executable, str(cell / f"{step}.py"))}
        for step in scripts
    )
    results = {"resumes": (cell / "scores",), "results": (cell / "scores" / "results.json",)}
    return [
        Task(**train, identity="one", makes=(cell / "model",), spoils=(cell / "scores",)),
        Task(**score, identity="two", **results),
    ]


def sweep(folder):
    """The commands of the cell, one after another, as a sweep with `--rerun-failed` carries them out."""
    for task in tasks(folder):
        if task.record().state != "done":
            carry_out(task, {})
            assert task.record().state == "done"


def sweep_that_outlives_its_command(folder):
    """Records a command as failed whose process is gone."""
    gone = multiprocessing.get_context("fork").Process(target=os._exit, args=(9,))
    gone.start()
    gone.join()
    for task in tasks(folder):
        if task.record().state == "interrupted":
            assert ended(task, gone).state == "failed"


def essence(name, content):
    """What is known of a file: not what was printed, nor when."""
    if name.endswith(".log"):
        return None
    if name in ("cell/train.json", "cell/score.json"):
        record = json.loads(content)
        return [record["state"], record["identity"], record["resumed"], record["error"]]
    return content


def end(folder):
    cell = folder / "cell"
    files = ("model/weights", "model/checkpoint-1/weights", "scores/lines", "scores/results.json")
    return [(cell / file).read_text() for file in files], [read_record(cell, step).state for step in ("train", "score")]


def test_from_every_crash_the_sweep_comes_to_the_same_end(tmp_path):
    states = walk(sweep, tmp_path / "folder", end, essence, witness=sweep_that_outlives_its_command)
    print(f"{states} states")
    assert states >= 40


def test_killed_at_random_moments_it_comes_to_the_same_end(tmp_path):
    kill_at_random(sweep, tmp_path / "folder", end)


# --- what others see -------------------------------------------------------------------------------------------------


def test_whoever_looks_on_sees_a_state_that_was_there(tmp_path, monkeypatch):
    """A reader looks at the record, then at the lock, then again at the record, at any moments of a command."""
    folder = tmp_path / "cell"
    task = Task("cell", "train", folder, (sys.executable, str(tmp_path / "script.py")))
    (tmp_path / "script.py").touch()
    moments = [(written_record(folder, "train"), is_held(task.log))]

    def note():
        moments.append((written_record(folder, "train"), is_held(task.log)))

    process = multiprocessing.get_context("fork").Process(target=carry_out, args=(task, {}))
    states = watched(process, task, note, monkeypatch)
    assert [record.state for record, _ in states] == ["to do", "to do", "running", "done", "done"]
    assert [held for _, held in states] == [False, True, True, True, False]
    for looks in combinations_with_replacement(range(len(states)), 3):
        first, lock, second = looks
        shown = iter([states[first][0], states[second][0]])
        monkeypatch.setattr(records, "written_record", lambda *_, shown=shown: next(shown))
        monkeypatch.setattr(records, "is_held", lambda _, held=states[lock][1]: held)
        seen = read_record(folder, "train").state
        assert seen in {states[moment][0].state for moment in range(first, second + 1)}, looks


def watched(process, task, note, monkeypatch):
    """What is on disk before a command, when its log is its own, while it runs, when it is done, and after it."""
    raise NotImplementedError
