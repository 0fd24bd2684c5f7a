"""What produces the answers: vLLM in process, an OpenAI-compatible server, or transformers.

Every engine takes jobs and yields each answer as soon as it is finished, so that the caller can keep it at once.
Sampling is greedy unless asked otherwise, and the repetition penalty is always sent: vLLM would take a model's
generation_config.json for it otherwise, and a penalty there hides the very degeneration that is to be measured.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from generations import Generation
from questions import UserError


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    seed: int = 0


Chat = list[dict[str, str]]


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
        """What the answers depend on, for the manifest."""

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        """Each job with its answer, or with why it was refused, in the order in which they are finished.

        Raises:
            UserError: if the engine fails; what it answered before has been yielded.
        """


def make_engine(name: str, settings: Settings) -> Engine:
    """The engine by name; nothing is loaded before `generate`."""
    if name == "vllm":
        from vllm_engine import VllmEngine

        return VllmEngine(settings)
    if name == "openai":
        from openai_engine import OpenAIEngine

        return OpenAIEngine(settings)
    from transformers_engine import TransformersEngine

    return TransformersEngine(settings)


def check_chats(chats: list[Chat], settings: Settings) -> None:
    """Refuse a model without chat template, or with a context too short for a prompt.

    Raises:
        UserError: with the key to change.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.chat_template is None:
        raise UserError(f"{settings.model} has no chat template: add a chat_template.jinja to its folder.")
    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    context = settings.max_model_len or config.max_position_embeddings
    for number, chat in enumerate(chats):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) >= context:
            raise UserError(
                f"The prompt of problem {number} has {len(ids)} tokens, the context {context}: raise "
                "--max-model-len, or leave that problem out of the data."
            )


def package_versions(*packages: str) -> dict[str, str]:
    """The installed versions of distributions, by name."""
    return {package: importlib.metadata.version(package) for package in packages}
