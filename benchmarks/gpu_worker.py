"""One stage of `benchmarks/gpu.py`, in a process of its own.

python benchmarks/gpu_worker.py STAGE results.jsonl [--rehearse]
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where stages keep models, and how their folders are called: 15 GB of weights are written and read faster in memory.
MEMORY, PREFIX = Path("/dev/shm"), "llamafactory-ext-gpu-"
NO_GPU = "there is no GPU that torch can use"


@dataclass(frozen=True)
class Recorder:
    """Appends what a stage finds to a file, a line each, whole as soon as it is known."""

    stage: str
    results: Path
    about: dict[str, Any]

    def __call__(
        self, what: str, value: Any, unit: str = "", *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """A number, or words, under a name that is its own in the stage; met or missed where there is a goal."""
        met, goal = None, None
        if at_most is not None:
            met, goal = bool(value <= at_most), f"at most {at_most:g}"
        if at_least is not None:
            met, goal = bool(value >= at_least), f"at least {at_least:g}"
        self._append(what, value, unit, goal, met)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """A part of the stage, whose error is its result: time on a GPU is too rare to lose what comes after."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first, *_ = [*str(error).splitlines(), ""]
            self._append(what, f"{type(error).__name__}: {first}", "", None, False)

    def _append(self, what: str, value: Any, unit: str, goal: str | None, met: bool | None) -> None:
        row = {"stage": self.stage, "what": what, "value": value, "unit": unit, "goal": goal, "met": met, **self.about}
        line = json.dumps(row)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def end_with_parent() -> None:
    """Free the GPU also where the process that set the time limit was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    stage, results, *flags = sys.argv[1:]
    end_with_parent()
    # What the start-up hook does where the plugin is installed: here it may be on PYTHONPATH only.
    import llamafactory_ext._startup  # noqa: F401, I001
    import torch
    from training_runs import machine

    rehearse = "--rehearse" in flags
    if not rehearse and not torch.cuda.is_available():
        sys.exit(f"gpu_worker.py: {NO_GPU}: write --rehearse to run on the CPU.")
    about = machine()
    record = Recorder(stage, Path(results), {key: about[key] for key in ("date", "commit", "versions", "machine")})
    is_there = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 40e9
    memory = MEMORY if is_there and not rehearse else None
    module = importlib.import_module(f"gpu_{stage}")
    gc.freeze()  # or each training's end goes through all that was imported, which takes longer than a tiny one
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getppid()}-", dir=memory) as folder:
        module.measure(record, Path(folder), rehearse)


if __name__ == "__main__":
    main()
