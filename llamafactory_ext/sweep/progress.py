"""Progress of running commands, read from the files that they write."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .work import Task


@dataclass
class Progress:
    """The progress of a command.

    Args:
        done, total: in steps or answers; total is None if unknown.
        status: what to show beside them, such as the loss.
    """

    done: int = 0
    total: int | None = None
    status: str = ""


@dataclass
class Watcher:
    """Reads what a command has added to its files since the last look."""

    task: Task
    now: Progress = field(default_factory=Progress)
    _read: dict[Path, int] = field(default_factory=dict)

    def look(self) -> Progress:
        if self.task.step == "train":
            for line in self._new_lines(self.task.outputs[0] / "trainer_log.jsonl"):
                # The line may be damaged, such as half a line of a log that was restarted meanwhile.
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    log = json.loads(line)
                    loss = f"loss {log['loss']:.3f}" if "loss" in log else self.now.status
                    self.now = Progress(int(log["current_steps"]), int(log["total_steps"]), loss)
        elif self.task.step != "pairs":
            files = [file for folder in self.task.resumes for file in folder.rglob("generations.jsonl")]
            self.now.done += sum(len(self._new_lines(file)) for file in files)
        return self.now

    def _new_lines(self, path: Path) -> list[bytes]:
        """Complete lines only; none while the command is about to remove or to write the file."""
        try:
            with path.open("rb") as file:
                start = self._read.get(path, 0)
                if start > os.fstat(file.fileno()).st_size:  # the file was restarted
                    start = 0
                file.seek(start)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read[path] = start + len(whole)
        return whole.splitlines()
