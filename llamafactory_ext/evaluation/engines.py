"""The interface of the engines that generate answers: vLLM in process, an OpenAI-compatible server, or transformers.

An engine takes jobs and yields each answer as soon as it is finished, so that the caller can save it at once. Decoding
is greedy by default, and all sampling parameters are sent with every question: an engine would take missing ones from
the model's generation_config.json, where a repetition penalty or beam search would hide the degeneration that is
measured here. Of that file, only the end tokens are used.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import UserError
from .chat_templates import Chat, print_unused, prompt_ids
from .generations import Generation
from .models import context_length

RESUME = "finished answers are saved; run the same command to resume"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; greedy decoding at temperature 0. `max_tokens` limits an answer."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """A question to a model.

    Args:
        run: the name of the adapter, or `base`.
        index: of the answer in its run, from 0: that of the problem, if each is asked once.
        messages: the chat.
        seed: of this answer, if it is sampled; None: that of the settings.
    """

    run: str
    index: int
    messages: Chat
    seed: int | None = None

    def seeded(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The sampling parameters of an engine, with this job's own seed if it has one."""
        return parameters if self.seed is None else {**parameters, "seed": self.seed}


@dataclass(frozen=True)
class Settings:
    """The settings of all engines; each uses its own."""

    model: str
    adapters: dict[str, str]
    sampling: Sampling
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    tensor_parallel: int = 1
    data_parallel: int = 1
    max_model_len: int | None = None
    batch_size: int = 16
    base_url: str = "http://127.0.0.1:8000/v1"
    concurrency: int = 64


class Engine(Protocol):
    """What every engine provides."""

    def check(self, chats: list[Chat]) -> None:
        """Raise a UserError for what cannot be answered, before anything is loaded or written."""

    def refusal(self, chat: Chat, number: int) -> str | None:
        """Why a chat that contains answers, that of the problem with this number, cannot be asked; None if it can."""

    def versions(self) -> dict[str, str]:
        """The packages that the answers depend on, for the manifest."""

    def parameters(self) -> dict[str, Any]:
        """The parameters that are sent with every question, for the manifest."""

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        """Each job with its answer or refusal, in the order in which they are finished.

        Raises:
            UserError: if the engine fails; answers so far have been yielded.
        """


def check_texts(chats: list[Chat], start: int = 1) -> None:
    """Refuse turns that are not text.

    Args:
        chats: of the problems.
        start: the number of the first problem for messages.

    Raises:
        UserError: if a turn is not a string, or contains a lone surrogate.
    """
    for number, chat in enumerate(chats, start=start):
        for turn in chat:
            try:
                turn["content"].encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise UserError(
                    f"The {turn['role']} turn of problem {number} is not text ({error}): correct it in the data, or "
                    "correct --system."
                ) from error


def context_of(settings: Settings) -> int | None:
    """The tokens that a prompt and its answer may have together; None if the model does not say."""
    return min(filter(None, (settings.max_model_len, context_length(settings.model))), default=None)


def check_chats(chats: list[Chat], settings: Settings, tokenizer: Any) -> None:
    """Refuse chats that the model's chat template rejects, and prompts that do not fit the context.

    Raises:
        UserError: says what to change.
    """
    check_texts(chats)
    context = context_of(settings)
    remedy = "" if context == context_length(settings.model) else "raise --max-model-len, "
    for number, chat in enumerate(chats, start=1):
        if reason := _too_long(chat, context, settings, tokenizer, number):
            raise UserError(f"{reason}: {remedy}shorten the prompt, or remove the problem from the data.")
    print_unused(tokenizer, chats[0], settings.chat_template_kwargs)


def refusal_of(chat: Chat, settings: Settings, tokenizer: Any, number: int) -> str | None:
    """Why a chat that contains answers cannot be asked, by `Engine.refusal`."""
    try:
        check_texts([chat], number)
        return _too_long(chat, context_of(settings), settings, tokenizer, number)
    except UserError as error:
        return str(error)


def _too_long(chat: Chat, context: int | None, settings: Settings, tokenizer: Any, number: int) -> str | None:
    length = len(prompt_ids(tokenizer, chat, settings.chat_template_kwargs, number))
    if context is None or length < context:
        return None
    return f"The prompt of problem {number} has {length} tokens, but the context length is {context}"


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of distributions, by name."""
    return {package: importlib.metadata.version(package) for package in packages}
