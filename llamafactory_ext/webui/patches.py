"""What is done to LLaMA Board."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from ..patching import Patch, replaced


def _add_words(module: ModuleType) -> None:
    from .texts import locales

    module.LOCALES.update(locales(module.LOCALES["pref_loss"]))


def _keep_settings(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "_clean_cmd", _clean_cmd)
    wrapt.wrap_function_wrapper(module, "gen_cmd", _gen_cmd)


def _clean_cmd(stock: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Also keep keys of ours that are false: left out, they would mean `where that is exact`."""
    from .fields import FLAGS

    (settings,) = args
    return stock(settings) | {key: settings[key] for key in FLAGS if settings.get(key) is False}


def _gen_cmd(stock: Callable[..., str], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Quote texts of ours, so that the command can be pasted into a shell."""
    from .fields import TEXT_KEYS

    (settings,) = args
    texts = {key: shlex.quote(settings[key]) for key in TEXT_KEYS if isinstance(settings.get(key), str)}
    return stock(settings | texts)


def _run_with_fields(module: ModuleType) -> None:
    from .runner import PreferenceRunner

    module.Runner = PreferenceRunner  # type: ignore[attr-defined]


def _add_fields(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "create_train_tab", _create_train_tab)


def _create_train_tab(stock: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from .section import extend_train_tab, make_fields

    (engine,) = args
    # What the tab's buttons hand over must be there before they are made; the place for it, only afterwards.
    fields, base = make_fields(), engine.manager.get_base_elems
    with replaced(engine.manager, "get_base_elems", lambda: base() | set(fields.values())):
        elems = stock(engine)
    return extend_train_tab(engine, elems, fields)


PATCHES = (
    Patch(
        "llamafactory.webui.locales",
        "The board's components take their words from it.",
        {"LOCALES": (), "ALERTS": ()},
        _add_words,
    ),
    Patch(
        "llamafactory.webui.common",
        "The board drops what is false, and does not quote, on the way to a command.",
        {"_clean_cmd": ("args",), "gen_cmd": ("args",), "get_save_dir": ("paths",)},
        _keep_settings,
    ),
    Patch("llamafactory.extras.ploting", "Live rewards are smoothed as its loss is.", {"smooth": ("scalars",)}),
    Patch(
        "llamafactory.webui.runner",
        "PreferenceRunner is a subclass of it.",
        {
            "Runner._initialize": ("data", "do_train", "from_preview"),
            "Runner._parse_train_args": ("data",),
            "Runner._build_config_dict": ("data",),
            "Runner.load_args": ("lang", "config_path"),
            "Runner.check_output_dir": ("output_dir",),
        },
    ),
    Patch(
        "llamafactory.webui.engine",
        "The board runs what its fields say.",
        {"Runner": (), "Engine": ("demo_mode",)},
        _run_with_fields,
    ),
    Patch(
        "llamafactory.webui.interface",
        "The board's train tab gains fields and curves.",
        {"create_train_tab": ("engine",)},
        _add_fields,
    ),
)
