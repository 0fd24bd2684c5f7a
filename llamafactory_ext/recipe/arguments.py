"""The plugin's YAML keys: defaults, help, and checks that stop a wrong recipe before any weights load."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..losses import STOCK_LOSSES
from ..losses.lookup import get_loss, load_loss_file
from ..losses.registry import Loss
from ..paths import named_path
from .loss_args import from_loss_args, is_number, listed, shown

if TYPE_CHECKING:
    from llamafactory.hparams.finetuning_args import FinetuningArguments
else:  # LLaMA-Factory's class is the other base of the one that `extend` makes
    FinetuningArguments = object

# LLaMA-Factory's switches for trainers in which the plugin has no say.
OTHER_TRAINERS = {"USE_MCA": "has losses of its own", "USE_MEGATRON_BRIDGE": "has no preference losses"}

# YAML key -> the keyword that a loss function takes it by. The plugin's own keys are null unless the user sets them;
# LLaMA-Factory's have a default, and count as set where they differ from it.
OWN_KEYS = {
    "dpop_lambda": "dpop_lambda",
    "discopop_tau": "discopop_tau",
    "sr_lambda": "sr_lambda",
    "ipo_length_normalize": "length_normalize",
}
OTHER_OWN_KEYS = (
    "sr_prompt",
    "share_prefix",
    "precompute_ref_log_probs",
    "ref_log_probs_cache_dir",
    "pref_loss_file",
    "pref_loss_args",
    "pref_stop_on_degeneration",
)
PREF_BETA = 0.1  # LLaMA-Factory's default
STOCK_KEYS = {"dpo_label_smoothing": ("label_smoothing", 0.0), "simpo_gamma": ("simpo_gamma", 0.5)}
# Keys that only say which loss is trained, and how it is shaped; beta is every loss's.
LOSS_KEYS = ("pref_loss", "pref_loss_file", "pref_loss_args", "sr_prompt", *OWN_KEYS, *STOCK_KEYS)

NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "pref_beta": ("a number above 0", lambda value: value > 0),
    "pref_ftx": ("a number of at least 0", lambda value: value >= 0),
    "pref_bco_weight": ("a number of at least 0", lambda value: value >= 0),
    "dpo_label_smoothing": ("a number of at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "simpo_gamma": ("a finite number", lambda value: True),
    "dpop_lambda": ("a finite number of at least 0", lambda value: value >= 0),
    "discopop_tau": ("a number above 0", lambda value: value > 0),
    "sr_lambda": ("a finite number of at least 0", lambda value: value >= 0),
    "ld_alpha": ("a number of at least 0", lambda value: value >= 0),
}

# arXiv 2405.21040, Eq. 12: the text that is put in front of a query to ask for a response of quality.
SR_PROMPT = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is "
    "the minimum. Query: "
)


@dataclass
class PreferenceArguments(FinetuningArguments):
    """What the plugin adds to LLaMA-Factory's `FinetuningArguments`, checked for `stage: dpo` only."""

    pref_loss: str = field(
        default="sigmoid",
        metadata={
            "help": (
                "The preference loss: sigmoid (DPO), minor_dpo, dpop, sr_dpo, any other that `llamafactory-ext losses` "
                "lists, or a name that the file given with `pref_loss_file` registers."
            )
        },
    )
    dpop_lambda: float | None = field(
        default=None,
        metadata={
            "help": "The weight of DPOP's penalty on a chosen response that falls below the reference (dpop: 50)."
        },
    )
    discopop_tau: float | None = field(
        default=None,
        metadata={
            "help": (
                "How soon DiscoPOP's loss turns from DPO's to the exponential one as beta times the margin grows "
                "(discopop: 0.05)."
            )
        },
    )
    ipo_length_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Whether ipo and sr_ipo use means per token, not sums over the response (ipo: true, sr_ipo: false)."
        },
    )
    sr_lambda: float | None = field(
        default=None,
        metadata={
            "help": (
                "The weight of the refinement term of Sr-DPO and Sr-IPO (sr_dpo, sr_ipo: 0.3; minor_dpo, dpop: 0). "
                "Above 0, every step also scores the responses under a prompt that asks for quality."
            )
        },
    )
    sr_prompt: str | None = field(
        default=None,
        metadata={
            "help": (
                "The text that the refinement term puts in front of the first user message (default: the Sr paper's). "
                "A text with spaces must stand in the YAML file, not on a command line under torchrun."
            )
        },
    )
    share_prefix: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the prefix that both responses of a pair share is computed once. null: where that is exact; "
                "true: an error where it is not; false: a row per response, as in LLaMA-Factory."
            )
        },
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the reference's log-probabilities are precomputed before training and cached on disk for "
                "later runs. null: where that is exact; true: an error where it is not; false: in every step."
            )
        },
    )
    ref_log_probs_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder of that cache (default: llamafactory_ext/references in the user's cache folder)."
        },
    )
    pref_loss_file: str | None = field(
        default=None,
        metadata={
            "help": (
                "A Python file that registers a preference loss with `@llamafactory_ext.register_loss`. "
                "A relative path is looked up in the working directory."
            )
        },
    )
    pref_loss_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for the loss of `pref_loss_file`, as a mapping or as JSON."},
    )
    pref_stop_on_degeneration: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether a run that degenerates ends, after a checkpoint: one whose chosen and rejected responses "
                "have both become far less likely than under the reference, or whose numbers are not finite."
            )
        },
    )

    def __post_init__(self) -> None:
        if self.stage == "dpo":
            _check_keys(self)  # first, because LLaMA-Factory's own checks compare these values
        given = self.dpo_label_smoothing
        self.dpo_label_smoothing: float = 0.0  # LLaMA-Factory lets `sigmoid` alone have it
        super().__post_init__()
        self.dpo_label_smoothing = given
        if self.stage == "dpo":
            self.loss, self.loss_hyperparameters = _resolve(self)
            self.use_ref_model = self.loss.needs_reference
        else:
            own = [key for key in (*OWN_KEYS, *OTHER_OWN_KEYS) if getattr(self, key) is not None]
            if own:
                raise ValueError(f"`{own[0]}` belongs to `stage: dpo`: remove it from this `stage: {self.stage}` run.")

    @property
    def refinement_prompt(self) -> str | None:
        """The text in front of the augmented prompts, or None if the loss has no refinement term."""
        if not self.loss_hyperparameters.get("sr_lambda"):
            return None
        return SR_PROMPT if self.sr_prompt is None else self.sr_prompt

    def describe_loss(self) -> str:
        """The loss with every hyper-parameter that it is trained with, like `dpop(beta=0.1, dpop_lambda=50.0)`."""
        values = ", ".join(f"{name}={value}" for name, value in self.loss_hyperparameters.items())
        return f"{self.loss.name}({values})"


