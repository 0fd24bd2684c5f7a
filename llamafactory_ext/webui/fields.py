"""The fields that the board's RLHF section gains, which of them a loss has, and how they travel.

They travel in the board's own extra arguments: what is set in a field becomes a key of that JSON on the way to the
previewed command, the saved configuration and the training, and returns to its field when a configuration is loaded.
So files that were saved with the plugin load without it, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import TRAINING_STAGES

from ..losses import STOCK_LOSSES
from ..losses.lookup import forgotten_afterwards, get_loss, load_loss_file, loss_names
from ..losses.registry import Loss
from ..recipe.arguments import SR_PROMPT
from . import texts

TRI_STATE = {"auto": None, "true": True, "false": False}


@dataclass(frozen=True)
class Field:
    """A YAML key of the plugin, as the board shows it.

    Args:
        kind: the component's class.
        belongs_to: whether a loss has it.
        properties: more for the component; its words come with the language.
    """

    kind: type[Component]
    belongs_to: Callable[[Loss], bool]
    properties: Mapping[str, Any]

    @property
    def empty(self) -> Any:
        """What it holds when nothing is set."""
        return self.properties.get("value")

    def can_give(self, value: Any) -> bool:
        """Whether a page can send this value; whoever reaches the board can send any."""
        if self.is_flag:
            return isinstance(value, str) and value in self.properties["choices"]
        if self.kind is gr.Checkbox:
            return isinstance(value, bool)
        if self.kind is gr.Number:
            return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        return value is None or isinstance(value, str)

    @property
    def is_flag(self) -> bool:
        """Whether it is true, false or left to the plugin; false means something then."""
        return "choices" in self.properties

    def to_yaml(self, value: Any) -> Any:
        """The value of the key; None where nothing is set."""
        if self.is_flag:
            return TRI_STATE.get(value, value)
        return None if value == "" or value is False else value

    def from_yaml(self, value: Any) -> Any:
        if self.is_flag:
            return next((name for name, meaning in TRI_STATE.items() if meaning is value), value)
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        return self.empty if value is None else value


def _takes(keyword: str) -> Callable[[Loss], bool]:
    return lambda loss: keyword in loss.parameters


def _is_users(loss: Loss) -> bool:
    return texts.about_loss(loss.name, "en") is None


def _has_reference(loss: Loss) -> bool:
    return loss.needs_reference


def _any(loss: Loss) -> bool:
    return True


_UNSET: dict[str, Any] = {"value": None, "placeholder": "auto"}  # without a placeholder, gradio would show 0
_AUTO: dict[str, Any] = {"choices": list(TRI_STATE), "value": "auto"}

# In the board's order: first those of single losses, then those of the stage.
LOSS_FIELDS: dict[str, Field] = {
    "dpop_lambda": Field(gr.Number, _takes("dpop_lambda"), _UNSET),
    "sr_lambda": Field(gr.Number, _takes("sr_lambda"), _UNSET),
    "sr_prompt": Field(
        gr.Textbox, _takes("sr_lambda"), {"value": "", "placeholder": SR_PROMPT, "scale": 3, "lines": 3}
    ),
    "ipo_length_normalize": Field(gr.Dropdown, _takes("length_normalize"), _AUTO),
    "pref_loss_args": Field(gr.Textbox, _is_users, {"value": "", "placeholder": '{"tau": 0.5}', "scale": 2}),
}
STAGE_FIELDS: dict[str, Field] = {
    "share_prefix": Field(gr.Dropdown, _any, _AUTO),
    "precompute_ref_log_probs": Field(gr.Dropdown, _has_reference, _AUTO),
    "ref_log_probs_cache_dir": Field(gr.Textbox, _has_reference, {"value": ""}),
    "pref_loss_file": Field(gr.Textbox, _any, {"value": ""}),
    "pref_stop_on_degeneration": Field(gr.Checkbox, _any, {"value": False}),
}
FIELDS = LOSS_FIELDS | STAGE_FIELDS
TEXT_KEYS = [key for key, field in FIELDS.items() if field.kind is gr.Textbox]
FLAGS = [key for key, field in FIELDS.items() if field.is_flag]


def is_dpo(stage: str) -> bool:
    """Whether this is the board's name of the stage that the plugin is for."""
    return bool(TRAINING_STAGES.get(stage) == "dpo")


def losses_of(stage: str, loss_file: str) -> tuple[dict[str, Loss], str | None]:
    """The losses by name that a stage offers, LLaMA-Factory's own first, and what is wrong with the file if it is.

    Args:
        stage: the board's name of it; others than DPO have LLaMA-Factory's losses only.
        loss_file: a user's file, or empty.
    """
    with forgotten_afterwards():  # the board serves others, too
        if not is_dpo(stage):
            return {name: get_loss(name) for name in STOCK_LOSSES}, None
        names, error = list(dict.fromkeys([*STOCK_LOSSES, *loss_names()])), None
        try:
            names += load_loss_file(loss_file) if loss_file else []
        except ValueError as reason:
            error = str(reason)
        return {name: get_loss(name) for name in names}, error


def gathered(extra_args: str, values: Mapping[str, Any], stage: str, loss: Loss | None) -> str:
    """The extra arguments with what is set in the fields that this stage and loss have.

    Args:
        extra_args: JSON as the user typed it; left alone if it is none, because the board says so itself.
        values: what the fields hold, by key.
        stage: the board's name of the training stage.
        loss: the chosen loss; None if there is none of that name.
    """
    settings = _settings(values, stage, loss)
    extra = _parsed(extra_args)
    return json.dumps(extra | settings, ensure_ascii=False) if settings and extra is not None else extra_args


def spread(extra_args: str) -> tuple[str, dict[str, Any]]:
    """The extra arguments without the plugin's keys, and what its fields then hold, by key."""
    extra = _parsed(extra_args) or {}
    values = {key: field.from_yaml(extra.get(key)) for key, field in FIELDS.items()}
    others = {key: value for key, value in extra.items() if key not in FIELDS}
    return (extra_args if len(others) == len(extra) else json.dumps(others, ensure_ascii=False)), values


def set_twice(extra_args: str, values: Mapping[str, Any], stage: str, loss: Loss | None) -> str | None:
    """A key that stands in the extra arguments and is set in its field, too."""
    return next(iter((_parsed(extra_args) or {}).keys() & _settings(values, stage, loss)), None)


def _settings(values: Mapping[str, Any], stage: str, loss: Loss | None) -> dict[str, Any]:
    """The keys that are set in the fields of this stage and loss."""
    settings = {key: field.to_yaml(values[key]) for key, field in FIELDS.items() if is_shown(key, stage, loss)}
    return {key: value for key, value in settings.items() if value is not None}


def is_shown(key: str, stage: str, loss: Loss | None) -> bool:
    """Whether a field is for this stage (the board's name of it) and loss; an unknown loss has those of the stage."""
    if not is_dpo(stage):
        return False
    return key in STAGE_FIELDS if loss is None else FIELDS[key].belongs_to(loss)


def _parsed(extra_args: str) -> dict[str, Any] | None:
    try:
        extra = json.loads(extra_args)
    except (TypeError, ValueError, RecursionError):  # a saved configuration may hold anything
        return None
    return extra if isinstance(extra, dict) else None
