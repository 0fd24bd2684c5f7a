"""Ask an engine what has not been answered yet, and keep every reply as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .chat_templates import Chat
from .engines import Engine, Job, Settings
from .generations import MANIFEST, Generation, Run
from .models import folder_hashes
from .options import Options


def is_answered(reply: Generation) -> bool:
    return reply.refused is None


def ask_models(
    options: Options,
    chats: list[Chat],
    about: dict[str, Any],
    output: Path,
    watch: Callable[[Generation], str] = lambda reply: "",
) -> dict[str, dict[int, Generation]]:
    """Ask a model and its adapters what they have not answered yet, in one load; returns the answers of each run.

    The manifest holds everything that the answers depend on: a run is resumed only with the same one.

    Args:
        options: which models, and how they answer.
        chats: the problems in their order.
        about: what else the answers and their reading depend on, for the manifest.
        output: holds a folder per run.
        watch: see `ask_missing`.

    Raises:
        UserError: see `ask_missing`; also if an option is wrong or a problem cannot be asked, before anything is loaded
            or written.
    """
    settings = options.settings()
    engine = make_engine(options.engine, settings)
    engine.check(chats)
    manifest = {
        **about,
        "model": {"name": options.model, "files": folder_hashes(settings.model)},
        "system": options.system,
        "chat_template_kwargs": settings.chat_template_kwargs,
        "sampling": vars(settings.sampling),
        "sent": engine.parameters(),
        "engine": {"name": str(options.engine), "dtype": settings.dtype, "versions": engine.versions()},
    }
    runs = {
        name: (output / name, {**manifest, "adapter": folder_hashes(settings.adapters.get(name))})
        for name in options.runs(settings)
    }
    return ask_missing(engine, chats, runs, watch=watch)


def make_engine(name: str, settings: Settings) -> Engine:
    """The engine by name; nothing is loaded before `generate`."""
    if name == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(settings)
    if name == "openai":
        from .openai_engine import OpenAIEngine

        return OpenAIEngine(settings)
    from .transformers_engine import TransformersEngine

    return TransformersEngine(settings)


def ask_missing(
    engine: Engine,
    chats: list[Chat],
    runs: dict[str, tuple[Path, dict[str, Any]]],
    is_usable: Callable[[Generation], bool] = is_answered,
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
        UserError: if a folder holds another run, the engine fails, or it refuses everything; what was answered is kept.
    """
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Run(folder)) for name, (folder, _) in runs.items()}
        jobs: list[Job] = []
        found: list[Generation] = []
        answered = set()
        for name, run in opened.items():
            done = run.open(runs[name][1])
            run.refuse_others(done, len(chats))
            usable = {index for index, reply in done.items() if is_usable(reply)}
            found += [done[index] for index in sorted(usable)]
            jobs += [Job(name, index, chat) for index, chat in enumerate(chats) if index not in usable]
            if any(map(is_answered, done.values())):
                answered.add(name)
        with tqdm(total=len(chats) * len(runs), desc="replies", unit="", dynamic_ncols=True) as bar:

            def count(reply: Generation) -> None:
                bar.set_postfix_str(watch(reply), refresh=False)
                bar.update()

            for reply in found:
                count(reply)
            try:
                replies = stack.enter_context(closing(engine.generate(jobs))) if jobs else ()
                for job, reply in believable(replies, answered):
                    opened[job.run].append(reply)
                    count(reply)
            except UserError:
                # A run without one reply, as after a wrong model name, does not insist on its manifest.
                for run in opened.values():
                    if not run.read():
                        (run.folder / MANIFEST).unlink()
                raise
        return {name: run.read() for name, run in opened.items()}


def believable(
    replies: Iterable[tuple[Job, Generation]], answered: Iterable[str] = ()
) -> Iterator[tuple[Job, Generation]]:
    """The replies; refusals wait for their run's first answer, for only then it was the question that was refused.

    Args:
        answered: names of runs that have an answer already.

    Raises:
        UserError: if a run has refusals only.
    """
    known = set(answered)
    waiting: dict[str, list[tuple[Job, Generation]]] = {}
    for job, reply in replies:
        if job.run not in known and not is_answered(reply):
            waiting.setdefault(job.run, []).append((job, reply))
        else:
            known.add(job.run)
            yield from waiting.pop(job.run, ())
            yield job, reply
    for run, refusals in waiting.items():
        job, reply = refusals[0]
        system = ", such as --system," if job.messages[0]["role"] == "system" else ","
        raise UserError(
            f"The server refused every question to {run}, {len(refusals)} of them ({reply.refused}): change what it "
            f"does not take{system} or ask another one."
        )


def print_refused(folder: Path, replies: Iterable[Generation], ids: Sequence[str] | None = None) -> None:
    """Say which problems of a run were refused, and why; by their ids, or by their numbers from 1."""
    refused = [reply for reply in replies if reply.refused is not None]
    if refused:
        called = [str(reply.index + 1) if ids is None else ids[reply.index] for reply in refused]
        print(
            f"{folder}: the server refused {len(refused)} problems, which the same command asks again: "
            f"{first_of(called)} ({refused[0].refused})"
        )


def first_of(names: Sequence[str]) -> str:
    """The first twenty names, and whether there are more."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def print_left_out(folder: Path, replies: Iterable[Generation]) -> None:
    """Say which fields the server did not take, so that it used its own values."""
    fields = sorted({field for reply in replies for field in reply.left_out} - {"max_tokens"})
    if fields:
        print(f"{folder}: the server does not take {', '.join(fields)}: it was asked without, and has its own values.")
