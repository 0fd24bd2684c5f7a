"""The command group `llamafactory-ext eval`."""

from __future__ import annotations

import typer

from ..commandline import Group
from . import answers, compare, grading, gsm8k, harness, judge, sampling

app = typer.Typer(
    cls=Group,
    help="Score models on GSM8K and benchmarks, compare runs, sample answers, and let a judge compare or rate them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for name, module in {
    "gsm8k": gsm8k,
    "harness": harness,
    "compare": compare,
    "sample": sampling,
    "answers": answers,
    "judge": judge,
    "grade": grading,
}.items():
    app.command(name, help=module.__doc__, no_args_is_help=True)(module.main)