def extend(base: type) -> type:
    """LLaMA-Factory's `FinetuningArguments` with the plugin's keys; the class goes by the base's own name."""
    extended: type = dataclass(type(base.__name__, (PreferenceArguments, base), {"__doc__": base.__doc__}))
    extended.__module__, extended.__qualname__ = base.__module__, base.__qualname__
    return extended


def keys_of(loss: Loss) -> dict[str, Any]:
    """The YAML keys of a loss's hyper-parameters and their defaults; those of a user's loss are `pref_loss_args`."""
    defaults = {"beta": PREF_BETA, **loss.defaults()}
    return {_key_of(name): defaults.get(name, "(required)") for name in loss.parameters}


def _key_of(parameter: str) -> str:
    """The YAML key that a parameter of a loss function is given by."""
    keys = {"beta": "pref_beta"} | {keyword: key for key, keyword in OWN_KEYS.items()}
    keys |= {keyword: key for key, (keyword, _) in STOCK_KEYS.items()}
    return keys.get(parameter, f"pref_loss_args.{parameter}")


def keys_not_taken(settings: Mapping[str, Any]) -> list[str]:
    """The keys of a recipe's settings that its loss would refuse, or that change nothing about it.

    For recipes that differ in their `pref_loss` and share all other keys.

    Raises:
        ValueError: if the loss is unknown, or its file cannot be run.
    """
    name, file = settings.get("pref_loss", "sigmoid"), settings.get("pref_loss_file")
    is_own = file is not None and name in load_loss_file(file)
    loss = get_loss(name)
    keywords = OWN_KEYS | {key: keyword for key, (keyword, _) in STOCK_KEYS.items()} | {"pref_beta": "beta"}
    taken = {key: keyword in loss.parameters for key, keyword in keywords.items()}
    weight = settings.get("sr_lambda")
    refined = taken["sr_lambda"] and bool(loss.defaults().get("sr_lambda") if weight is None else weight)
    taken |= {
        "sr_prompt": refined,
        "ld_alpha": not refined and takes_ld_alpha(loss),
        "pref_loss_file": is_own,
        "pref_loss_args": is_own,
        "precompute_ref_log_probs": loss.needs_reference,
        "ref_log_probs_cache_dir": loss.needs_reference,
        "ref_model": loss.needs_reference,
        "pref_bco_weight": loss.needs_reference,
    }
    return [key for key in settings if not taken.get(key, True)]


def _resolve(args: PreferenceArguments) -> tuple[Loss, dict[str, Any]]:
    """The loss that the arguments name and a value for each of its hyper-parameters, checked.

    Raises:
        ValueError: with one sentence that says what to write instead.
    """
    loss = _find_loss(args)
    _check_backend(loss)
    given = {**loss.defaults(), **_from_keys(args, loss), **from_loss_args(args, loss), "beta": args.pref_beta}
    _check_complete(loss, given)
    _check_refinement(args, loss, given)
    _check_ld_alpha(args, loss, given)
    if args.precompute_ref_log_probs and not loss.needs_reference:
        raise ValueError(f"pref_loss {loss.name!r} has no reference: remove `precompute_ref_log_probs: true`.")
    return loss, {name: given[name] for name in loss.parameters}


