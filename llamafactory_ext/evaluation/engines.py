"""What produces the answers: vLLM in process, an OpenAI-compatible server, or transformers.

Every engine takes jobs and yields each answer as soon as it is finished, so that the caller can keep it at once.
Sampling is greedy unless asked otherwise, and all its parameters are sent with every question. An engine takes those
that it is not sent from the model's generation_config.json, where a penalty for repetition or a search with beams hides
the very degeneration that is to be measured. Of that file, only the end tokens count.
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


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One problem for one model: `run` is the name of the adapter, or `base`."""

    run: str
    index: int
    messages: Chat


@dataclass(frozen=True)
class Settings:
    """What the engines need to know; each uses its part."""

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
    def check(self, chats: list[Chat]) -> None:
        """Refuse, with a UserError, what could not be answered, before anything is loaded or written."""

    def versions(self) -> dict[str, str]:
        """The packages that the answers depend on, for the manifest."""

    def parameters(self) -> dict[str, Any]:
        """What is sent with every question, end tokens too where the engine is told them; for the manifest."""

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        """Each job with its answer, or with why it was refused, in the order in which they are finished.

        Raises:
            UserError: if the engine fails; what it answered before has been yielded.
        """


def check_texts(chats: list[Chat]) -> None:
    """
    Raises:
        UserError: if a turn is no text, or one that no model could read.
    """
    for number, chat in enumerate(chats, start=1):
        for turn in chat:
            try:
                turn["content"].encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise UserError(
                    f"The {turn['role']} turn of problem {number} is no text ({error}): correct it in the data, or in "
                    "--system."
                ) from error


def check_chats(chats: list[Chat], settings: Settings, tokenizer: Any) -> None:
    """Refuse what the model's chat template does not take, and a prompt that is too long for its context.

    Raises:
        UserError: with what to change.
    """
    check_texts(chats)
    made_for = context_length(settings.model)
    context = min(filter(None, (settings.max_model_len, made_for)), default=None)
    for number, chat in enumerate(chats, start=1):
        ids = prompt_ids(tokenizer, chat, settings.chat_template_kwargs, number)
        if context and len(ids) >= context:
            remedy = "" if context == made_for else "raise --max-model-len, "
            raise UserError(
                f"The prompt of problem {number} has {len(ids)} tokens, the context {context}: {remedy}shorten the "
                "prompt, or leave that problem out of the data."
            )
    print_unused(tokenizer, chats[0], settings.chat_template_kwargs)


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of distributions, by name."""
    return {package: importlib.metadata.version(package) for package in packages}
