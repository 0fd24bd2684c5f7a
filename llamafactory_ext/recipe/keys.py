"""The YAML keys of preference losses: which keyword of which loss each one sets, and which values it may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..losses import STOCK_LOSSES
from ..losses.divergence import DIVERGENCES
from ..losses.lookup import get_loss, load_loss_file
from ..losses.registry import Loss

PREF_BETA = 0.1  # LLaMA-Factory's default

# YAML key -> the keyword that a loss function takes it by. The plugin's own keys are null unless the user sets them;
# LLaMA-Factory's have a default, and count as set where they differ from it.
OWN_KEYS = {
    "dpop_lambda": "dpop_lambda",
    "discopop_tau": "discopop_tau",
    "sr_lambda": "sr_lambda",
    "ipo_length_normalize": "length_normalize",
    "odpo_alpha": "odpo_alpha",
    "rrhf_weight": "rrhf_weight",
    "cringe_alpha": "cringe_alpha",
    "cringe_bias": "cringe_bias",
    "cringe_tau": "cringe_tau",
    "cringe_top_k": "cringe_top_k",
}
STOCK_KEYS = {"dpo_label_smoothing": ("label_smoothing", 0.0), "simpo_gamma": ("simpo_gamma", 0.5)}
KEYWORDS = OWN_KEYS | {key: keyword for key, (keyword, _) in STOCK_KEYS.items()}

# Keys of the plugin's own that change what is trained, but are no hyper-parameter of a loss function.
OBJECTIVE_KEYS = (
    "pref_loss_weights",
    "f_divergence",
    "f_divergence_alpha",
    "ld_alpha_reference",
    "pref_wpo",
    "pref_weight_column",
    "pref_margin_column",
    "pref_ranked_weights",
)
OTHER_OWN_KEYS = (
    "sr_prompt",
    *OBJECTIVE_KEYS,
    "share_prefix",
    "precompute_ref_log_probs",
    "ref_log_probs_cache_dir",
    "pref_loss_file",
    "pref_loss_args",
    "pref_stop_on_degeneration",
)
# Keys that only say which loss is trained, and how it is shaped; beta is every loss's.
LOSS_KEYS = ("pref_loss", "pref_loss_file", "pref_loss_args", "sr_prompt", *OBJECTIVE_KEYS, *OWN_KEYS, *STOCK_KEYS)
REFERENCE_KEYS = ("ref_model", "ref_log_probs_cache_dir", "precompute_ref_log_probs")  # not with orpo and simpo

Allowed = tuple[str, Callable[[float], bool]]
_NOT_NEGATIVE: Allowed = ("a number of at least 0", lambda value: value >= 0)
_POSITIVE: Allowed = ("a number above 0", lambda value: value > 0)
NUMBERS: dict[str, Allowed] = {
    "pref_beta": _POSITIVE,
    "pref_ftx": _NOT_NEGATIVE,
    "pref_bco_weight": _NOT_NEGATIVE,
    "dpo_label_smoothing": ("a number of at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "simpo_gamma": ("a finite number", lambda value: True),
    "dpop_lambda": ("a finite number of at least 0", lambda value: value >= 0),
    "sr_lambda": ("a finite number of at least 0", lambda value: value >= 0),
    "discopop_tau": _POSITIVE,
    "ld_alpha": _NOT_NEGATIVE,
    "odpo_alpha": _NOT_NEGATIVE,
    "rrhf_weight": _NOT_NEGATIVE,
    "cringe_alpha": _NOT_NEGATIVE,
    "cringe_bias": ("a finite number", lambda value: True),
    "cringe_tau": _POSITIVE,
    "cringe_top_k": ("a whole number of at least 1", lambda value: value >= 1 and isinstance(value, int)),
    "f_divergence_alpha": ("a number from -100 to 100", lambda value: -100 <= value <= 100),
}


def split(value: Any) -> list[Any]:
    """A list as LLaMA-Factory takes it: in YAML, or as text with commas, like `minor_dpo,sft`.

    Anything else is a list of itself.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return [each.strip() if isinstance(each, str) else each for each in parts]


