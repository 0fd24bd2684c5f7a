"""Answers on disk: resumed, never lost, never doubled, never mixed with another run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generations import GENERATIONS, Generation, Run, file_hashes
from questions import UserError

EVALUATION = Path(__file__).parents[2] / "evaluation"


def fill(folder: Path, *indices: int) -> None:
    with Run(folder) as run:
        run.open({"a": 1})
        for index in indices:
            run.append(Generation(index, f"text {index}", [1, 2], "stop"))


def test_round_trip_with_any_text(tmp_path):
    texts = ["", "line\nbreak", "\u2028 \x85 separators", "\ud800 lone surrogate", "emoji \U0001f600", '"quotes"\\']
    with Run(tmp_path) as run:
        run.open({})
        for index, text in enumerate(texts):
            run.append(Generation(index, text, None, "length"))
    assert [generation.text for generation in Run(tmp_path).read().values()] == texts


def test_resume_knows_what_is_done(tmp_path):
    fill(tmp_path, 0, 2)
    with Run(tmp_path) as run:
        assert set(run.open({"a": 1})) == {0, 2}


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path, keep):
    fill(tmp_path, 0, 1)
    path = tmp_path / GENERATIONS
    first, second, _ = path.read_text().split("\n")
    path.write_text(first + "\n" + second[:keep])
    assert set(Run(tmp_path).read()) == {0}
    fill(tmp_path, 1)
    assert {index: g.text for index, g in Run(tmp_path).read().items()} == {0: "text 0", 1: "text 1"}


def test_a_damaged_line_in_the_middle_is_reported(tmp_path):
    fill(tmp_path, 0, 1)
    path = tmp_path / GENERATIONS
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        Run(tmp_path).read()


def test_another_run_is_refused(tmp_path):
    fill(tmp_path, 0)
    with pytest.raises(UserError, match="its a is 1, now it would be 2"), Run(tmp_path) as run:
        run.open({"a": 2})
    with pytest.raises(UserError, match="its b is null, now it would be 3"), Run(tmp_path) as run:
        run.open({"a": 1, "b": 3})


def test_two_processes_cannot_write_at_once(tmp_path):
    with Run(tmp_path) as run:
        run.open({})
        code = f"from pathlib import Path; from generations import Run; Run(Path({str(tmp_path)!r})).open({{}})"
        other = subprocess.run([sys.executable, "-c", code], cwd=EVALUATION, capture_output=True, text=True)
    assert "Another process writes" in other.stderr


def test_kill_at_random_moments(tmp_path):
    rng = random.Random(0)
    command = [sys.executable, str(Path(__file__).with_name("writer.py")), str(tmp_path), "300"]
    environment = os.environ | {"PYTHONPATH": str(EVALUATION)}
    kills = 0
    lines = Run(tmp_path).path
    for _ in range(300):
        before = lines.stat().st_size if lines.exists() else 0
        process = subprocess.Popen(command, env=environment)
        # A busy machine may take longer to start the process than it lives: each answers a problem at least.
        while (not lines.exists() or lines.stat().st_size <= before) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 2
    assert process.returncode == 0
    rows = [json.loads(line) for line in (tmp_path / GENERATIONS).read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(300))


def test_file_hashes(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    assert file_hashes(tmp_path) == {
        "a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "b.txt": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
