"""Prints losses: all in a table, or one whole, with its keys as lines of a recipe."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..losses.registry import Loss
from .keys import keys_of

NOTATION = "D_w, D_l: log pi/pi_ref of the chosen and the rejected response; sigma: the logistic function."
NEEDS = {
    "batch > 1": "several pairs in a micro-batch (per_device_train_batch_size).",
    "ranking": "data rows with more than two answers; it trains on pairs, too.",
    "scores": "columns of the data with the responses' scores (pref_margin_column).",
}
WIDEST = 100  # columns of a text, on consoles that have more


def show_all(losses: Iterable[Loss], console: Console) -> None:
    """Print a table with a row per loss.

    Args:
        losses: those of a family one after the other.
        console: where to print.
    """
    given = list(losses)
    keys = {loss.name: [f"{key}: {_as_yaml(value) or value}" for key, value in keys_of(loss).items()] for loss in given}
    table = _table(min(console.width // 3, max(len(line) for lines in keys.values() for line in lines)))
    for family, members in groupby(given, lambda loss: loss.family):
        table.add_section()
        table.add_row(Text(family, style="bold"))
        for loss in members:
            equation = loss.description.partition("\n")[0]
            cells = (f"  {loss.name}", equation, "\n".join(loss.needs), "\n".join(keys[loss.name]))
            table.add_row(*map(Text, cells))
    console.print(table)
    _print(f"\n{NOTATION}", console)
    _explain([need for loss in given for need in loss.needs], console)


def _table(width_of_keys: int) -> Table:
    """An empty table, which takes what is missing from the widest column: the equation's."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("pref_loss", overflow="fold")
    table.add_column("loss per pair", overflow="fold")
    table.add_column("needs", overflow="fold", max_width=len("reference"))  # "no reference" is two lines
    table.add_column("keys and defaults", overflow="fold", min_width=width_of_keys)
    return table


def show_one(loss: Loss, console: Console, loss_file: str | None = None) -> None:
    """Print the docstring of a loss, what it needs, and its keys with their defaults as lines of a recipe.

    Args:
        loss: the loss.
        console: where to print.
        loss_file: the file that registers it, as the recipe names it; None for the package's own.
    """
    _print(f"{loss.name} (family: {loss.family}; needs: {', '.join(loss.needs)})", console)
    _print(f"\n{_refilled(loss.docstring)}\n\n{NOTATION}", console)
    _explain(loss.needs, console)
    _print("\nIts keys with their defaults, to copy into a recipe:\n", console)
    # Not wrapped, or a line that is copied would be two.
    console.print("\n".join(_recipe(loss, loss_file)), soft_wrap=True, markup=False, highlight=False)
    console.print(f"\nCode: {loss.file}", soft_wrap=True, markup=False, highlight=False)


def _explain(needs: Iterable[str], console: Console) -> None:
    for need in sorted(NEEDS.keys() & set(needs)):
        _print(f"{need}: {NEEDS[need]}", console)


def _print(text: str, console: Console) -> None:
    console.print(text, width=min(console.width, WIDEST), markup=False, highlight=False)


def _refilled(docstring: str) -> str:
    """A docstring with each paragraph in a line, as it was broken for another width; lists and sources keep theirs."""
    return re.sub(r"(?<=\S)\n(?!\s|[-*] |Source:)", " ", docstring)


def _recipe(loss: Loss, loss_file: str | None) -> list[str]:
    """The lines of a recipe, with the name of a hyper-parameter as a comment where its key has another one."""
    lines = [f"pref_loss: {_as_yaml(loss.name)}"]
    if loss_file is not None:
        lines.append(f"pref_loss_file: {_as_yaml(loss_file)}")
    if loss.needs_scores:
        lines.append("# pref_margin_column: [score_chosen, score_rejected]")
    args, given = [], {"beta", *loss.defaults()}
    for (key, default), parameter in zip(keys_of(loss).items(), loss.parameters, strict=True):
        name = key.removeprefix("pref_loss_args.")
        line = _line(name, default) if parameter in given else f"{name}:  # required"
        if name != key:
            args.append(f"  {line}")
        else:
            lines.append(line if name == parameter else f"{line}  # {parameter}")
    return [*lines, "pref_loss_args:", *args] if args else lines


def _line(key: str, default: Any) -> str:
    value = _as_yaml(default)
    return f"# {key}: {default}" if value is None else f"{key}: {value}"


def _as_yaml(value: Any) -> str | None:
    """A value in one line of YAML; None if it is no value of YAML."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)
    try:
        dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    except yaml.YAMLError:
        return None
    return str(dumped).removesuffix("\n").removesuffix("\n...")
