"""LLaMA-Factory's v1 engine (USE_V1) has its own losses: a `pref_loss` that it lacks is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args, get_type_hints

import wrapt

from ..patching import Patch


def _refuse_in_v1(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "launch", _launch_v1)


def _launch_v1(stock: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a loss that the engine lacks: it would train another one, or fail only after loading the weights."""
    from omegaconf import OmegaConf

    files = [word for word in sys.argv[1:] if word.endswith((".yaml", ".yml", ".json")) and os.path.isfile(word)]
    recipe = OmegaConf.merge(OmegaConf.create(), *map(OmegaConf.load, files), OmegaConf.from_cli(sys.argv[1:]))
    loss = OmegaConf.select(recipe, "pref_loss")
    if loss is not None and loss not in (known := _losses_of_v1()):
        has = f"only the preference losses {', '.join(known)}" if known else "no preference losses"
        raise ValueError(
            f"pref_loss {loss!r} cannot be trained with USE_V1: the v1 engine of this LLaMA-Factory has {has}. "
            "Unset USE_V1."
        )
    stock(*args, **kwargs)


def _losses_of_v1() -> tuple[str, ...]:
    """The engine's losses, from the type of `pref_loss`; empty in LLaMA-Factory 0.9.5, which lacks the key."""
    from llamafactory.v1.config.training_args import TrainingArguments

    return get_args(get_type_hints(TrainingArguments).get("pref_loss"))


PATCHES = (
    Patch(
        "llamafactory.v1.launcher",
        "The v1 engine has few preference losses or none, and none of the plugin's.",
        {"launch": ()},
        _refuse_in_v1,
    ),
)
