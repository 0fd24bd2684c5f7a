"""Recipes that would fail, or train wrongly, after data and weights are loaded; some without a word of the reason.

`check_recipe` sees them coming in stage dpo beforehand. Of LLaMA-Factory's own keys it only refuses what LLaMA-Factory
itself would fail at, or train against another reference than it says: whatever else trains in stock, trains.
"""

from __future__ import annotations

from typing import Any

from ..errors import not_possible
from ..recipe.reading import check_sizes, data_sets
from .layout import COUNTED_PADDING, SHARED_NOISE
from .reference.model import INSISTED, STREAMED, PendingReference, drawn_weights, not_the_same_weights


def check_recipe(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Say what is wrong with a recipe, and what to write instead.

    Args:
        model_args, data_args, training_args, finetuning_args: what LLaMA-Factory made of the recipe, for `run_dpo`.

    Raises:
        ValueError: with one sentence, at the first thing that cannot be trained.
    """
    check_sizes(data_args)
    _check_best_model(data_args, training_args)
    _check_insisted(data_args, training_args, finetuning_args)
    _check_streaming(data_args, training_args)
    _check_random_weights(model_args, data_args, training_args, finetuning_args)
    _check_rope_scaling(model_args)


def _check_best_model(data_args: Any, training_args: Any) -> None:
    """With a loss per data set there is no `eval_loss`, which transformers chooses by unless told otherwise."""
    is_overall = training_args.metric_for_best_model in (None, "loss", "eval_loss")
    if data_args.eval_on_each_dataset and training_args.load_best_model_at_end and is_overall:
        names = data_args.eval_dataset or ["NAME"]
        raise ValueError(
            "`load_best_model_at_end: true` chooses by `eval_loss`, which there is not with `eval_on_each_dataset: "
            f"true`: write the loss of one of the data sets, such as `metric_for_best_model: eval_{names[0]}_loss`."
        )


def _check_insisted(data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """What the recipe insists on, where its other keys already rule it out; the rest is known with the model only."""
    padding = None if data_args.ignore_pad_token_for_loss else COUNTED_PADDING
    obstacles = {
        "precompute_ref_log_probs": STREAMED if data_args.streaming else padding,
        "share_prefix": SHARED_NOISE if training_args.neftune_noise_alpha is not None else padding,
    }
    for key, reason in obstacles.items():
        if getattr(finetuning_args, key) and reason is not None:
            raise not_possible(key, reason)


def _check_streaming(data_args: Any, training_args: Any) -> None:
    """A streamed file is cut into as many shards as there are workers: none of it is left with 0 (StopIteration)."""
    if not data_args.streaming or training_args.dataloader_num_workers > 0 or data_args.tokenized_path is not None:
        return
    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    files = [str(each) for each in data_sets(names, data_args.dataset_dir) if each.load_from == "file"]
    if files:
        raise ValueError(
            "`streaming: true` reads nothing from files without a worker (there are `dataloader_num_workers: 0`): "
            f"write `dataloader_num_workers: 1` or more to stream {', '.join(files)}, or remove `streaming: true`."
        )


def _check_random_weights(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """A reference model that is loaded beside the policy would be given other random weights.

    For a list of tokens LLaMA-Factory 0.9.5 does not even get there ('list' object has no attribute 'split').
    """
    pending = PendingReference(lambda *_: None, model_args, finetuning_args)
    is_loaded = finetuning_args.ref_model is not None or (
        training_args.do_train and finetuning_args.finetuning_type != "lora"
    )
    keys = drawn_weights(model_args)
    if not keys or not finetuning_args.use_ref_model or not is_loaded:
        return
    reason = None
    if pending.is_first_policy:  # its log-probabilities are computed beforehand, with the policy itself
        insisted = finetuning_args.precompute_ref_log_probs is False
        reason = INSISTED if insisted else STREAMED if data_args.streaming else None
        if reason is None:
            return
    raise not_the_same_weights(keys, reason)


def _check_rope_scaling(model_args: Any) -> None:
    """LLaMA-Factory stretches the config as transformers 4 takes it: with a float, and without the base of the angles.

    Asked by doing it, to a config that is thrown away: another release of either may do better.
    """
    if model_args.rope_scaling is None:
        return
    import transformers
    from llamafactory.model import load_config
    from llamafactory.model.model_utils.rope import configure_rope

    config = load_config(model_args)
    length, base = getattr(config, "max_position_embeddings", None), _rope_base(config)
    try:
        configure_rope(config, model_args)
        fits = _rope_base(config) == base
    except Exception as error:  # of a class that older releases of huggingface_hub do not have
        if type(error).__name__ != "StrictDataclassFieldValidationError":
            raise
        fits = False
    if not fits:
        name = getattr(model_args.rope_scaling, "value", model_args.rope_scaling)
        raise ValueError(
            f"`rope_scaling: {name}`: LLaMA-Factory writes it in a way that transformers {transformers.__version__} "
            f"does not take. Remove it; up to `cutoff_len: {length}` the model needs none. For more, put `rope_type` "
            "and `factor` into `rope_parameters`, and the longer `max_position_embeddings`, in the config.json of a "
            "copy of the model."
        )


def _rope_base(config: Any) -> float | None:
    """The base of the rotary angles, where the config has it among what is replaced (transformers 5)."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
