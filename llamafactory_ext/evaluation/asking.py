"""Asks an engine what has not been answered yet, and saves each reply as it arrives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .chat_templates import Chat
from .engines import Engine, Job, Settings
from .generations import MANIFEST, Generation, Run
from .models import folder_hashes
from .options import Options

Runs = dict[str, tuple[Path, dict[str, Any]]]  # run -> its folder and manifest


@dataclass(frozen=True)
class Rounds:
    """What is asked, round by round: a later round may ask on top of earlier replies.

    Args:
        rounds: of each round, the indices of its replies.
        chat: of an index and the replies of its run so far: what to ask, or a text that says why it is not asked.
        follows: index -> that of the earlier reply that it is asked on top of.
    """

    rounds: Sequence[Sequence[int]]
    chat: Callable[[int, Mapping[int, Generation]], Chat | str]
    follows: Mapping[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of replies in all rounds."""
        return sum(map(len, self.rounds))

    def kept(self, replies: Mapping[int, Generation], is_usable: Callable[[Generation], bool]) -> set[int]:
        """The saved replies that need not be asked again: usable, and saved after the one that they follow, so that
        they were asked on top of what is there now.

        Args:
            replies: of a run, in the order in which they were saved.
            is_usable: see `ask_missing`.
        """
        order = {index: place for place, index in enumerate(replies)}
        kept: set[int] = set()
        for index in (index for indices in self.rounds for index in indices):
            if index in replies and is_usable(replies[index]):
                first = self.follows.get(index)
                fresh = first is None or (first in kept and order[first] < order[index])
                kept |= {index} if fresh else set()
        return kept


def is_answered(reply: Generation) -> bool:
    """Whether a reply is an answer, not a refusal of the server."""
    return reply.refused is None


def ask_models(
    options: Options,
    chats: list[Chat],
    about: dict[str, Any],
    output: Path,
    watch: Callable[[str, Generation], str] = lambda run, reply: "",
) -> dict[str, dict[int, Generation]]:
    """Ask a model and its adapters what they have not answered yet, in one load.

    Args:
        options: which models, and how they answer.
        chats: the problems in their order.
        about, output: see `plan_runs`.
        watch: see `ask_missing`.

    Returns:
        Run -> index of the problem -> answer.

    Raises:
        UserError: as `plan_runs` and `ask_missing` do.
    """
    engine, runs = plan_runs(options, chats, about, output)
    return ask_missing(engine, chats, runs, watch=watch)


