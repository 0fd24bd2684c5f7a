"""`llamafactory-ext cache`: the reference log-probabilities that trainings have kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ...commandline import Group
from ...errors import UserError
from ...paths import output_path
from .folders import choose, default_folder, list_references, remove

Opt = typer.Option
Folder = Annotated[
    Path | None,
    Opt(help="As in `ref_log_probs_cache_dir` (default: the user's cache).", parser=output_path, metavar="PATH"),
]
SHOWN = 12  # characters of a fingerprint

app = typer.Typer(cls=Group, rich_markup_mode="markdown", pretty_exceptions_enable=False)
console = Console()


@app.callback(invoke_without_command=True)
def show(context: typer.Context, folder: Folder = None) -> None:
    """Reference log-probabilities kept by earlier trainings: list them, or remove them with `clear`.

    llamafactory-ext cache

    llamafactory-ext cache --folder /shared/references
    """
    if context.invoked_subcommand is not None:
        return
    place = _place(folder)
    references = list_references(place)
    if not references:
        console.print(f"{place} holds no reference log-probabilities.", soft_wrap=True, markup=False, highlight=False)
        return
    table = Table("reference", "model", "pairs", "size", "last change")
    for each in references:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.written))
        table.add_row(each.folder.name[:SHOWN], escape(each.model), f"{each.pairs:,}", decimal(each.size), day)
    console.print(table)
    total = decimal(sum(each.size for each in references))
    console.print(f"{total} in {place}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def clear(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[REFERENCE]...", help="As listed, or the beginning of it.")
    ] = None,
    everything: Annotated[bool, Opt("--all", help="Every reference.")] = False,
    older_than: Annotated[float | None, Opt(min=0, help="Only those not changed for so many days.")] = None,
    folder: Folder = None,
) -> None:
    """Remove references. A later training that needs one computes it again.

    llamafactory-ext cache clear c279babeb308

    llamafactory-ext cache clear --older-than 30
    """
    there = list_references(_place(folder))
    chosen = choose(there, references or [], everything=everything, older_than=older_than)
    kept = [each for each in chosen if not remove(each)]
    freed = decimal(sum(each.size for each in chosen if each not in kept))
    console.print(f"{len(chosen) - len(kept)} of {len(there)} references removed, {freed} freed", highlight=False)
    if kept:
        names = ", ".join(each.folder.name[:SHOWN] for each in kept)
        raise UserError(f"a training is computing {names}: run the same command again when it is done.")


def _place(folder: Path | None) -> Path:
    if folder is not None and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: write the one that the recipe names.")
    return folder or default_folder()
