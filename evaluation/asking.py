"""Ask an engine what has not been answered yet, and keep every reply as it arrives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engines import Chat, Engine, Job
from generations import MANIFEST, Generation, Run
from questions import UserError
from tqdm import tqdm


def ask_missing(
    engine: Engine,
    chats: list[Chat],
    runs: dict[str, tuple[Path, dict[str, Any]]],
    is_usable: Callable[[Generation], bool] = lambda reply: True,
    watch: Callable[[Generation], str] = lambda reply: "",
) -> dict[str, dict[int, Generation]]:
    """Ask, in every run, each chat that has no usable reply yet; keep each reply as it arrives and return them all.

    Args:
        engine: asked only if something is missing.
        chats: what to ask; a reply has the index of its chat.
        runs: folder and manifest by name, which is the `run` of the engine's jobs.
        is_usable: whether a reply can stay; others are asked again, and the last reply counts.
        watch: is shown every reply, those found too, and says what stands beside the progress bar.

    Raises:
        UserError: if a folder holds another run, or the engine fails; what was answered is kept.
    """
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Run(folder)) for name, (folder, _) in runs.items()}
        jobs: list[Job] = []
        found: list[Generation] = []
        for name, run in opened.items():
            done = run.open(runs[name][1])
            usable = {index for index, reply in done.items() if is_usable(reply)}
            found += [done[index] for index in sorted(usable)]
            jobs += [Job(name, index, chat) for index, chat in enumerate(chats) if index not in usable]
        with tqdm(total=len(chats) * len(runs), desc="replies", unit="", dynamic_ncols=True) as bar:

            def count(reply: Generation) -> None:
                bar.set_postfix_str(watch(reply), refresh=False)
                bar.update()

            for reply in found:
                count(reply)
            try:
                for job, reply in engine.generate(jobs) if jobs else ():
                    opened[job.run].append(reply)
                    count(reply)
            except UserError:
                # A run without one reply, as after a wrong model name, does not insist on its manifest.
                for run in opened.values():
                    if not run.read():
                        (run.folder / MANIFEST).unlink()
                raise
        return {name: run.read() for name, run in opened.items()}