def plan_runs(options: Options, chats: list[Chat], about: dict[str, Any], output: Path) -> tuple[Engine, Runs]:
    """The engine of these options, and the runs of the model and its adapters; nothing is loaded or written yet.

    A manifest records everything that the answers depend on; a run resumes only with the same manifest.

    Args:
        options: which models, and how they answer.
        chats: each once, in the order of the problems.
        about: what else the answers and scores depend on, for the manifest.
        output: the folder that contains a folder per run.

    Raises:
        UserError: if an option is wrong, or a problem cannot be asked.
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
    return engine, {
        name: (output / name, {**manifest, "adapter": folder_hashes(settings.adapters.get(name))})
        for name in options.runs(settings)
    }


def make_engine(name: str, settings: Settings) -> Engine:
    """The engine with this name; models are loaded by `generate`."""
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
    runs: Runs,
    is_usable: Callable[[Generation], bool] = is_answered,
    watch: Callable[[str, Generation], str] = lambda run, reply: "",
    seeds: Sequence[int] | None = None,
    columns: Callable[[str, Generation], Mapping[str, Any]] = lambda run, reply: {},
) -> dict[str, dict[int, Generation]]:
    """Ask, in each run, the chats that have no usable reply yet; save each reply as it arrives.

    Args:
        engine: used only if something is missing.
        chats: what to ask; a reply has the index of its chat.
        runs: run -> its folder and manifest.
        is_usable: whether a reply is kept; other chats are asked again, and the last reply counts.
        watch: called with the run and each usable reply that is saved, and each new one; returns the text beside the
            progress bar.
        seeds: of the replies, if each chat has its own.
        columns: of a run and a new reply; saved beside the reply.

    Returns:
        Run -> index of the chat -> reply.

    Raises:
        UserError: if a folder belongs to another run, the engine fails, or it refuses everything; replies so far are
            saved.
    """
    rounds = Rounds([range(len(chats))], lambda index, replies: chats[index])
    return ask_rounds(engine, rounds, runs, is_usable, watch, seeds, columns)


def ask_rounds(
    engine: Engine,
    rounds: Rounds,
    runs: Runs,
    is_usable: Callable[[Generation], bool] = is_answered,
    watch: Callable[[str, Generation], str] = lambda run, reply: "",
    seeds: Sequence[int] | None = None,
    columns: Callable[[str, Generation], Mapping[str, Any]] = lambda run, reply: {},
) -> dict[str, dict[int, Generation]]:
    """Ask, in each run and round after round, what has no usable reply yet; save each reply as it arrives.

    What cannot be asked, as `rounds` says, is saved as refused. The rest is as in `ask_missing`.
    """
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Run(folder)) for name, (folder, _) in runs.items()}
        replies: dict[str, dict[int, Generation]] = {}
        for name, run in opened.items():
            replies[name] = run.open(runs[name][1])
            run.refuse_others(replies[name], rounds.count)
        kept = {name: rounds.kept(found, is_usable) for name, found in replies.items()}
        bar = stack.enter_context(tqdm(total=rounds.count * len(runs), desc="replies", unit="", dynamic_ncols=True))

        def count(run: str, reply: Generation) -> None:
            bar.set_postfix_str(watch(run, reply), refresh=False)
            bar.update()

        def save(run: str, reply: Generation) -> None:
            opened[run].append(reply, **columns(run, reply))
            replies[run][reply.index] = reply
            count(run, reply)

        for indices in rounds.rounds:
            jobs: list[Job] = []
            for name, index in itertools.product(runs, indices):
                found = replies[name]
                if index in kept[name]:
                    count(name, found[index])
                    continue
                chat = rounds.chat(index, found)
                if not isinstance(chat, str):
                    jobs.append(Job(name, index, chat, seeds[index] if seeds else None))
                    continue
                refusal = Generation(index, "", None, None, refused=chat)
                (count if found.get(index) == refusal else save)(name, refusal)
            answered = {name for name, found in replies.items() if any(map(is_answered, found.values()))}
            try:
                asked = stack.enter_context(closing(engine.generate(jobs))) if jobs else ()
                for job, reply in believable(asked, answered):
                    save(job.run, reply)
            except UserError:
                # Without a single reply, as after a wrong model name, another manifest may replace this one.
                for run in opened.values():
                    if not run.read():
                        (run.folder / MANIFEST).unlink()
                raise
        return {name: run.read() for name, run in opened.items()}


def believable(
    replies: Iterable[tuple[Job, Generation]], answered: Iterable[str] = ()
) -> Iterator[tuple[Job, Generation]]:
    """The replies, with a run's refusals held back until its first answer: without one, the request was refused, not
    the question.

    Args:
        replies: from an engine, each with its job.
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
            f"The server refused all {len(refusals)} questions to {run} ({reply.refused}): change what it does not "
            f"accept{system} or use another server."
        )


def print_refused(
    folder: Path, replies: Iterable[Generation], ids: Sequence[str] | None = None, what: str = "problems"
) -> None:
    """Print which problems of a run were refused, and why; by id, or else by number, counted from 1."""
    refused = [reply for reply in replies if reply.refused is not None]
    if refused:
        called = [str(reply.index + 1) if ids is None else ids[reply.index] for reply in refused]
        print(
            f"{folder}: {len(refused)} {what} were refused: {first_of(called)} ({refused[0].refused}). "
            "Run the same command to ask them again."
        )


def first_of(names: Sequence[str]) -> str:
    """The first twenty names, with an ellipsis if there are more."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def print_left_out(folder: Path, replies: Iterable[Generation]) -> None:
    """Print which fields the server did not accept, so that its own values applied."""
    fields = sorted({field for reply in replies for field in reply.left_out} - {"max_tokens"})
    if fields:
        print(f"{folder}: the server does not accept {', '.join(fields)}, so its own values apply.")
