"""The fields that the board's RLHF section gains, which of them a loss has, and how they travel.

They travel in the board's own extra arguments: what is set in a field becomes a key of that JSON on the way to the
previewed command, the saved configuration and the training, and returns to its field when a configuration is loaded.
So files that were saved with the plugin load without it, and the other way round.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import TRAINING_STAGES
from llamafactory.webui.locales import LOCALES

from ..losses import STOCK_LOSSES
from ..losses.lookup import forgotten_afterwards, get_loss, load_loss_file, loss_names
from ..losses.registry import Loss
from ..recipe.arguments import BY_GAP, EQUAL, SR_PROMPT
from ..recipe.keys import NUMBERS, args_of, divergence_names, split
from . import errors

TRI_STATE = {"auto": None, "true": True, "false": False}


@dataclass(frozen=True)
class Field:
    """A YAML key, as the board shows it.

    Args:
        kind: the component's class.
        belongs_to: whether the chosen losses have it.
        properties: more for the component; its words come with the language.
    """

    kind: type[Component]
    belongs_to: Callable[[Sequence[Loss]], bool]
    properties: Mapping[str, Any]

    @property
    def empty(self) -> Any:
        """What it holds when nothing is set."""
        return self.properties.get("value")

    def can_give(self, value: Any) -> bool:
        """Whether a page can send this value; whoever reaches the board can send any."""
        if "choices" in self.properties:
            return isinstance(value, str) and value in self.properties["choices"]
        if self.kind is gr.Checkbox:
            return isinstance(value, bool)
        if self.kind is gr.Number:
            return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        return value is None or isinstance(value, str)

    @property
    def is_flag(self) -> bool:
        """Whether it is true, false or left to the plugin; false means something then."""
        return self.properties.get("choices") == list(TRI_STATE)

    def to_yaml(self, value: Any) -> Any:
        """The value of the key; None for the default."""
        if self.is_flag:
            return TRI_STATE.get(value, value)
        is_blank = isinstance(value, str) and not value.strip()
        return None if is_blank or value == self.empty else value

    def from_yaml(self, value: Any) -> Any:
        if self.is_flag:
            return next((name for name, meaning in TRI_STATE.items() if meaning is value), value)
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            return ",".join(map(str, value))
        return self.empty if self.to_yaml(value) is None else value


def _any_is(condition: Callable[[Loss], bool]) -> Callable[[Sequence[Loss]], bool]:
    return lambda losses: any(map(condition, losses))


def _takes(keyword: str) -> Callable[[Sequence[Loss]], bool]:
    return _any_is(lambda loss: keyword in loss.parameters)


def _is_users(loss: Loss) -> bool:
    return loss.is_users


_has_reference = _any_is(lambda loss: loss.needs_reference)


def _takes_divergence(losses: Sequence[Loss]) -> bool:
    """As the arguments do: all that have a reference must compare scores."""
    can = all(loss.takes_divergence or not loss.needs_reference for loss in losses)
    return can and _has_reference(losses) and not any(loss.defaults().get("sr_lambda") for loss in losses)


def _compares_pairs(losses: Sequence[Loss]) -> bool:
    return not any(loss.needs_ranking for loss in losses)


def _weighs_rows(losses: Sequence[Loss]) -> bool:
    return not any(loss.needs_batch for loss in losses)


def _weighs_pairs(losses: Sequence[Loss]) -> bool:
    return _weighs_rows(losses) and _compares_pairs(losses)


def _always(losses: Sequence[Loss]) -> bool:
    return True


def _number(belongs_to: Callable[[Sequence[Loss]], bool], step: float, default: str = "auto") -> Field:
    # Without a placeholder, gradio would show 0.
    return Field(gr.Number, belongs_to, {"value": None, "placeholder": default, "step": step})


# As many lines as there may be, or gradio would fit the height to the text before the page has its final width.
_PROMPT: dict[str, Any] = {
    "value": SR_PROMPT,
    "scale": 3,
    "min_width": 320,
    "lines": 5,
    "max_lines": 5,
    "autoscroll": False,
}
_AUTO: dict[str, Any] = {"choices": list(TRI_STATE), "value": "auto"}
_DIVERGENCE: dict[str, Any] = {"choices": divergence_names(), "value": "reverse_kl"}
_COLUMN: dict[str, Any] = {"value": ""}
_RANKED: dict[str, Any] = {"choices": [EQUAL, BY_GAP], "value": EQUAL}

# In the board's order: the loss's own, those of what is trained with it, and those of the stage; a row each.
LOSS_FIELDS: dict[str, Field] = {
    "dpo_label_smoothing": _number(_takes("label_smoothing"), step=0.05),
    "simpo_gamma": _number(_takes("simpo_gamma"), step=0.1),
    "dpop_lambda": _number(_takes("dpop_lambda"), step=1),  # its default is 50
    "discopop_tau": _number(_takes("discopop_tau"), step=0.01),
    "sr_lambda": _number(_takes("sr_lambda"), step=0.1),
    "ipo_length_normalize": Field(gr.Dropdown, _takes("length_normalize"), _AUTO),
    "odpo_alpha": _number(_takes("odpo_alpha"), step=0.1),
    "pref_margin_column": Field(gr.Textbox, _any_is(lambda loss: loss.needs_scores), _COLUMN),
    "rrhf_weight": _number(_takes("rrhf_weight"), step=1),
    "cringe_alpha": _number(_takes("cringe_alpha"), step=0.1),
    "cringe_bias": _number(_takes("cringe_bias"), step=1),
    "cringe_tau": _number(_takes("cringe_tau"), step=1),
    "cringe_top_k": _number(_takes("cringe_top_k"), step=1),
    "pref_loss_args": Field(
        gr.Textbox,
        _any_is(lambda loss: bool(args_of(loss)) or loss.is_users),
        {"value": "", "placeholder": '{"tau": 0.5}', "scale": 2},
    ),
    "sr_prompt": Field(gr.Textbox, _takes("sr_lambda"), _PROMPT),
}
OBJECTIVE_FIELDS: dict[str, Field] = {
    "f_divergence": Field(gr.Dropdown, _takes_divergence, _DIVERGENCE),
    "f_divergence_alpha": _number(_takes_divergence, step=0.1, default="0.5"),
    "ld_alpha": _number(_always, step=0.1, default="1"),  # the same as unset
    "ld_alpha_reference": Field(gr.Checkbox, _has_reference, {"value": False}),
    "pref_bco_weight": _number(_has_reference, step=0.1, default="0"),
    "pref_loss_weights": Field(gr.Textbox, lambda losses: len(losses) > 1, {"value": "", "placeholder": "1.0,0.1"}),
    "pref_wpo": Field(gr.Checkbox, _weighs_pairs, {"value": False}),
    "pref_weight_column": Field(gr.Textbox, _weighs_rows, _COLUMN),
    "pref_ranked_weights": Field(gr.Dropdown, _compares_pairs, _RANKED),
}
STAGE_FIELDS: dict[str, Field] = {
    "ref_model": Field(gr.Textbox, _has_reference, {"value": ""}),
    "precompute_ref_log_probs": Field(gr.Dropdown, _has_reference, _AUTO),
    "ref_log_probs_cache_dir": Field(gr.Textbox, _has_reference, {"value": ""}),
    "share_prefix": Field(gr.Dropdown, _always, _AUTO),
    "pref_loss_file": Field(gr.Textbox, _always, {"value": ""}),
    "pref_stop_on_degeneration": Field(gr.Checkbox, _always, {"value": False}),
}
FIELDS = LOSS_FIELDS | OBJECTIVE_FIELDS | STAGE_FIELDS
TEXT_KEYS = [key for key, field in FIELDS.items() if field.kind is gr.Textbox]
FLAGS = [key for key, field in FIELDS.items() if field.is_flag]

RANGES = {  # others: nonnegative
    "pref_beta": "positive",
    "dpo_label_smoothing": "below_half",
    "simpo_gamma": "finite",
    "cringe_bias": "finite",
    "f_divergence_alpha": "hundred",
    "cringe_tau": "positive",
    "discopop_tau": "positive",
    "cringe_top_k": "count",
}
# Keys that errors name, which the board shows under a label: in backticks, perhaps with a value, or bare but not a part
# of a path or of another word.
_KEY = "|".join(sorted({*FIELDS, *NUMBERS, "pref_loss"}, key=len, reverse=True))
_NAMED = re.compile(rf"`({_KEY})(: [^`]*)?`|(?<![\w./'\"`-])({_KEY})(?![\w/'\"`:-])")


def is_dpo(stage: Any) -> bool:
    """Whether this is the board's name of the stage that the plugin is for."""
    return isinstance(stage, str) and TRAINING_STAGES.get(stage) == "dpo"


