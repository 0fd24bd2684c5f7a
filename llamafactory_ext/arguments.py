"""The plugin's YAML keys: defaults, help text, and the checks that stop a wrong recipe before any weights load."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .registry import Loss, get_loss, load_loss_file

if TYPE_CHECKING:
    from llamafactory.hparams.finetuning_args import FinetuningArguments
else:  # LLaMA-Factory's class is the other base of the one that `extend` makes
    FinetuningArguments = object

STOCK_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")

# YAML key -> the keyword that a loss function takes it by. The plugin's own keys are null unless the user sets them;
# LLaMA-Factory's have a default, and count as set where they differ from it.
OWN_KEYS = {"dpop_lambda": "dpop_lambda", "ipo_length_normalize": "length_normalize"}
PREF_BETA = 0.1  # LLaMA-Factory's default
STOCK_KEYS = {"dpo_label_smoothing": ("label_smoothing", 0.0), "simpo_gamma": ("simpo_gamma", 0.5)}

NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "pref_beta": ("a number above 0", lambda value: value > 0),
    "pref_ftx": ("a number of at least 0", lambda value: value >= 0),
    "pref_bco_weight": ("a number of at least 0", lambda value: value >= 0),
    "dpo_label_smoothing": ("a number of at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "simpo_gamma": ("a finite number", lambda value: True),
    "dpop_lambda": ("a finite number of at least 0", lambda value: value >= 0),
    "ld_alpha": ("a number of at least 0", lambda value: value >= 0),
}

# Losses that compare a logratio with 0: `ld_alpha` weights the policy only, so it would move that 0.
GATED_LOSSES = ("minor_dpo", "dpop")


@dataclass
class PreferenceArguments(FinetuningArguments):
    """What the plugin adds to LLaMA-Factory's `FinetuningArguments`, checked for `stage: dpo` only."""

    pref_loss: str = field(
        default="sigmoid",
        metadata={
            "help": (
                "The preference loss: sigmoid (DPO), hinge, ipo, kto_pair, orpo, simpo, minor_dpo, dpop, "
                "or a name that the file given with `pref_loss_file` registers."
            )
        },
    )
    dpop_lambda: float | None = field(
        default=None,
        metadata={"help": "The weight of DPOP's penalty on a chosen answer below the reference (dpop: 50)."},
    )
    ipo_length_normalize: bool | None = field(
        default=None,
        metadata={"help": "Whether `ipo` compares means per token or sums over the answer (ipo: true)."},
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
    pref_loss_args: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for the loss of `pref_loss_file`, as a mapping or as JSON."},
    )

    def __post_init__(self) -> None:
        if self.stage == "dpo":
            _check_keys(self)  # first, because LLaMA-Factory's own checks compare these values
        super().__post_init__()
        if self.stage == "dpo":
            self.loss, self.loss_hyperparameters = _resolve(self)
            self.use_ref_model = self.loss.needs_reference
        else:
            own = [key for key in (*OWN_KEYS, "pref_loss_file", "pref_loss_args") if getattr(self, key) is not None]
            if own:
                raise ValueError(f"`{own[0]}` belongs to `stage: dpo`: remove it from this `stage: {self.stage}` run.")

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
    keys = {"beta": "pref_beta"} | {keyword: key for key, keyword in OWN_KEYS.items()}
    keys |= {keyword: key for key, (keyword, _) in STOCK_KEYS.items()}
    defaults = {"beta": PREF_BETA, **loss.defaults()}
    return {keys.get(name, f"pref_loss_args.{name}"): defaults.get(name, "(required)") for name in loss.parameters}


def _resolve(args: PreferenceArguments) -> tuple[Loss, dict[str, Any]]:
    """The loss that the arguments name and a value for each of its hyper-parameters, checked.

    Raises:
        ValueError: with one sentence that says what to write instead.
    """
    loss = _find_loss(args)
    _check_backend(loss)
    given = {**loss.defaults(), **_from_keys(args, loss), **_from_loss_args(args, loss), "beta": args.pref_beta}
    _check_complete(loss, given)
    _check_ld_alpha(args)
    return loss, {name: given[name] for name in loss.parameters}


