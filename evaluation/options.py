"""What the scripts' command lines share: how models are loaded, how they are asked, and how a refusal reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from models import Dtype as DtypeName
from models import EngineName
from typer import BadParameter, Exit, Option

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


def path(value: str | Path) -> Path:
    """What is to be written, with its `~` resolved: shells leave that of `--output=~/x`.

    Raises:
        typer.BadParameter: if it is empty, as after a variable that is not set, or names an unknown user.
    """
    if not str(value):
        raise BadParameter("it is empty: write a path.")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise BadParameter(f"{value}: {error}") from error


def refusal(script: str, error: Exception) -> Exit:
    """Say in a sentence what is wrong with the input, or what the system has refused; returns the exit, of status 2."""
    if isinstance(error, OSError) and error.strerror is not None:
        place = "" if error.filename is None else f"{error.filename}: "
        error = Exception(f"{place}{error.strerror}. Mend that and run the same command again, which goes on.")
    print(f"{script}: {error}", file=sys.stderr)
    return Exit(2)