def _find_loss(args: PreferenceArguments) -> Loss:
    if args.pref_loss_file is None:
        return get_loss(args.pref_loss)

    names = load_loss_file(args.pref_loss_file)
    if args.pref_loss not in names:
        raise ValueError(
            f"pref_loss_file {args.pref_loss_file!r} registers {listed(names)}, but pref_loss is "
            f"{args.pref_loss!r}: write `pref_loss: {names[0]}`, or remove pref_loss_file."
        )
    return get_loss(args.pref_loss)


def _check_backend(loss: Loss) -> None:
    for switch, why in OTHER_TRAINERS.items():
        if os.environ.get(switch, "0").lower() in ("1", "true", "y") and loss.name not in STOCK_LOSSES:
            raise ValueError(
                f"pref_loss {loss.name!r} cannot be trained with {switch}, whose trainer {why}: unset {switch}."
            )


def _from_keys(args: PreferenceArguments, loss: Loss) -> dict[str, Any]:
    own = {key: keyword for key, keyword in OWN_KEYS.items() if getattr(args, key) is not None}
    stock = {key: keyword for key, (keyword, default) in STOCK_KEYS.items() if getattr(args, key) != default}
    given = {**own, **stock}
    for key, keyword in given.items():
        if keyword not in loss.parameters:
            raise ValueError(
                f"`{key}` is not a hyper-parameter of pref_loss {loss.name!r}, which takes "
                f"{listed(keys_of(loss))}: remove `{key}`."
            )
    return {keyword: getattr(args, key) for key, keyword in given.items()}


def _check_complete(loss: Loss, hyperparameters: dict[str, Any]) -> None:
    missing = [name for name in loss.parameters if name not in hyperparameters]
    if missing:
        raise ValueError(
            f"pref_loss {loss.name!r} needs a value for {listed(missing)}: write it under `pref_loss_args`."
        )


def _check_refinement(args: PreferenceArguments, loss: Loss, hyperparameters: dict[str, Any]) -> None:
    if args.sr_prompt is None:
        return
    if not args.sr_prompt.strip():
        raise ValueError("`sr_prompt` is empty: write the text to put in front of the query, or remove it.")
    if re.search("[\ud800-\udfff]", args.sr_prompt):
        raise ValueError(f"`sr_prompt` holds half a character ({args.sr_prompt!r}): write it as text.")
    if not ("sr_lambda" in loss.parameters and hyperparameters["sr_lambda"]):
        raise ValueError(
            f"`sr_prompt` belongs to the refinement term, which this recipe's {loss.name!r} has none of: "
            "write an `sr_lambda` above 0 with sr_dpo, sr_ipo, minor_dpo or dpop, or remove `sr_prompt`."
        )


def takes_ld_alpha(loss: Loss) -> bool:
    """Whether `ld_alpha` may be combined with a loss: one of LLaMA-Factory's or of the user's.

    It weights the policy only. So it would move the 0 with which the package's own compare log-ratios, and make the
    difference of two of them one of unlike things.
    """
    return loss.name in STOCK_LOSSES or loss.is_users


def _check_ld_alpha(args: PreferenceArguments, loss: Loss, hyperparameters: dict[str, Any]) -> None:
    refined = bool(hyperparameters.get("sr_lambda"))
    if args.ld_alpha is not None and (refined or not takes_ld_alpha(loss)):
        raise ValueError(
            "`ld_alpha` weights the policy but not the reference, so that logratios neither start at 0 nor compare, "
            f"which pref_loss {args.pref_loss!r} relies on: remove `ld_alpha`."
        )


def _check_keys(args: PreferenceArguments) -> None:
    """Refuse values of the wrong type or range: a YAML value arrives here as it was written."""
    defaults = {each.name: each.default for each in fields(args)}
    for key, (wanted, accepts) in NUMBERS.items():
        value = getattr(args, key)
        if value is None and defaults[key] is not None:
            raise ValueError(f"`{key}` is empty: write {wanted}, or remove the key.")
        if value is not None and not (is_number(value) and accepts(value)):
            raise ValueError(f"`{key}` is {shown(value)}: write {wanted}.")
    kinds: dict[str, type] = {"pref_loss": str, "pref_loss_file": str, "sr_prompt": str}
    kinds |= {"ref_log_probs_cache_dir": str, "precompute_ref_log_probs": bool}
    kinds |= {"ipo_length_normalize": bool, "share_prefix": bool, "pref_stop_on_degeneration": bool}
    for key, kind in kinds.items():
        value = getattr(args, key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{key}` is {shown(value)}: write a value of type {kind.__name__}.")
    if args.ref_log_probs_cache_dir is not None:
        named_path("ref_log_probs_cache_dir", args.ref_log_probs_cache_dir)
