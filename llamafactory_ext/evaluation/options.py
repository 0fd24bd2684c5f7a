"""The options that the evaluation's commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

from typer import Option

from ..paths import output_path
from .chat_templates import parse_chat_template_kwargs
from .engines import Sampling, Settings
from .models import BASE, Dtype, EngineName, local_model, parse_adapters

ChatTemplateKwargs = Annotated[
    str,
    Option(help="""Arguments of the chat template as JSON, as in training: '{"enable_thinking": false}'."""),
]


def written_to(help: str) -> Any:
    """The option of a folder or file to write."""
    return Option(help=help, parser=output_path, metavar="PATH")


@dataclass(frozen=True)
class Options:
    """Which models are asked, with which engine, and how they answer."""

    model: Annotated[
        str, Option(help="A model folder or a name on the Hub; with --engine openai, its name on the server.")
    ] = ""
    engine: Annotated[EngineName, Option(help="Inference engine.")] = EngineName.vllm
    adapter: Annotated[list[str] | None, Option(help="NAME=DIR of a LoRA adapter; may be repeated.")] = None
    skip_base: Annotated[bool, Option("--skip-base", help="Ask only the adapters.")] = False
    limit: Annotated[int | None, Option(min=1, help="Number of problems to use, from the first (default: all).")] = None
    system: Annotated[str | None, Option(help="System turn for rows without one; may be empty.")] = None
    chat_template_kwargs: ChatTemplateKwargs = "{}"
    temperature: Annotated[float, Option(min=0, help="0: greedy.")] = 0.0
    top_p: Annotated[float, Option(min=0, max=1)] = 1.0
    repetition_penalty: Annotated[float, Option(min=0.01, help="1: none.")] = 1.0
    max_tokens: Annotated[int, Option(min=1, help="Token limit of an answer.")] = 1024
    seed: Annotated[int, Option(min=0, max=2**32 - 1)] = 0
    dtype: Annotated[Dtype, Option(help="Data type of the weights; use float32 to compare engines.")] = Dtype.auto
    tensor_parallel: Annotated[int, Option(min=1, help="vllm: GPUs per copy of the model.")] = 1
    data_parallel: Annotated[int, Option(min=1, help="vllm: copies of the model.")] = 1
    max_model_len: Annotated[int | None, Option(min=1, help="vllm: context length.")] = None
    batch_size: Annotated[int, Option(min=1, help="hf: prompts per batch.")] = 16
    base_url: Annotated[str, Option(help="openai: address of the server.")] = "http://127.0.0.1:8000/v1"
    concurrency: Annotated[int, Option(min=1, help="openai: parallel requests.")] = 64

    def settings(self) -> Settings:
        """The engine's settings; downloads the model if it is on the Hub.

        Raises:
            UserError: if a model or adapter does not exist, or the template's arguments are not a JSON object.
        """
        return Settings(
            model=local_model(self.model, self.engine),
            adapters=parse_adapters(self.adapter or [], self.engine),
            sampling=Sampling(self.temperature, self.top_p, self.repetition_penalty, self.max_tokens, self.seed),
            chat_template_kwargs=parse_chat_template_kwargs(self.chat_template_kwargs),
            dtype=self.dtype.value,
            tensor_parallel=self.tensor_parallel,
            data_parallel=self.data_parallel,
            max_model_len=self.max_model_len,
            batch_size=self.batch_size,
            base_url=self.base_url,
            concurrency=self.concurrency,
        )

    def runs(self, settings: Settings) -> list[str]:
        """The names of the runs: `base` for the model itself, and its adapters."""
        return [*([] if self.skip_base and settings.adapters else [BASE]), *settings.adapters]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `options`, which is `Options` or derived from it, by one Typer option per field."""
    parameters = inspect.signature(command, eval_str=True).parameters
    own = [each for each in parameters.values() if each.name != "options"]
    options = parameters["options"].annotation
    kinds, known = get_type_hints(options, include_extras=True), fields(options)
    shared = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=kinds[each.name])
        for each in known
    ]

    @wraps(command)
    def main(**words: Any) -> None:
        command(options=options(**{each.name: words.pop(each.name) for each in known}), **words)

    del main.__wrapped__  # whose signature and annotations Typer would read
    signature = inspect.Signature([*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own), *shared])
    main.__signature__ = signature  # type: ignore[attr-defined]
    main.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return main
