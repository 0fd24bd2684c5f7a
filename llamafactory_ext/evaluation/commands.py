"""The command group `llamafactory-ext eval`."""

from __future__ import annotations

import typer

from ..commandline import Group
from . import answers, compare, gsm8k, judge

app = typer.Typer(
    cls=Group,
    help="Score models on GSM8K, compare runs, and let a judge compare answers to open questions.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for module in (gsm8k, compare, answers, judge):
    name = module.__name__.rpartition(".")[2]
    app.command(name, help=module.__doc__, no_args_is_help=True)(module.main)
