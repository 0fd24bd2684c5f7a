"""A cluster job per cell, through submitit (Slurm) or Ray's job interface: each job runs this same sweep with `--only`.

What a job leaves behind is on the shared disk, as after a run here. So are the jobs' ids: the same command watches jobs
that still go on and submits the others.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..pairs.files import whole_file
from .spec import Cell, Sweep
from .tasks import chains_of
from .work import Task

PROGRAM = (sys.executable, "-m", "llamafactory_ext.cli")
POLL = 5.0  # seconds
EVERYTHING = "everything"  # the name of the last job, which does what is left: scores models and adapters together


class Cluster(Protocol):
    """Where jobs go."""

    def submit(self, name: str, words: Sequence[str]) -> str:
        """Queue a command line; returns the job's id."""

    def goes_on(self, job: str) -> bool:
        """Whether the job is queued or running."""


class Submitit:
    """Slurm, or whatever else an executor of submitit's submits to."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.jobs: dict[str, Any] = {}  # those of earlier runs of the sweep are looked up by their id

    def submit(self, name: str, words: Sequence[str]) -> str:
        from submitit.helpers import CommandFunction

        self.executor.update_parameters(name=name)
        job = self.executor.submit(CommandFunction(list(words)))
        self.jobs[job.job_id] = job
        return str(job.job_id)

    def goes_on(self, job: str) -> bool:
        if job not in self.jobs:
            self.jobs[job] = self.executor.job_class(folder=self.executor.folder, job_id=job)
        return not self.jobs[job].done()


class Ray:
    """A Ray cluster's job server."""

    def __init__(self, client: Any, gpus: int) -> None:
        self.client, self.gpus = client, gpus

    def submit(self, name: str, words: Sequence[str]) -> str:
        return str(self.client.submit_job(entrypoint=shlex.join(words), entrypoint_num_gpus=self.gpus))

    def goes_on(self, job: str) -> bool:
        return not self.client.get_job_status(job).is_terminal()


def connect(launcher: str, sweep: Sweep) -> Cluster:
    """
    Raises:
        UserError: if the launcher's package is missing, or there is no cluster.
    """
    if launcher == "slurm":
        if shutil.which("sbatch") is None:
            raise UserError("--launcher slurm needs Slurm's sbatch, which is not here: run this on a login node.")
        executor = _imported("submitit", "submitit").SlurmExecutor(folder=sweep.output / "jobs")
        executor.update_parameters(**{"gpus_per_node": sweep.gpus_per_cell, **sweep.launcher})
        return Submitit(executor)
    jobs = _imported("ray.job_submission", "ray[default]")
    try:
        return Ray(jobs.JobSubmissionClient(**sweep.launcher), sweep.gpus_per_cell)
    except Exception as error:  # whatever Ray raises without a cluster
        raise UserError(
            f"--launcher ray finds no cluster ({error}): name its job server under `launcher`, "
            "like {address: http://127.0.0.1:8265}."
        ) from error


def _imported(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'this launcher needs {module.split(".")[0]}: pip install "{package}".') from error


def run_on_cluster(
    cluster: Cluster,
    sweep: Sweep,
    file: Path,
    cells: Sequence[Cell],
    options: Sequence[str],
    watch: Callable[[Mapping[str, str]], None],
) -> None:
    """Submit a job per cell that is not done and has no job, wait for all, and let a last job do what is left.

    Args:
        cluster: where to.
        sweep, file, cells: what to run.
        options: further options of the jobs' command line.
        watch: is shown the ids of the jobs that go on, by cell, every few seconds.
    """
    command = [*PROGRAM, "sweep", str(file), *options]
    jobs = _Jobs(cluster, sweep.output / "jobs.json")
    for cell in cells:
        chain = next(chain for chain in chains_of(sweep, cells) if chain[0].name == cell.name)
        if not _done(chain):
            # Adapters are scored together by the last job.
            jobs.submit(cell.name, [*command, "--only", cell.name, *(["--train-only"] if cell.is_adapter else [])])
    jobs.wait(watch)
    if sweep.evaluation is not None and "--train-only" not in options:
        jobs.submit(EVERYTHING, [*command, *(word for cell in cells for word in ("--only", cell.name))])
        jobs.wait(watch)


def _done(chain: Sequence[Task]) -> bool:
    return all(task.record().state == "done" for task in chain)


class _Jobs:
    """The jobs of a sweep, on disk."""

    def __init__(self, cluster: Cluster, file: Path) -> None:
        self.cluster, self.file = cluster, file
        self.ids: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def submit(self, name: str, words: Sequence[str]) -> None:
        if name in self.ids and self.cluster.goes_on(self.ids[name]):
            return
        self.ids[name] = self.cluster.submit(name, words)
        with whole_file(self.file) as text:
            json.dump(self.ids, text, indent=1)

    def wait(self, watch: Callable[[Mapping[str, str]], None]) -> None:
        while going := {name: job for name, job in self.ids.items() if self.cluster.goes_on(job)}:
            watch(going)
            time.sleep(POLL)
