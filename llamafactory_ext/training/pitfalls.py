"""Refuses recipes for stage dpo that would fail or train wrongly, before data and weights are loaded.

Of LLaMA-Factory's own keys, only those are refused with which LLaMA-Factory itself would fail, would train against
another reference than the recipe's, or would save no model. Everything else that trains without the plugin also trains
with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory.extras import logging

from ..errors import in_a_line, not_possible
from ..recipe.reading import check_sizes, data_sets
from .layout import COUNTED_PADDING, SHARED_NOISE
from .reference.model import NOT_PRECOMPUTED, STREAMED, PendingReference, different_weights, random_weight_keys

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI


def check_recipe(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Refuse a recipe that cannot be trained as written.

    Args:
        model_args, data_args, training_args, finetuning_args: the parsed recipe, as `run_dpo` receives it.

    Raises:
        ValueError: for the first problem found, with what to write instead.
    """
    check_sizes(data_args)
    _check_best_model(data_args, training_args)
    _check_saving(training_args)
    _check_required(data_args, training_args, finetuning_args)
    _check_streaming(data_args, training_args)
    _check_random_weights(model_args, data_args, training_args, finetuning_args)
    _check_rope_scaling(model_args)
    _check_flash_attention(model_args)


def router_loss_weight(model_args: Any) -> float:
    """The factor of the load-balancing loss of a mixture of experts; 0 where routers would get no gradient from it."""
    if not model_args.moe_aux_loss_coef:
        return 0.0
    # Checkpointing of these kinds runs layers without a gradient first, and that is when routers say what they chose.
    if not model_args.disable_gradient_checkpointing and (model_args.use_reentrant_gc or model_args.use_unsloth_gc):
        logger.warning_rank0(
            "`moe_aux_loss_coef` has no effect: checkpointed layers give routers no gradient. Write "
            "`use_reentrant_gc: false`, or `disable_gradient_checkpointing: true`."
        )
        return 0.0
    return float(model_args.moe_aux_loss_coef)


@contextmanager
def data_errors_in_words() -> Iterator[None]:
    """Adds to an error of `datasets`, which names no row, the command that does.

    Raises:
        ValueError: in place of it.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except DatasetGenerationError as error:
        raise ValueError(
            f"The data cannot be loaded ({in_a_line(error)}). Run `llamafactory-ext data check` with the same recipe, "
            "which names the file and the row."
        ) from error


def _check_best_model(data_args: Any, training_args: Any) -> None:
    """With a loss per data set there is no `eval_loss`, which transformers chooses by unless told otherwise."""
    is_overall = training_args.metric_for_best_model in (None, "loss", "eval_loss")
    if data_args.eval_on_each_dataset and training_args.load_best_model_at_end and is_overall:
        names = data_args.eval_dataset or ["NAME"]
        raise ValueError(
            "`load_best_model_at_end: true` chooses by `eval_loss`, which there is not with `eval_on_each_dataset: "
            f"true`: write the loss of one of the data sets, such as `metric_for_best_model: eval_{names[0]}_loss`."
        )


def _check_saving(training_args: Any) -> None:
    """Under FSDP2, accelerate saves shards unless told otherwise, and transformers 5.6 has no key to tell it.

    There is no model at the end then, and accelerate 1.11 resumes without the optimizer's states. Whoever names shards
    gets them.
    """
    options = getattr(training_args, "fsdp_plugin_args", None) or {}
    is_named = "state_dict_type" in options or "FSDP_STATE_DICT_TYPE" in os.environ
    if training_args.do_train and options.get("fsdp_version") == 2 and not is_named:
        raise ValueError(
            "FSDP2 would save no model at the end, and resume without the optimizer's states: write "
            "`FSDP_STATE_DICT_TYPE=FULL_STATE_DICT` in front of the command."
        )


def _check_required(data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Refuse keys set to true that other keys rule out; what depends on the model is checked later."""
    padding = None if data_args.ignore_pad_token_for_loss else COUNTED_PADDING
    obstacles = {
        "precompute_ref_log_probs": STREAMED if data_args.streaming else padding,
        "share_prefix": SHARED_NOISE if training_args.neftune_noise_alpha is not None else padding,
    }
    for key, reason in obstacles.items():
        if getattr(finetuning_args, key) and reason is not None:
            raise not_possible(key, reason)


def _check_streaming(data_args: Any, training_args: Any) -> None:
    """LLaMA-Factory cuts a streamed file into one shard per worker: with 0 workers it is empty (StopIteration)."""
    if not data_args.streaming or training_args.dataloader_num_workers > 0 or data_args.tokenized_path is not None:
        return
    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    files = [str(each) for each in data_sets(names, data_args.dataset_dir) if each.load_from == "file"]
    if files:
        raise ValueError(
            "`streaming: true` needs a data loader worker to read files, and `dataloader_num_workers` is 0: "
            f"write `dataloader_num_workers: 1` or more to stream {', '.join(files)}, or remove `streaming: true`."
        )


def _check_random_weights(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Refuse a reference model that would be loaded with other random weights than the policy.

    For a list of tokens, LLaMA-Factory 0.9.5 fails even earlier ('list' object has no attribute 'split').
    """
    pending = PendingReference(lambda *_: None, model_args, finetuning_args)
    is_loaded = finetuning_args.ref_model is not None or (
        training_args.do_train and finetuning_args.finetuning_type != "lora"
    )
    keys = random_weight_keys(model_args)
    if not keys or not finetuning_args.use_ref_model or not is_loaded:
        return
    reason = None
    if pending.is_first_policy:  # the policy itself computes its log-probabilities before the first step
        not_precomputed = finetuning_args.precompute_ref_log_probs is False
        reason = NOT_PRECOMPUTED if not_precomputed else STREAMED if data_args.streaming else None
        if reason is None:
            return
    raise different_weights(keys, reason)


def _check_rope_scaling(model_args: Any) -> None:
    """LLaMA-Factory writes `rope_scaling` for transformers 4: the length as a float, and no base of the angles.

    Tested by applying it to a throwaway config, because other releases of either may agree.
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
    except Exception as error:  # its class is missing in older releases of huggingface_hub
        if type(error).__name__ != "StrictDataclassFieldValidationError":
            raise
        fits = False
    if not fits:
        name = getattr(model_args.rope_scaling, "value", model_args.rope_scaling)
        raise ValueError(
            f"`rope_scaling: {name}`: LLaMA-Factory writes it in a form that transformers {transformers.__version__} "
            f"does not accept. Remove it; up to `cutoff_len: {length}` the model does not need it. For longer "
            "sequences, copy the model and edit its config.json: set `rope_type` and `factor` in `rope_parameters`, "
            "and a larger `max_position_embeddings`."
        )


def _rope_base(config: Any) -> float | None:
    """The base of the rotary angles, if it is in the settings that `rope_scaling` replaces (transformers 5)."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta")


def _check_flash_attention(model_args: Any) -> None:
    """transformers 5.6.0 runs FlashAttention only with attention sinks (huggingface/transformers, issue 45588)."""
    import transformers
    from llamafactory.model import load_config
    from transformers.utils.import_utils import is_flash_attn_2_available

    is_asked_for = model_args.flash_attn == "fa2" and is_flash_attn_2_available()
    if is_asked_for and transformers.__version__ == "5.6.0" and load_config(model_args).model_type != "gpt_oss":
        raise ValueError(
            "`flash_attn: fa2` fails with transformers 5.6.0, which expects attention sinks of every model: install "
            'another release (`pip install "transformers<5.6.0"`), or write `flash_attn: sdpa`.'
        )
