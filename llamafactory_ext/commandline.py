"""What the package's command lines share: a wrong input, or what the system refuses, is one sentence and status 2."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import UserError, of_system

LINE_SECONDS = 30  # between two lines of progress, where no bar can be drawn


class _Refusing:
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except BrokenPipeError:  # nobody reads on; click ends quietly
            raise
        except (UserError, OSError) as error:
            said = of_system(error) if isinstance(error, OSError) else error
            print(f"{ctx.find_root().info_name}: {said}", file=sys.stderr)
            raise typer.Exit(2) from None


class Command(_Refusing, TyperCommand):
    """A command that a UserError or OSError ends with a sentence, not with a traceback."""


class Group(_Refusing, TyperGroup):
    """Such commands together."""


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """How far a command is, on stderr: a bar on a terminal, else a line every half a minute.

    What is yielded is called with the units that are done and their number.
    """
    from tqdm import tqdm

    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        bar.total = total
        bar.update(done - bar.n)
        if bar.disable and time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            print(f"{what}: {done} of {total} {unit}", file=sys.stderr, flush=True)

    with tqdm(desc=what, unit=f" {unit}", disable=None) as bar:  # None: where stderr is no terminal
        yield show