def args_of(loss: Loss) -> dict[str, inspect.Parameter]:
    """The hyper-parameters that `pref_loss_args` give: all of a user's loss, and those without a key of their own."""
    has_key = {"beta"} if loss.is_users else {"beta", *KEYWORDS.values()}
    return {name: parameter for name, parameter in loss.parameters.items() if name not in has_key}


def keys_of(loss: Loss) -> dict[str, Any]:
    """The YAML keys of a loss's hyper-parameters and their defaults; what has none stands in `pref_loss_args`."""
    defaults = {"beta": PREF_BETA, **loss.defaults()}
    return {_key_of(name): defaults.get(name, "(required)") for name in loss.parameters}


def _key_of(parameter: str) -> str:
    """The YAML key that a parameter of a loss function is given by."""
    keys = {"beta": "pref_beta"} | {keyword: key for key, keyword in KEYWORDS.items()}
    return keys.get(parameter, f"pref_loss_args.{parameter}")


def takes_ld_alpha(loss: Loss) -> bool:
    """Whether `ld_alpha` may weight the policy's tokens alone: with LLaMA-Factory's losses, the user's, and those
    without a reference.

    With others, it would move the 0 with which they compare log-ratios, and make the difference of two of them one of
    unlike things. `ld_alpha_reference: true` weights the reference's tokens as well.
    """
    return loss.name in STOCK_LOSSES or loss.is_users or not loss.needs_reference


def divergence_names() -> list[str]:
    """All values of `f_divergence`."""
    return list(DIVERGENCES)


def keys_not_taken(settings: Mapping[str, Any]) -> list[str]:
    """The keys of a recipe's settings that its losses would refuse, or that change nothing about them.

    For recipes that differ in their `pref_loss` and share all other keys.

    Raises:
        ValueError: if a loss is unknown, or its file cannot be run.
    """
    names, file = split(settings.get("pref_loss", "sigmoid")), settings.get("pref_loss_file")
    of_file = load_loss_file(file) if file is not None else []
    losses = [get_loss(name) for name in names]
    not_taken = [set(_not_taken(settings, loss, loss.name in of_file)) for loss in losses]
    several = len(losses) > 1
    foreign = set.intersection(*not_taken) | (set() if several else {"pref_loss_weights"})
    # These must suit each of the losses.
    strict = {"f_divergence", "f_divergence_alpha", "pref_wpo", "pref_weight_column", "pref_ranked_weights", "ld_alpha"}
    foreign |= set.union(*(each & strict for each in not_taken))
    if not any(loss.needs_reference for loss in losses):
        foreign |= {"f_divergence", "f_divergence_alpha"}
    return [key for key in settings if key in foreign]


def _not_taken(settings: Mapping[str, Any], loss: Loss, is_of_file: bool) -> list[str]:
    taken = {key: keyword in loss.parameters for key, keyword in (KEYWORDS | {"pref_beta": "beta"}).items()}
    weight = settings.get("sr_lambda")
    is_refined = taken["sr_lambda"] and bool(loss.defaults().get("sr_lambda") if weight is None else weight)
    on_both = bool(settings.get("ld_alpha_reference")) and loss.needs_reference
    in_scores = not is_refined and (loss.takes_divergence or not loss.needs_reference)
    taken |= {
        "sr_prompt": is_refined,
        "ld_alpha": on_both or (not is_refined and takes_ld_alpha(loss)),
        "ld_alpha_reference": on_both,
        "f_divergence": in_scores,
        "f_divergence_alpha": in_scores,
        "pref_margin_column": loss.needs_scores,
        "pref_wpo": not loss.needs_batch and not loss.needs_ranking,
        "pref_ranked_weights": not loss.needs_ranking,
        "pref_weight_column": not loss.needs_batch,
        "pref_loss_file": is_of_file,
        "pref_loss_args": is_of_file or bool(args_of(loss)),
        "precompute_ref_log_probs": loss.needs_reference,
        "ref_log_probs_cache_dir": loss.needs_reference,
        "ref_model": loss.needs_reference,
        "pref_bco_weight": loss.needs_reference,
    }
    return [key for key in settings if not taken.get(key, True)]