def _find_loss(args: PreferenceArguments) -> Loss:
    if args.pref_loss_file is None:
        return get_loss(args.pref_loss)

    names = load_loss_file(args.pref_loss_file)
    if args.pref_loss not in names:
        raise ValueError(
            f"pref_loss_file {args.pref_loss_file!r} registers {_listed(names)}, but pref_loss is "
            f"{args.pref_loss!r}: write `pref_loss: {names[0]}`, or remove pref_loss_file."
        )
    return get_loss(args.pref_loss)


def _check_backend(loss: Loss) -> None:
    if os.environ.get("USE_MCA", "0").lower() in ("1", "true", "y") and loss.name not in STOCK_LOSSES:
        raise ValueError(
            f"pref_loss {loss.name!r} cannot be trained with USE_MCA, whose trainer has losses of its own: "
            "unset USE_MCA."
        )


def _from_keys(args: PreferenceArguments, loss: Loss) -> dict[str, Any]:
    own = {key: keyword for key, keyword in OWN_KEYS.items() if getattr(args, key) is not None}
    stock = {key: keyword for key, (keyword, default) in STOCK_KEYS.items() if getattr(args, key) != default}
    given = {**own, **stock}
    for key, keyword in given.items():
        if keyword not in loss.parameters:
            raise ValueError(
                f"`{key}` is not a hyper-parameter of pref_loss {loss.name!r}, which takes "
                f"{_listed(loss.parameters)}: remove `{key}`."
            )
    return {keyword: getattr(args, key) for key, keyword in given.items()}


def _from_loss_args(args: PreferenceArguments, loss: Loss) -> dict[str, Any]:
    if args.pref_loss_args is None:
        return {}
    if args.pref_loss_file is None:
        raise ValueError(
            "`pref_loss_args` are for a loss of your own: name its file with pref_loss_file, or write the keys of "
            f"pref_loss {loss.name!r} instead."
        )

    given = _as_mapping(args.pref_loss_args)
    accepted = [name for name in loss.parameters if name != "beta"]
    for name, value in given.items():
        if name == "beta":
            raise ValueError("`pref_loss_args` may not hold beta: write `pref_beta`.")
        if name not in accepted:
            raise ValueError(
                f"`pref_loss_args` holds {name!r}, but the loss {loss.name!r} takes {_listed(accepted)}: "
                "write one of its keyword arguments."
            )
        _check_annotation(name, value, loss.parameters[name])
    return given


def _as_mapping(value: dict | str) -> dict[str, Any]:
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
    if not (_is_number(value) if kind is float else type(value) is kind):
        raise ValueError(f"`pref_loss_args` gives {name} as {value!r}: write a value of type {kind.__name__}.")


def _check_complete(loss: Loss, hyperparameters: dict[str, Any]) -> None:
    missing = [name for name in loss.parameters if name not in hyperparameters]
    if missing:
        raise ValueError(
            f"pref_loss {loss.name!r} needs a value for {_listed(missing)}: write it under `pref_loss_args`."
        )


def _check_ld_alpha(args: PreferenceArguments) -> None:
    if args.ld_alpha is not None and args.pref_loss in GATED_LOSSES:
        raise ValueError(
            "`ld_alpha` weights the policy but not the reference, which moves the point where pref_loss "
            f"{args.pref_loss!r} switches its terms on and off: remove `ld_alpha`."
        )


def _check_keys(args: PreferenceArguments) -> None:
    """Refuse values of the wrong type or range: a YAML value arrives here as it was written."""
    for key, (wanted, accepts) in NUMBERS.items():
        value = getattr(args, key)
        if value is not None and not (_is_number(value) and accepts(value)):
            raise ValueError(f"`{key}` is {value!r}: write {wanted}.")
    for key, kind in {"pref_loss": str, "pref_loss_file": str, "ipo_length_normalize": bool}.items():
        value = getattr(args, key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{key}` is {value!r}: write a value of type {kind.__name__}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
