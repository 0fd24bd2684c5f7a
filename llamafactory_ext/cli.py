"""`llamafactory-ext`: what belongs to a training but is none."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def env() -> None:
    """Versions, whether the plugin acts, devices, and conflicts with their fix; ends with 1 if there are conflicts."""
    from .environment import findings

    table = Table(show_header=False, box=None)
    conflicts = 0
    for finding in findings():
        table.add_row(finding.name, escape(finding.value), style="red" if finding.fix else None)
        if finding.fix:
            table.add_row("", escape(f"-> {finding.fix}"))
            conflicts += 1
    console.print(table)
    if conflicts:
        raise typer.Exit(1)


@app.command()
def losses(
    pref_loss_file: Annotated[str | None, typer.Option(help="Also a file of yours, as in the recipe.")] = None,
) -> None:
    """Every `pref_loss`: its equation, source, and YAML keys with their defaults."""
    from .arguments import keys_of
    from .registry import get_loss, load_loss_file, loss_names

    if pref_loss_file is not None:
        try:
            load_loss_file(pref_loss_file)
        except ValueError as error:
            raise UserError(str(error)) from error
    table = Table("pref_loss", "loss per pair", "keys", show_lines=True)
    for name in loss_names():
        loss = get_loss(name)
        keys = "\n".join(f"{key}: {value}" for key, value in keys_of(loss).items())
        table.add_row(name, escape(loss.description), escape(keys))
    console.print(table)
    console.print(
        "D_w, D_l: log pi/pi_ref of the chosen and the rejected answer; sigma: the logistic function.", markup=False
    )


def main() -> None:
    """The console script: a wrong input is one sentence and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"llamafactory-ext: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
