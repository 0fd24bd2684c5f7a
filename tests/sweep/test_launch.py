"""Jobs of a cluster: submitit's own executor for this machine, and a stand-in for nothing but the waiting."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from llamafactory_ext.errors import UserError
from llamafactory_ext.sweep import launch
from llamafactory_ext.sweep.records import Record
from llamafactory_ext.sweep.spec import Sweep
from llamafactory_ext.sweep.tasks import Agenda

pytestmark = pytest.mark.slow
CELLS = ["seed1", "seed2", "seed3"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "POLL", 0.1)
    recipe = {"stage": "dpo", "model_name_or_path": "model", "finetuning_type": "full"}
    return Sweep(recipe=recipe, axes={"seed": [1, 2, 3]}, output=tmp_path / "out")


def run(cluster, sweep, rerun_failed=False, watch=lambda jobs: None):
    agenda = Agenda(sweep, sweep.cells())
    options = {"rerun_failed": rerun_failed, "train_only": False, "watch": watch}
    launch.run_on_cluster(cluster, agenda, Path("s.yaml"), agenda.cells, **options)


def submit(sweep, tmp_path, monkeypatch):
    """The command lines of the jobs that were run, by cell."""
    seen = tmp_path / "seen"
    seen.mkdir(exist_ok=True)
    # In place of the sweep's own command line, which needs a model: one that writes its words into a file.
    program = tmp_path / "program.py"
    target = f"pathlib.Path({str(seen)!r}, sys.argv[sys.argv.index('--only') + 1])"
    program.write_text(f"import pathlib, sys\n{target}.write_text(repr(sys.argv))\n")
    monkeypatch.setattr(launch, "PROGRAM", (sys.executable, str(program)))
    watched = []
    cluster = launch.Submitit("local", tmp_path / "jobs", {"timeout_min": 5, "slurm_partition": "gpu"})
    run(cluster, sweep, rerun_failed=True, watch=lambda jobs: watched.append(set(jobs)))
    return {path.name: path.read_text() for path in seen.iterdir()}, watched


def test_a_job_per_cell_and_none_for_what_is_done(sweep, tmp_path, monkeypatch):
    done, *_ = sweep.cells()
    task = Agenda(sweep, sweep.cells()).train_task(done)
    task.write(Record("done", task.argv, task.fingerprint))
    seen, watched = submit(sweep, tmp_path, monkeypatch)
    assert set(seen) == {"seed2", "seed3"}
    assert "'sweep'" in seen["seed2"]
    assert "'--rerun-failed', '--apart', '--only', 'seed2']" in seen["seed2"]
    assert watched[0] <= {"seed2", "seed3"}
    assert set(json.loads((sweep.output / "jobs.json").read_text())["Submitit"]) == {"seed2", "seed3"}


class Held:
    """A cluster whose jobs stay queued until they have been asked after a few times."""

    def __init__(self):
        self.submitted, self.asked = [], 0

    def submit(self, name, words):
        self.submitted.append(name)
        return f"job-{name}"

    def is_active(self, job):
        self.asked += 1
        return self.asked < 10


def test_jobs_of_an_earlier_run_are_watched_and_not_submitted_again(sweep, tmp_path):
    sweep.output.mkdir()
    (sweep.output / "jobs.json").write_text(json.dumps({"Held": {"seed1": "job-seed1"}}))
    cluster = Held()
    run(cluster, sweep)
    assert cluster.submitted == ["seed2", "seed3"]
    assert cluster.asked >= 10


class Other(Held):
    """Another launcher."""


def test_another_launcher_does_not_forget_the_jobs_of_the_first(sweep):
    run(Held(), sweep)
    run(Other(), sweep)
    kept = json.loads((sweep.output / "jobs.json").read_text())
    assert {name: sorted(ids) for name, ids in kept.items()} == dict.fromkeys(("Held", "Other"), CELLS)
    again = Held()
    run(again, sweep)
    assert again.submitted == []


def test_two_runs_at_once_submit_each_job_once(sweep):
    submitted, met = [], threading.Barrier(2)

    class Slow(Held):
        def submit(self, name, words):
            time.sleep(0.02)  # during which the other run comes by
            submitted.append(name)
            return f"job-{name}"

    def launch_it():
        met.wait()
        run(Slow(), sweep)

    threads = [threading.Thread(target=launch_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(submitted) == CELLS


def test_a_damaged_list_of_jobs_is_named(sweep):
    sweep.output.mkdir()
    (sweep.output / "jobs.json").write_text("")
    with pytest.raises(UserError, match=r"jobs\.json is damaged: remove it"):
        run(Held(), sweep)


def test_adapters_are_trained_by_a_job_each_and_scored_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "POLL", 0.1)
    script = tmp_path / "gsm8k.py"
    script.touch()
    sweep = Sweep(
        recipe={"stage": "dpo", "finetuning_type": "lora"},
        axes={"seed": [1, 2]},
        output=tmp_path / "out",
        evaluators={"gsm8k": {"data": "openai/gsm8k", "engine": "hf", "script": script}},
    )

    agenda = Agenda(sweep, sweep.cells())
    trainings = [agenda.train_task(cell) for cell in agenda.cells]

    class Recorded(Held):
        def submit(self, name, words):
            self.asked = 0
            self.submitted.append((name, words[words.index("s.yaml") + 1 :]))
            if name != launch.TOGETHER:  # what the job would do
                task = next(task for task in trainings if task.name == name)
                task.write(Record("done", task.argv, task.fingerprint))
            return name

    cluster = Recorded()
    run(cluster, sweep)
    assert cluster.submitted == [
        ("seed1", ["--apart", "--only", "seed1"]),
        ("seed2", ["--apart", "--only", "seed2"]),
        (launch.TOGETHER, ["--shared", "--only", "seed1", "--only", "seed2"]),
    ]


def test_a_failed_cell_gets_no_job_but_with_rerun_failed(sweep):
    agenda = Agenda(sweep, sweep.cells())
    for cell in agenda.cells:
        task = agenda.train_task(cell)
        task.write(Record("failed", task.argv, task.fingerprint))
    for rerun_failed, submitted in ((False, []), (True, ["seed1", "seed2", "seed3"])):
        cluster = Held()
        run(cluster, sweep, rerun_failed=rerun_failed)
        assert cluster.submitted == submitted


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"timeout_min": "soon"}, 'Parameter "timeout_min" expected type'),
        ({"slurm_hurry": True}, "Unknown argument 'hurry'"),
    ],
)
def test_a_wrong_parameter(parameters, words, tmp_path):
    with pytest.raises(UserError, match=words):
        launch.Submitit("local", tmp_path / "jobs", parameters)


@pytest.mark.parametrize(
    ("launcher", "parameters", "words"),
    [
        ("slurm", {}, "Slurm needs a time limit: write a cell's minutes"),
        ("slurm", {"timeout_min": 5}, "needs Slurm's sbatch"),
        ("ray", {}, "ray"),
    ],
)
def test_without_a_cluster(launcher, parameters, words, sweep):
    if "sbatch" in words and shutil.which("sbatch"):
        pytest.skip("there is a Slurm")
    with pytest.raises(UserError, match=words):
        launch.connect(launcher, sweep.model_copy(update={"launcher": parameters}))
