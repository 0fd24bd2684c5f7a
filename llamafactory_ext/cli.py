"""`llamafactory-ext`: what belongs to a training but is none."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import __version__
from .errors import UserError
from .pairs.commands import app as data

app = typer.Typer(
    help="Preference data, plans and checks for trainings with `llamafactory-cli train`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """The console script: a wrong input is one sentence and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"llamafactory-ext: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
