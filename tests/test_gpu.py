"""`benchmarks/gpu.py`: its stages on the CPU, its time limits, and its wheels."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import gpu_packages
import pytest

SCRIPT = Path(gpu.__file__)


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
    assert done.stdout.count("So far") == len(gpu.STAGES)


def test_a_stage_ends_with_its_time(tmp_path):
    started = time.monotonic()
    problem = gpu.run(gpu.Stage("paths", 1, "of a test"), tmp_path, gpu.prepared(), rehearse=False)
    assert problem == "stopped after 1 s"
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_without_a_gpu_a_stage_says_what_to_write(tmp_path):
    problem = gpu.run(gpu.Stage("paths", 300, "of a test"), tmp_path, gpu.prepared(), rehearse=False)
    assert "there is no GPU that torch can use: write --rehearse to run on the CPU." in problem


def test_what_does_not_fit_is_left_out(tmp_path, capsys):
    assert gpu.main(["--minutes", "0.3", "--only", "large", "--output", str(tmp_path)]) == 0
    assert "large is left out: 18 s are left, in which it would not get anywhere." in capsys.readouterr().out


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "path", "--output", str(tmp_path)])
    assert "invalid choice: 'path' (choose from" in capsys.readouterr().err


def test_what_a_killed_stage_has_left_is_read(tmp_path):
    results = tmp_path / "results.jsonl"
    rows = [{"stage": "paths", "what": what, "value": value} for what, value in (("a", 1.0), ("b", 2.0), ("a", 3.0))]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "paths", "wh', encoding="utf-8")
    assert gpu.read(results) == [rows[2], rows[1]]
    assert gpu.read(tmp_path / "none") == []
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
