"""`pref_loss_args`: keyword arguments of losses, mostly of the user's, checked; and how messages show values."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..losses.registry import Loss
from .keys import args_of


def from_loss_args(args: Any, losses: Sequence[Loss]) -> dict[str, Any]:
    """The values of `pref_loss_args` by name.

    Args:
        args: with `pref_loss_args` and `pref_loss`.
        losses: those that the recipe trains.

    Raises:
        ValueError: if none of them takes one of the values.
    """
    if args.pref_loss_args is None:
        return {}
    accepted = {name: parameter for loss in losses for name, parameter in args_of(loss).items()}
    if not accepted and not any(loss.is_users for loss in losses):
        raise ValueError(
            "`pref_loss_args` are for a loss of your own: name its file with pref_loss_file, or write the keys of "
            f"pref_loss {args.pref_loss!r} instead."
        )

    given = _as_mapping(args.pref_loss_args)
    for name, value in given.items():
        if name == "beta":
            raise ValueError("`pref_loss_args` may not hold beta: write `pref_beta`.")
        if name not in accepted:
            raise ValueError(
                f"`pref_loss_args` holds {name!r}, but pref_loss {args.pref_loss!r} takes {listed(accepted)} there: "
                "write one of its keyword arguments."
            )
        _check_annotation(name, value, accepted[name])
    return given


def _as_mapping(value: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'`pref_loss_args` is not JSON ({error}): write it like {{"tau": 0.5}}.') from error
    if not isinstance(value, dict):
        raise ValueError(f"`pref_loss_args` must be a mapping like {{tau: 0.5}}, not {value!r}.")
    return value


def _check_annotation(name: str, value: Any, parameter: inspect.Parameter) -> None:
    # An annotation is a string in files that begin with `from __future__ import annotations`.
    kind = next((kind for kind in (bool, int, float, str) if parameter.annotation in (kind, kind.__name__)), None)
    if kind is None:
        return
    if not (is_number(value) if kind is float else type(value) is kind):
        raise ValueError(f"`pref_loss_args` gives {name} as {value!r}: write a value of type {kind.__name__}.")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def is_number(value: Any) -> bool:
    """Whether a float can hold it; an integer of YAML may have any number of digits."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
