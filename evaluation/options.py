"""Command-line options that several scripts take: how models are loaded, and how they are asked."""

from __future__ import annotations

from typing import Annotated

from models import Dtype as DtypeName
from models import EngineName
from typer import Option

Model = Annotated[str, Option(help="A model folder or hub name; with --engine openai, the name it is served by.")]
Engine = Annotated[EngineName, Option(help="What generates.")]
Adapter = Annotated[list[str] | None, Option(help="NAME=DIR of a LoRA adapter; several in one load.")]
Limit = Annotated[int | None, Option(min=1, help="Only the first problems.")]
Temperature = Annotated[float, Option(min=0, help="0: greedy.")]
TopP = Annotated[float, Option(min=0, max=1)]
RepetitionPenalty = Annotated[float, Option(min=0.01, help="1: none. Always sent.")]
ChatTemplateKwargs = Annotated[
    str,
    Option(help="""Arguments of the chat template, as JSON: '{"enable_thinking": false}', if trained like that."""),
]
MaxTokens = Annotated[int, Option(min=1, help="Of an answer.")]
Seed = Annotated[int, Option(min=0, max=2**32 - 1)]
Dtype = Annotated[DtypeName, Option(help="Compare engines in float32.")]
TensorParallel = Annotated[int, Option(min=1, help="vllm: GPUs per copy of the model.")]
DataParallel = Annotated[int, Option(min=1, help="vllm: copies of the model.")]
MaxModelLen = Annotated[int | None, Option(min=1, help="vllm: context length.")]
BatchSize = Annotated[int, Option(min=1, help="hf: problems at a time.")]
BaseUrl = Annotated[str, Option(help="openai: the server.")]
Concurrency = Annotated[int, Option(min=1, help="openai: requests at a time.")]