def losses_of(stage: str, loss_file: str) -> tuple[dict[str, Loss], ValueError | None]:
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
        except ValueError as raised:
            error = raised
        return {name: get_loss(name) for name in names}, error


def gathered(extra_args: str, values: Mapping[str, Any], stage: str, chosen: Sequence[Loss]) -> str:
    """The extra arguments with what is set in the fields that this stage and loss have.

    Args:
        extra_args: JSON as the user typed it; left alone if it is none, because the board says so itself.
        values: what the fields hold, by key.
        stage: the board's name of the training stage.
        chosen: the losses; empty if there is none of one of the names.
    """
    settings = _settings(values, stage, chosen)
    extra = _parsed(extra_args)
    return json.dumps(extra | settings, ensure_ascii=False) if settings and extra is not None else extra_args


def spread(extra_args: str, stage: Any, chosen: Sequence[Loss]) -> tuple[str, dict[str, Any]]:
    """The extra arguments without what moves to the fields of this stage and loss, and what all fields then hold.

    Keys without a field there stay: KTO takes a `ref_model`, too.
    """
    extra = _parsed(extra_args) or {}
    moving = {key for key in extra if key in FIELDS and is_shown(key, stage, chosen)}
    values = {key: field.from_yaml(extra[key] if key in moving else None) for key, field in FIELDS.items()}
    others = {key: value for key, value in extra.items() if key not in moving}
    return (json.dumps(others, ensure_ascii=False) if moving else extra_args), values


