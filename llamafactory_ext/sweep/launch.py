"""A cluster job per cell, through submitit (Slurm) or Ray's job API: each job runs this same sweep with `--only`.

Results are on the shared disk, as after a local run, and so are the jobs' ids: the same command watches jobs that are
still running and submits the missing ones.
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

from filelock import FileLock

from ..errors import UserError
from ..whole_files import write_whole
from .records import read_object
from .spec import Cell, Sweep
from .tasks import Agenda
from .work import Task

PROGRAM = (sys.executable, "-m", "llamafactory_ext.cli")
POLL = 5.0  # seconds
TOGETHER = "scores"  # the name of the last job: untrained models, adapters together, and the judge


class Cluster(Protocol):
    """Where jobs go."""

    def submit(self, name: str, words: Sequence[str]) -> str:
        """Queue a command line; returns the job's id.

        Raises:
            UserError: if the cluster refuses it.
        """

    def is_active(self, job: str) -> bool:
        """Whether the job is queued or running."""


class Submitit:
    """Slurm, or what else submitit submits to.

    Args:
        cluster: submitit's name of it.
        folder: of the jobs' logs.
        parameters: of submitit's `AutoExecutor`.

    Raises:
        UserError: if submitit is missing, or does not know a parameter.
    """

    def __init__(self, cluster: str, folder: Path, parameters: Mapping[str, Any]) -> None:
        submitit = _imported("submitit", "submitit")
        self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self.job_class = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
        self.jobs: dict[str, Any] = {}  # those of earlier runs of the sweep are looked up by their id
        try:
            self.executor.update_parameters(**parameters)
        except (AssertionError, NameError) as error:  # how submitit refuses types and names
            raise UserError(f"`launcher` in the sweep's file: {str(error).splitlines()[0]}") from error

    def submit(self, name: str, words: Sequence[str]) -> str:
        from submitit.core.utils import FailedJobError
        from submitit.helpers import CommandFunction

        self.executor.update_parameters(name=name)
        try:
            job = self.executor.submit(CommandFunction(list(words)))
        except FailedJobError as error:
            raise UserError(
                f"The cluster refused the job ({error}): correct `gpus_per_cell` or `launcher` in the sweep's file."
            ) from error
        self.jobs[job.job_id] = job
        return str(job.job_id)

    def is_active(self, job: str) -> bool:
        if job not in self.jobs:
            self.jobs[job] = self.job_class(folder=self.executor.folder, job_id=job)
        return not self.jobs[job].done()


class Ray:
    """A Ray cluster's job server. Its jobs start in this folder, which the cluster's machines must share."""

    def __init__(self, client: Any, gpus: int) -> None:
        self.client, self.gpus = client, gpus

    def submit(self, name: str, words: Sequence[str]) -> str:
        entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"
        return str(self.client.submit_job(entrypoint=entrypoint, entrypoint_num_gpus=self.gpus))

    def is_active(self, job: str) -> bool:
        try:
            return not self.client.get_job_status(job).is_terminal()
        except RuntimeError:  # of a cluster that is gone
            return False


def connect(launcher: str, sweep: Sweep) -> Cluster:
    """
    Raises:
        UserError: if the launcher's package is missing, there is no cluster, or a parameter of it is missing or wrong.
    """
    if launcher == "slurm":
        if not {"timeout_min", "slurm_time"} & set(sweep.launcher):
            raise UserError(
                "Slurm needs a time limit: write a cell's minutes in the sweep's file, such as "
                "`launcher: {timeout_min: 720, slurm_partition: gpu}`."  # submitit's own default are five
            )
        if shutil.which("sbatch") is None:
            raise UserError(
                "--launcher slurm needs Slurm's sbatch, which is not installed here: run this on a login node."
            )
        gpus = {"gpus_per_node": sweep.gpus_per_cell or None}  # None: the job asks for none
        return Submitit("slurm", sweep.output / "jobs", {**gpus, **sweep.launcher})
    jobs = _imported("ray.job_submission", "ray[default]")
    try:
        return Ray(jobs.JobSubmissionClient(**sweep.launcher), sweep.gpus_per_cell)
    except Exception as error:  # whatever Ray raises without a cluster
        raise UserError(
            f"--launcher ray finds no cluster ({error}): name its job server under `launcher`, "
            "such as {address: http://127.0.0.1:8265}."
        ) from error


def _imported(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise UserError(f'this launcher needs {name}: pip install "{package}", or the extra `cluster`.') from error


def run_on_cluster(
    cluster: Cluster,
    agenda: Agenda,
    file: Path,
    cells: Sequence[Cell],
    *,
    rerun_failed: bool,
    train_only: bool,
    watch: Callable[[Sequence[str]], None],
) -> None:
    """Submit a job for each cell that needs one, wait for all of them, and run what cells share in a last job.

    Args:
        cluster: where to.
        agenda, file, cells: what to run.
        rerun_failed, train_only: as on the command line.
        watch: called every few seconds with the cells whose jobs are active.
    """
    command = [*PROGRAM, "sweep", str(file)]
    again = ["--rerun-failed"] if rerun_failed else []
    jobs = _Jobs(cluster, agenda.sweep.output / "jobs.json")
    states = ("done",) if rerun_failed else ("done", "failed")

    def is_left(chain: Sequence[Task]) -> bool:
        """Whether its first command that is not done can still be carried out."""
        wanted = (task.record().state for task in chain if task.step == "train" or not train_only)
        return next((state for state in wanted if state != "done"), "done") not in states

    for cell in cells:
        if is_left(agenda.cell_tasks(cell)):
            part = "--train-only" if train_only else "--apart"
            jobs.submit(cell.name, [*command, *again, part, "--only", cell.name])
    jobs.wait(watch)
    shared = [*agenda.base_tasks(cells), *agenda.adapter_tasks(agenda.trained(cells)), *agenda.judge_tasks(cells)]
    if not train_only and any(is_left([task]) for task in shared):
        chosen = [word for cell in cells for word in ("--only", cell.name)]
        jobs.submit(TOGETHER, [*command, *again, "--shared", *chosen])
        jobs.wait(watch)


class _Jobs:
    """The jobs of a sweep: their ids on disk, by launcher and name, so that no other run submits them again."""

    def __init__(self, cluster: Cluster, file: Path) -> None:
        self.cluster, self.file = cluster, file
        self.waited_for: dict[str, str] = {}  # id by name

    def submit(self, name: str, words: Sequence[str]) -> None:
        """Queue a job, unless one of this name is active; another run of the sweep may do the same at this moment."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_name(f".{self.file.name}.lock")):
            written = read_object(self.file, dict[str, dict[str, Any]])
            ids: dict[str, str] = written.setdefault(type(self.cluster).__name__, {})
            if name not in ids or not self.cluster.is_active(ids[name]):
                ids[name] = self.cluster.submit(name, words)
                write_whole(self.file, json.dumps(written, indent=1))
            self.waited_for[name] = ids[name]

    def wait(self, watch: Callable[[Sequence[str]], None]) -> None:
        while going := [name for name, job in self.waited_for.items() if self.cluster.is_active(job)]:
            watch(going)
            time.sleep(POLL)
