"""A sweep of one cell, as a walk over all its crashes: `python states.py FOLDER` prints how many states there are.

A process of its own, as one that has loaded torch takes much longer to fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

from crashes import kill_at_random, walk

import llamafactory_ext.evaluation.generations  # noqa: F401  (once for all forks)
from llamafactory_ext.sweep.records import read_record
from llamafactory_ext.sweep.work import Task, ended, execute

SCRIPTS: dict[str, str] = {}
# What a training does: a checkpoint, whose state comes last; then the model. It goes on from a whole checkpoint.
TRAIN = """
import sys
from pathlib import Path
model = Path(sys.argv[1]) / "model"
checkpoint = model / "checkpoint-1"
if not checkpoint.exists():
    assert not model.exists(), "something was left that nothing can be gone on from"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("half")
    (checkpoint / "trainer_state.json").write_text('{"step": 1}')
assert (checkpoint / "weights").read_text() == "half"
(model / "weights").write_text("whole")
"""
# What a scoring does to its files, by the evaluation's own code.
SCORE = """
import sys
from pathlib import Path
from llamafactory_ext.evaluation.generations import Generation, Run
from llamafactory_ext.whole_files import write_whole
scores = Path(sys.argv[1]) / "scores"
with Run(scores / "base") as run:
    done = run.open({"problems": 2})
    for index in range(2):
        if index not in done:
            run.append(Generation(index, "an answer", None, "stop"))
write_whole(scores / "base" / "results.json", "{}")
"""


def tasks(folder):
    """A cell: its training, and its scoring."""
    cell = folder / "cell"
    train, score = (
        {"name": "cell", "step": step, "folder": cell, "argv": (sys.executable, SCRIPTS[step], str(cell))}
        for step in ("train", "score")
    )
    results = {"resumes": (cell / "scores",), "results": (cell / "scores" / "base" / "results.json",)}
    return [
        Task(**train, fingerprint="one", outputs=(cell / "model",), invalidates=(cell / "scores",)),
        Task(**score, fingerprint="two", **results),
    ]


def sweep(folder):
    """The commands of the cell, one after another, as a sweep with `--rerun-failed` carries them out."""
    for task in tasks(folder):
        if task.record().state != "done":
            execute(task, {})
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
        return [record["state"], record["fingerprint"], record["resumed"], record["error"]]
    return content


def end(folder):
    cell = folder / "cell"
    files = ("model/weights", "model/checkpoint-1/weights", "scores/base/generations.jsonl", "scores/base/results.json")
    return [(cell / file).read_text() for file in files], [read_record(cell, step).state for step in ("train", "score")]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for step, code in (("train", TRAIN), ("score", SCORE)):
        (place / f"{step}.py").write_text(code)
        SCRIPTS[step] = str(place / f"{step}.py")
    print(walk(sweep, place / "walk", end, essence, witness=sweep_that_outlives_its_command))
    kill_at_random(sweep, place / "kills", end)
