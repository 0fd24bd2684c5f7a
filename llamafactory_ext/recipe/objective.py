"""From a recipe's keys to the `Objective` that it trains, checked before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..losses import STOCK_LOSSES
from ..losses.divergence import Divergence
from ..losses.lookup import get_loss, load_loss_file
from ..losses.objective import Objective, Part
from ..losses.registry import Loss
from .keys import OBJECTIVE_KEYS, OWN_KEYS, STOCK_KEYS, args_of, divergence_names, keys_of, split, takes_ld_alpha
from .loss_args import from_loss_args, is_number, listed, shown

# LLaMA-Factory's switches for trainers in which the plugin has no say.
OTHER_TRAINERS = {"USE_MCA": "has losses of its own", "USE_MEGATRON_BRIDGE": "has no preference losses"}


def objective_of(args: Any) -> Objective:
    """The losses that the arguments name, with a value for each of their hyper-parameters.

    Args:
        args: `PreferenceArguments`.

    Raises:
        ValueError: with one sentence that says what to write instead.
    """
    losses = _find_losses(args)
    weights = _weights(args, losses)
    _check_backend(args, losses)
    from_keys, loss_args = _from_keys(args, losses), from_loss_args(args, losses)
    parts = []
    for loss, weight in zip(losses, weights, strict=True):
        own = {name: value for name, value in loss_args.items() if name in args_of(loss)}
        given = {**loss.defaults(), **from_keys, **own, "beta": args.pref_beta}
        _check_complete(loss, given)
        parts.append(Part(loss, {name: given[name] for name in loss.parameters}, weight))
    objective = Objective(tuple(parts), args.pref_beta, _divergence(args))
    for check in CHECKS:
        check(args, objective)
    return objective


# --- which losses ----------------------------------------------------------------------------------------------------


def _find_losses(args: Any) -> list[Loss]:
    names = split(args.pref_loss)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"`pref_loss` names {twice!r} twice: write it once, with the sum of both weights.")
    if args.pref_loss_file is None:
        return [get_loss(name) for name in names]

    registered = load_loss_file(args.pref_loss_file)
    if not set(names) & set(registered):
        raise ValueError(
            f"pref_loss_file {args.pref_loss_file!r} registers {listed(registered)}, but pref_loss is "
            f"{args.pref_loss!r}: write `pref_loss: {registered[0]}`, or remove pref_loss_file."
        )
    return [get_loss(name) for name in names]


def _weights(args: Any, losses: Sequence[Loss]) -> list[float]:
    if args.pref_loss_weights is None:
        return [1.0] * len(losses)
    if len(losses) == 1:
        raise ValueError("`pref_loss_weights` are for several losses: name them all in `pref_loss`, or remove the key.")
    given = split(args.pref_loss_weights)
    weights = [_number(each) for each in given]
    if len(weights) != len(losses) or any(weight is None or weight <= 0 for weight in weights):
        example = ", ".join(["1.0", *["0.1"] * (len(losses) - 1)])
        raise ValueError(
            f"`pref_loss_weights` is {shown(args.pref_loss_weights)}: write a number above 0 for each of the "
            f"{len(losses)} losses, like [{example}]."
        )
    return [weight for weight in weights if weight is not None]


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_number(value) else None


def _check_backend(args: Any, losses: Sequence[Loss]) -> None:
    for switch, why in OTHER_TRAINERS.items():
        if os.environ.get(switch, "0").lower() not in ("1", "true", "y"):
            continue
        own = next((loss.name for loss in losses if loss.name not in STOCK_LOSSES), None)
        if own is not None or len(losses) > 1:
            name = own or args.pref_loss
            raise ValueError(
                f"pref_loss {name!r} cannot be trained with {switch}, whose trainer {why}: unset {switch}."
            )
        key = next((key for key in (*OWN_KEYS, *OBJECTIVE_KEYS) if getattr(args, key) is not None), None)
        if key is not None:
            raise ValueError(f"`{key}` has no effect with {switch}, whose trainer {why}: unset {switch}.")


# --- their hyper-parameters ------------------------------------------------------------------------------------------


def _from_keys(args: Any, losses: Sequence[Loss]) -> dict[str, Any]:
    own = {key: keyword for key, keyword in OWN_KEYS.items() if getattr(args, key) is not None}
    stock = {key: keyword for key, (keyword, default) in STOCK_KEYS.items() if getattr(args, key) != default}
    given = {**own, **stock}
    for key, keyword in given.items():
        if not any(keyword in loss.parameters for loss in losses):
            names = " and ".join(repr(loss.name) for loss in losses)
            takes = listed(dict.fromkeys(key for loss in losses for key in keys_of(loss)))
            verb = "takes" if len(losses) == 1 else "take"
            raise ValueError(
                f"`{key}` is not a hyper-parameter of pref_loss {names}, which {verb} {takes}: remove `{key}`."
            )
    return {keyword: getattr(args, key) for key, keyword in given.items()}


def _check_complete(loss: Loss, hyperparameters: dict[str, Any]) -> None:
    missing = [name for name in loss.parameters if name not in hyperparameters]
    if missing:
        raise ValueError(
            f"pref_loss {loss.name!r} needs a value for {listed(missing)}: write it under `pref_loss_args`."
        )


def _divergence(args: Any) -> Divergence:
    name = args.f_divergence or "reverse_kl"
    if name not in divergence_names():
        raise ValueError(f"`f_divergence` is {shown(name)}: write one of {', '.join(divergence_names())}.")
    if args.f_divergence_alpha is None:
        return Divergence(name)
    if name != "alpha":
        raise ValueError("`f_divergence_alpha` belongs to `f_divergence: alpha`: write that, or remove it.")
    return Divergence(name, float(args.f_divergence_alpha))


# --- what does not combine -------------------------------------------------------------------------------------------


def _check_divergence(args: Any, objective: Objective) -> None:
    if objective.divergence.name == "reverse_kl":
        return
    for part in objective.parts:
        if part.is_refined:
            raise ValueError(
                "the refinement term is made of log-ratios, not of the scores of `f_divergence`: remove one of both."
            )
        if part.loss.needs_reference and not part.loss.takes_divergence:
            raise ValueError(
                f"pref_loss {part.loss.name!r} is made for log-ratios, which `f_divergence` replaces: remove the key, "
                "or train a loss that takes it, such as sigmoid, ipo, hinge or robust."
            )
    if not objective.needs_reference:
        raise ValueError(f"pref_loss {objective.name!r} has no reference to diverge from: remove `f_divergence`.")


def _check_scores(args: Any, objective: Objective) -> None:
    needing = [loss.name for loss in objective.losses if loss.needs_scores]
    if needing and args.pref_margin_column is None:
        raise ValueError(
            f"pref_loss {needing[0]!r} needs the scores of the responses: name their columns in the data, like "
            "`pref_margin_column: [score_chosen, score_rejected]`, or one column with the difference."
        )
    if args.pref_margin_column is not None and not needing:
        raise ValueError(
            f"pref_loss {objective.name!r} does not use scores: write `pref_loss: odpo`, or remove "
            "`pref_margin_column`."
        )


def _check_refinement(args: Any, objective: Objective) -> None:
    if args.sr_prompt is None:
        return
    if not args.sr_prompt.strip():
        raise ValueError("`sr_prompt` is empty: write the text to put in front of the query, or remove it.")
    if re.search("[\ud800-\udfff]", args.sr_prompt):
        raise ValueError(f"`sr_prompt` holds half a character ({args.sr_prompt!r}): write it as text.")
    if objective.refined is None:
        raise ValueError(
            f"`sr_prompt` belongs to the refinement term, which this recipe's {objective.name!r} has none of: "
            "write an `sr_lambda` above 0 with a loss that takes it, such as sr_dpo or minor_dpo, or remove "
            "`sr_prompt`."
        )


def _check_ld_alpha(args: Any, objective: Objective) -> None:
    if args.ld_alpha_reference:
        if args.ld_alpha is None:
            raise ValueError("`ld_alpha_reference: true` needs `ld_alpha`, the weight itself: write it, too.")
        if not objective.needs_reference:
            raise ValueError(f"pref_loss {objective.name!r} has no reference: remove `ld_alpha_reference`.")
        return
    unlike = objective.refined is not None or not all(map(takes_ld_alpha, objective.losses))
    if args.ld_alpha is not None and unlike:
        raise ValueError(
            "`ld_alpha` weights the policy but not the reference, so that logratios neither start at 0 nor compare, "
            f"which pref_loss {objective.name!r} relies on: add `ld_alpha_reference: true`, which weights both, or "
            "remove `ld_alpha`."
        )


def _check_weights(args: Any, objective: Objective) -> None:
    of_batch = next((loss.name for loss in objective.losses if loss.needs_batch), None)
    key = "pref_wpo" if args.pref_wpo else "pref_weight_column" if args.pref_weight_column is not None else None
    if key is not None and of_batch is not None:
        raise ValueError(
            f"pref_loss {of_batch!r} compares the pairs of a micro-batch with one another, so that weights of single "
            f"pairs mean nothing: remove `{key}`."
        )


def _check_ranked_weights(args: Any, objective: Objective) -> None:
    of_row = next((loss.name for loss in objective.losses if loss.needs_ranking), None)
    key = "pref_ranked_weights" if args.weights_by_gap else "pref_wpo" if args.pref_wpo else None
    if key is not None and of_row is not None:
        raise ValueError(
            f"pref_loss {of_row!r} ranks all answers of a row at once, so that its pairs have no weights of their own: "
            f"remove `{key}`."
        )


def _check_contrast(args: Any, objective: Objective) -> None:
    given = {
        part.loss.name: part.hyperparameters["cringe_top_k"] for part in objective.parts if part.loss.needs_contrast
    }
    wrong = next((name for name, top_k in given.items() if type(top_k) is not int or top_k < 1), None)
    if wrong is not None:
        raise ValueError(f"`cringe_top_k` of {wrong!r} is {shown(given[wrong])}: write a whole number of at least 1.")
    if len(set(given.values())) > 1:
        raise ValueError(
            f"the losses {' and '.join(map(repr, given))} draw from different numbers of tokens (`cringe_top_k`): give "
            "all of them the same."
        )


def _check_reference(args: Any, objective: Objective) -> None:
    if args.precompute_ref_log_probs and not objective.needs_reference:
        raise ValueError(f"pref_loss {objective.name!r} has no reference: remove `precompute_ref_log_probs: true`.")


CHECKS: tuple[Callable[[Any, Objective], None], ...] = (
    _check_divergence,
    _check_scores,
    _check_refinement,
    _check_ld_alpha,
    _check_weights,
    _check_ranked_weights,
    _check_contrast,
    _check_reference,
)
