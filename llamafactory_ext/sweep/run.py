"""Run a sweep's commands on this machine: one after another, or one per group of GPUs."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from ..errors import UserError
from .records import Record
from .spec import Sweep
from .work import Task, end, ended, start

Slot = dict[str, str]  # the environment of a place where one cell at a time runs
Report = Callable[[Task, Record], None]
POLL = 0.2  # seconds


def slots(sweep: Sweep) -> list[Slot]:
    """A place per group of `gpus_per_cell` GPUs, or `at_once` places that share the cores without any.

    Raises:
        UserError: if there are fewer GPUs than a cell is to have.
    """
    import torch

    count = torch.cuda.device_count()
    if count == 0 or sweep.gpus_per_cell == 0:
        threads = max(1, (os.cpu_count() or 1) // sweep.at_once)
        place = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if count else {}
        return [place | hidden] * sweep.at_once
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(count)]
    size = sweep.gpus_per_cell
    if len(gpus) < size:
        raise UserError(f"`gpus_per_cell` is {size}, but this machine has {len(gpus)} GPUs: write a smaller number.")
    groups = [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


@dataclass
class Runner:
    """Executes tasks, as many at a time as there are slots.

    Args:
        slots: where commands run.
        rerun_failed: whether failed commands are tried again.
        report: called with each command's record as soon as it ends.
    """

    slots: Sequence[Slot]
    rerun_failed: bool
    report: Report

    def __post_init__(self) -> None:
        self.running: dict[Task, BaseProcess] = {}
        self.stopping = False
        self._free: queue.Queue[Slot] = queue.Queue()
        for slot in self.slots:
            self._free.put(slot)
        if "OMP_NUM_THREADS" in self.slots[0]:
            # Read by the server that the commands are forked from when it loads its libraries.
            os.environ["OMP_NUM_THREADS"] = self.slots[0]["OMP_NUM_THREADS"]

    def run(self, chains: Sequence[Sequence[Task]], watch: Callable[[], None]) -> None:
        """Execute chains of commands, each up to its first failure; `watch` is called again and again meanwhile.

        If interrupted, running commands are stopped and the interruption is raised.
        """
        with ThreadPoolExecutor(max_workers=len(self.slots)) as pool:
            futures = [pool.submit(self._chain, chain) for chain in chains]
            try:
                _watch(futures, watch)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        self.stopping = True
        for process in list(self.running.values()):
            end(process)

    def _chain(self, chain: Sequence[Task]) -> None:
        slot = self._free.get()
        try:
            for task in chain:
                if self.stopping or not self._is_done_or_runs(task, slot):
                    return
        finally:
            self._free.put(slot)

    def _is_done_or_runs(self, task: Task, slot: Slot) -> bool:
        record = task.record()
        if record.state == "done":
            return True
        if record.state == "failed" and not self.rerun_failed:
            return False
        process = start(task, _environment(slot))
        self.running[task] = process
        if self.stopping:  # since it was started
            end(process)
        process.join()
        del self.running[task]
        if self.stopping:
            return False
        record = ended(task, process)
        self.report(task, record)
        return record.state == "done"


def _watch(futures: Sequence[Future[None]], watch: Callable[[], None]) -> None:
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=POLL)
        for future in finished:
            future.result()  # raises what the thread raised
        watch()


def _environment(slot: Mapping[str, str]) -> dict[str, str]:
    # The scripts of this environment, torchrun among them, also where it is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"PATH": path, **slot}
