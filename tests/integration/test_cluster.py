"""Sweeps as jobs of a real Slurm and a real Ray, where there is one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from sweeps import PATH, make_place, sweep, write_sweep

from llamafactory_ext.sweep.results import read_results

pytestmark = pytest.mark.slow

AXES = [
    {"pref_loss": ["sigmoid", "minor_dpo"], "pref_beta": 0.2},
    {"pref_loss": "sigmoid", "max_grad_norm": "much"},  # fails
]
FAILING = "sigmoid-max_grad_normmuch"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def slurm():
    """What the jobs of this machine's Slurm need is in SLURM_PARAMETERS."""
    if shutil.which("sbatch") is None:
        pytest.skip("needs a Slurm")
    return {"timeout_min": 10, **json.loads(os.environ.get("SLURM_PARAMETERS", "{}"))}


@pytest.fixture(scope="module")
def ray():
    """A cluster of this machine alone."""
    pytest.importorskip("ray", reason='needs Ray: pip install "ray[default]"')

    def run(*words):
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        subprocess.run(command, env=os.environ | {"PATH": PATH}, check=True, capture_output=True)

    run("start", "--head", "--port=0", "--dashboard-host=127.0.0.1", "--dashboard-port=8299", "--disable-usage-stats")
    yield {"address": "http://127.0.0.1:8299"}
    run("stop", "--force")


@pytest.fixture(params=["slurm", "ray"])
def launcher(request):
    return request.param, request.getfixturevalue(request.param)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_jobs_train_and_score(tuning, launcher, place):
    name, parameters = launcher
    output = f"{name}_{tuning}"
    write_sweep(place, output, AXES, launcher=parameters, finetuning_type=tuning)
    run = sweep(place, f"{output}.yaml", "--launcher", name, timeout=600)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"failed: train {FAILING}" in run.stdout
    cells = {cell.name: cell for cell in read_results(place / output).cells}
    assert cells.pop(FAILING).records["train"].state == "failed"
    assert [cell.summary["problems"] for cell in cells.values()] == [5, 5]
    assert [cell.pairs.pairs for cell in cells.values()] == [5, 5]
    assert [base.summary["problems"] for base in read_results(place / output).bases if base.summary] == [5]


def test_jobs_outlive_a_killed_sweep_and_are_watched_by_the_next(launcher, place):
    name, parameters = launcher
    output = f"{name}_killed"
    write_sweep(place, output, AXES[:1], launcher=parameters, finetuning_type="full")
    command = [sys.executable, "-m", "llamafactory_ext.cli", "sweep", f"{output}.yaml", "--launcher", name]
    process = subprocess.Popen(command, cwd=place, env=os.environ | {"PATH": PATH}, stdout=subprocess.DEVNULL)
    jobs = place / output / "jobs.json"
    while not jobs.is_file() or len(next(iter(json.loads(jobs.read_text()).values()))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    submitted = json.loads(jobs.read_text())
    run = sweep(place, f"{output}.yaml", "--launcher", name, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    for cluster, ids in submitted.items():
        assert ids.items() <= json.loads(jobs.read_text())[cluster].items()
    logs = [path.read_text() for path in (place / output / "cells").glob("*/train.log")]
    assert [log.count(" $ llamafactory-cli") for log in logs] == [1, 1]