def set_twice(extra_args: str, values: Mapping[str, Any], stage: str, chosen: Sequence[Loss]) -> str | None:
    """A key that stands in the extra arguments and is set in its field, too."""
    return next(iter((_parsed(extra_args) or {}).keys() & _settings(values, stage, chosen)), None)


def _settings(values: Mapping[str, Any], stage: str, chosen: Sequence[Loss]) -> dict[str, Any]:
    """The keys that are set in the fields of this stage and loss."""
    settings = {key: field.to_yaml(values[key]) for key, field in FIELDS.items() if is_shown(key, stage, chosen)}
    return {key: value for key, value in settings.items() if value is not None}


def is_shown(key: str, stage: Any, chosen: Sequence[Loss]) -> bool:
    """Whether a field is for this stage (the board's name of it) and losses; unknown ones have those of the stage."""
    if not is_dpo(stage):
        return False
    return FIELDS[key].belongs_to(chosen) if chosen else key in STAGE_FIELDS


def chosen_losses(name: Any, losses: Mapping[str, Loss]) -> list[Loss]:
    """The losses that are chosen, several separated by commas; none if one of them is not among `losses`."""
    found = [losses.get(each) for each in split(name)] if isinstance(name, str) else []
    return [] if None in found else [loss for loss in found if loss is not None]


def _parsed(extra_args: str) -> dict[str, Any] | None:
    try:
        extra = json.loads(extra_args)
    except (TypeError, ValueError, RecursionError):  # a saved configuration may hold anything
        return None
    return extra if isinstance(extra, dict) else None


# --- what is wrong, in the board's language ---------------------------------------------------------------------------


def label(key: str, lang: str) -> str:
    """The name of a field on the board, LLaMA-Factory's fields included, in quotation marks."""
    return errors.quoted(LOCALES[key][lang]["label"], lang)


def alert(name: str, lang: str, **values: Any) -> str:
    """One of the board's sentences; a value that it leaves open is the label of the field of that name."""
    return errors.alert(name, lang, values, lambda key: label(key, lang))


def reason(error: Exception, lang: str) -> str:
    """An error in the board's words, or else in its own, with labels for keys."""
    if isinstance(error, errors.BoardError):
        return alert(error.name, lang, **error.values)
    return _NAMED.sub(lambda found: label(found[1] or found[3], lang) + (found[2] or ""), str(error))


def why_not(name: str, losses: Mapping[str, Loss], error: ValueError | None, lang: str) -> str | None:
    """Why no loss of this name can be trained; None if it can.

    Args:
        name: what is chosen, or what a loaded configuration names.
        losses, error: of `losses_of`.
    """
    if error is not None:
        return reason(error, lang)
    of_file, names = [each for each, loss in losses.items() if _is_users(loss)], split(name)
    unknown = next((each for each in names if each not in losses), None)
    if of_file and not set(of_file) & set(names):
        return alert("not_in_file", lang, loss=name, names=", ".join(of_file))
    return None if unknown is None else alert("unknown_loss", lang, loss=unknown)


def wrong_value(args: Mapping[str, Any], chosen: Sequence[Loss], lang: str) -> str | None:
    """What the board itself finds wrong with the settings of a DPO run; the arguments find the rest.

    Args:
        args: by YAML key.
    """
    for key, (_, accepts) in NUMBERS.items():
        value = args.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not (abs(value) <= sys.float_info.max and accepts(value)):
            wanted = errors.wanted(RANGES.get(key, "nonnegative"), lang)
            return alert("out_of_range", lang, field=label(key, lang), value=f"{value}"[:80], wanted=wanted)
    if isinstance(args.get("pref_loss_args"), str) and _parsed(args["pref_loss_args"]) is None:
        return alert("not_an_object", lang)
    referring = next((key for key in TEXT_KEYS if "${" in str(args.get(key))), None)
    if referring is not None:
        return alert("refers", lang, field=label(referring, lang))
    refined, given = [loss for loss in chosen if "sr_lambda" in loss.parameters], args.get("sr_lambda")
    weights = [loss.defaults().get("sr_lambda") if given is None else given for loss in refined]
    is_unused = bool(refined) and args.get("sr_prompt") is not None and not any(weights)
    return alert("unused_prompt", lang) if is_unused else None
