"""What the package's command lines share: a wrong input, or what the system refuses, is one sentence and status 2."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import UserError, of_system


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
