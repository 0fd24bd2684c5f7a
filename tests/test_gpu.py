"""`benchmarks/gpu.py`: its stages on the CPU, its time limits, and its wheels."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import gpu_packages
import pytest

SCRIPT = Path(gpu.__file__)


def run_paths(folder, seconds):
    (folder / "results.jsonl").touch()
    stage = gpu.Stage("paths", seconds, "of a test")
    return gpu.run(stage, folder / "results.jsonl", gpu.prepared(rehearse=False), rehearse=False)


@pytest.mark.slow
def test_rehearsal_runs_every_stage_and_misses_no_goal(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--minutes", "60", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {stage.name for stage in gpu.STAGES}
    assert {row["met"] for row in rows} == {True, None}
    names = [(row["stage"], row["what"]) for row in rows]
    assert len(set(names)) == len(names), "two results under one name"
    tables = done.stdout.split("So far")
    assert len(tables) == 1 + len(gpu.STAGES)
    assert "full, float32: losses beside stock's" in tables[0], "a result is shown as soon as it is known"


def test_a_stage_ends_with_its_time(tmp_path):
    started = time.monotonic()
    problem = run_paths(tmp_path, seconds=1)
    assert problem == "stopped after 1 s"
    assert time.monotonic() - started < 60


def wait_for_a_result(started, results):
    while not results.is_file() or not results.stat().st_size:
        assert started.poll() is None
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_and_another_run_beside_it_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--only", "paths", "--output", str(tmp_path)]
    # A shell's background jobs, of which these tests may be one, ignore Ctrl-C, and so would what they start.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    results = tmp_path / "results.jsonl"
    wait_for_a_result(started, results)
    beside = subprocess.run(command, capture_output=True, text=True)
    assert (beside.returncode, beside.stderr) == (
        2,
        f"gpu.py: another run writes into {results}: name another folder with --output.\n",
    )
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert (started.returncode, error) == (130, f"gpu.py: interrupted; what was measured is in {results}.\n")
    assert gpu.read(results)


@pytest.mark.slow
def test_a_stage_ends_with_what_started_it(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--only", "paths", "--output", str(tmp_path)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    results = tmp_path / "results.jsonl"
    wait_for_a_result(started, results)
    started.kill()
    started.wait()
    deadline, size = time.monotonic() + 120, -1
    while results.stat().st_size != size:  # for as long as five seconds, in which a stage finds more
        assert time.monotonic() < deadline, "the stage goes on"
        size = results.stat().st_size
        time.sleep(5)
    rows = gpu.read(results)
    assert rows
    assert not [row for row in rows if row["what"] == "the stage itself"]


@pytest.mark.slow
def test_without_a_gpu_a_stage_says_what_to_write(tmp_path):
    problem = run_paths(tmp_path, seconds=300)
    assert "there is no GPU that torch can use: write --rehearse to run on the CPU." in problem


def test_what_does_not_fit_is_left_out(tmp_path, capsys):
    assert gpu.main(["--minutes", "0.3", "--only", "large", "--output", str(tmp_path)]) == 1  # nothing was measured
    assert "large is left out: 18 s are left, in which it would not get anywhere." in capsys.readouterr().out


def test_without_llamafactory_and_wheels_it_says_what_to_bring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "LLaMA-Factory is not installed: install it, or bring" in capsys.readouterr().err


def test_models_of_runs_that_are_no_more_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MEMORY", tmp_path)
    gone, own, other = (tmp_path / f"{gpu.PREFIX}{pid}-x" for pid in (2**22 + 1, os.getpid(), 1))
    for folder in (gone, own, other):
        folder.mkdir()
    gpu.clean()
    assert list(tmp_path.iterdir()) == [other]


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "path", "--output", str(tmp_path)])
    assert "invalid choice: 'path' (choose from" in capsys.readouterr().err


def test_what_a_killed_stage_has_left_is_read(tmp_path):
    results = tmp_path / "results.jsonl"
    about = {"stage": "paths", "unit": "", "goal": None, "met": None}
    rows = [{"what": what, "value": value, **about} for what, value in (("a", 1.0), ("b", 2.0), ("a", 3.0))]
    foreign = [
        b"\xff\xfe",
        b"[1]",
        b'"abc"',
        b"null",
        b'{"a": 1}',
        b'{"stage": [1], "what": "a", "met": null}',
        b'{"stage": "paths", "what": "a", "met": null}',
        b"[" * 10**5,
    ]
    lines = [*(json.dumps(row).encode() for row in rows), *foreign, b'{"stage": "paths", "wh']
    results.write_bytes(b"\n".join(lines))
    assert gpu.read(results) == [rows[2], rows[1]]
    gpu.whole_lines(results)
    gpu.note(results, gpu.STAGES[0], "stopped after 90 s", met=False)
    assert [row["value"] for row in gpu.read(results)] == [3.0, 2.0, "stopped after 90 s"]


def test_the_wheel_of_bitsandbytes_keeps_one_library(tmp_path):
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    kept = [
        "bitsandbytes/__init__.py",
        f"bitsandbytes/{gpu_packages.BITSANDBYTES}",
        "bitsandbytes-1.dist-info/METADATA",
    ]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*kept, "bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_rocm72.so"]:
            file.writestr(name, name)
    gpu_packages.slim(wheel)
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == kept
        assert all(file.read(name) == name.encode() for name in kept)
    assert list(tmp_path.iterdir()) == [wheel]
