"""The reference model: its fingerprint, when it must be loaded, and its precision, which must be the policy's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from llamafactory.extras import logging
from llamafactory.extras.env import VERSION as LLAMAFACTORY_VERSION
from llamafactory.extras.misc import use_modelscope, use_openmind
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ... import __version__, hashes
from ...errors import NOT_OUR_TRAINER
from ..modes import uses_fsdp

STREAMED = "the data set is streamed"
NOT_PRECOMPUTED = "`precompute_ref_log_probs` is false"

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

# Model settings on which the log-probabilities of given token ids do not depend: where the model is, how text is
# tokenized, how the model is trained and served. Any setting not listed here is part of the fingerprint.
UNRELATED = {
    *("model_name_or_path", "adapter_name_or_path", "adapter_folder", "model_revision"),
    *("cache_dir", "low_cpu_mem_usage", "offload_folder", "device_map", "print_param_status", "use_kv_cache"),
    *("use_fast_tokenizer", "split_special_tokens", "crop_to_patches", "use_audio_in_video", "block_diag_attn"),
    *("disable_gradient_checkpointing", "use_reentrant_gc", "use_unsloth_gc"),
}
UNRELATED_PREFIXES = ("export_", "vllm_", "sglang_", "infer_", "image_", "video_", "audio_")
UNRELATED_SUFFIXES = ("_token",)

# Set by `accelerate launch` instead of the recipe's keys.
LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


@dataclass(frozen=True)
class PendingReference:
    """A reference model that is not loaded yet.

    Args:
        create: LLaMA-Factory's `create_ref_model`.
        model_args, finetuning_args: its arguments.
    """

    create: Callable[[Any, Any], torch.nn.Module | None]
    model_args: Any
    finetuning_args: Any

    def load(self) -> torch.nn.Module | None:
        """Load the model; None if the policy without its adapter is the reference."""
        return self.create(self.model_args, self.finetuning_args)

    def __getattr__(self, name: str) -> Any:
        """Fail: only a trainer that mistakes this object for a model asks for other attributes."""
        raise AttributeError(NOT_OUR_TRAINER, name=name, obj=self)

    @property
    def is_first_policy(self) -> bool:
        """Whether the reference is the policy before the first step of the run, resumed or not."""
        own = self.finetuning_args.ref_model is None and self.finetuning_args.finetuning_type in ("full", "freeze")
        # These change the policy only.
        return own and not self.model_args.shift_attn and not self.model_args.use_unsloth

    def starts_as_policy(self, args: Any) -> bool:
        """Whether the policy is the reference now, before the first step, so that none must be loaded.

        Args:
            args: transformers' training arguments.
        """
        return self.is_first_policy and args.resume_from_checkpoint is None

    @property
    def only_this_run_has_it(self) -> bool:
        """Whether the reference cannot be loaded again: it would have other random weights."""
        return self.is_first_policy and bool(random_weight_keys(self.model_args))


# Keys for which rows are added to the embedding: none where the tokenizer and the model have them already.
ADDING_TOKENS = {"resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"}


def random_weight_keys(model_args: Any) -> list[str]:
    """The recipe's keys with which LLaMA-Factory gives a model new random weights each time that it is loaded."""
    keys = [key for key in ("train_from_scratch", "resize_vocab", "add_tokens") if getattr(model_args, key)]
    # Initialized from a description without noise, an embedding is the same each time.
    described = model_args.new_special_tokens_config is not None and model_args.init_special_tokens == "desc_init"
    if model_args.add_special_tokens is not None and not described:
        keys.append("new_special_tokens_config" if model_args.new_special_tokens_config else "add_special_tokens")
    return [*keys, "mixture_of_depths"] if model_args.mixture_of_depths == "convert" else keys


def different_weights(keys: Sequence[str], reason: str | None = None) -> ValueError:
    """The error to raise if the reference model would have other random weights than the policy.

    Args:
        keys: the recipe's keys that cause random weights.
        reason: why the policy cannot compute the log-probabilities before the first step, where that would help.
    """
    named = " and ".join(f"`{key}`" for key in keys)
    beforehand = f", and the policy cannot take its place before the first step: {reason}" if reason else ""
    return ValueError(
        f"{named}: the reference model would get other random weights than the policy{beforehand}. Save the weights in "
        "a copy of the model first (`llamafactory-cli export` takes the same keys, as `--model_name_or_path`, "
        f"`--{keys[0]}` and so on, and writes to `--export_dir`), and train that copy without {named}."
    )


def obstacle(pending: PendingReference, args: Any, datasets: Sequence[Any]) -> str | None:
    """Why reference log-probabilities cannot be precomputed or cached, or None.

    Args:
        pending: the reference.
        args: transformers' training arguments.
        datasets: the tokenized data sets.
    """
    if not args.do_train:
        return "without training, each pair is scored only once"
    if any(not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__") for dataset in datasets):
        return STREAMED
    if random_weight_keys(pending.model_args) and not pending.is_first_policy:
        return "the model gets random weights when it is loaded"
    return None


# --- its fingerprint -------------------------------------------------------------------------------------------------


def describe(pending: PendingReference, policy: torch.nn.Module, args: Any) -> dict[str, Any] | None:
    """Everything that the reference's log-probabilities of given tokens depend on; None if its files are unknown.

    Args:
        pending: the reference.
        policy: the model to be trained; the reference gets its precision.
        args: transformers' training arguments.
    """
    logger.info_rank0("Computing the fingerprint of the reference model, under which its log-probabilities are cached.")
    found: list[Any] = [None]
    if PartialState().is_main_process:
        found = [_contents(pending)]
    broadcast_object_list(found)
    if found[0] is None:
        return None

    model_args, finetuning_args = pending.model_args, pending.finetuning_args
    settings = {
        field.name: getattr(model_args, field.name)
        for field in dataclasses.fields(model_args)
        if field.name not in UNRELATED
        and not field.name.startswith(UNRELATED_PREFIXES)
        and not field.name.endswith(UNRELATED_SUFFIXES)
    }
    if model_args.rope_scaling is None:  # otherwise the scaling depends on it
        del settings["model_max_length"]
    return {
        "files": found[0],
        "is the policy without its adapter": finetuning_args.ref_model is None
        and finetuning_args.finetuning_type == "lora",
        "settings": {name: str(value) for name, value in settings.items()},
        "ref_model_quantization_bit": finetuning_args.ref_model_quantization_bit,
        "create_new_adapter": finetuning_args.create_new_adapter,
        "ld_alpha": finetuning_args.ld_alpha if finetuning_args.ld_alpha_reference else None,
        "policy's dtypes": hashes.of_value(_dtypes(policy)),
        "attention": getattr(policy.config, "_attn_implementation", None),
        "shared prefix": finetuning_args.share_prefix is not False,
        "precision": {name: getattr(args, name, None) for name in ("bf16", "fp16", "tf32")},
        "launcher": {name: os.environ.get(name) for name in LAUNCHER},
        "DeepSpeed": args.deepspeed is not None,
        "FSDP": uses_fsdp(args),  # which rounds all weights to half precision, not linear layers only
        "ZeRO-3": is_deepspeed_zero3_enabled(),  # with ZeRO-3, LLaMA-Factory merges no adapter
        "device": args.device.type,
        "versions": _versions(),
        "llamafactory_ext": __version__,
    }


def folder_name(about: Mapping[str, Any]) -> str:
    """The fingerprint of a reference, 32 hex digits, from what `describe` returns: the name of its cache folder."""
    return hashes.of_value(about)[:32]


def _versions() -> dict[str, str]:
    """From the packages themselves: LLaMA-Factory may run from a source tree, which has no metadata."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llamafactory": LLAMAFACTORY_VERSION,
        "peft": peft.__version__,
    }


def _dtypes(policy: torch.nn.Module) -> dict[str, str]:
    """Dtypes by parameter name, named as without an adapter."""
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): str(parameter.dtype)
        for name, parameter in policy.named_parameters()
    }
    return {name: dtype for name, dtype in names.items() if ".lora_" not in name}


def _contents(pending: PendingReference) -> list[Any] | None:
    """The file hashes of the reference's model and adapters; None if one of them is unknown."""
    model_args, finetuning_args = pending.model_args, pending.finetuning_args
    if finetuning_args.ref_model is None:
        model, adapters = model_args.model_name_or_path, model_args.adapter_name_or_path or []
    else:
        model, adapters = finetuning_args.ref_model, (finetuning_args.ref_model_adapters or "").split(",")
    subfolder = model_args.adapter_folder or ""
    contents = [_content(model, "", model_args)]
    contents += [_content(adapter.strip(), subfolder, model_args) for adapter in adapters if adapter.strip()]
    return contents if all(contents) else None


def _content(source: str, subfolder: str, model_args: Any) -> dict[str, str] | str | None:
    """Hashes of a folder's files by name, or the commit of a model on the hub; None if unknown."""
    if not Path(source).is_dir():
        return _commit(source, subfolder, model_args)
    return hashes.of_model(Path(source, subfolder))


def _commit(name: str, subfolder: str, model_args: Any) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    if use_modelscope() or use_openmind():
        return None
    where = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.hf_hub_token}
    for file in ("config.json", "adapter_config.json"):
        try:
            commit = extract_commit_hash(cached_file(name, file, subfolder=subfolder, **where), None)
        except OSError:
            continue
        if commit is not None:
            return f"{name}@{commit}/{subfolder}"
    return None


# --- its precision ---------------------------------------------------------------------------------------------------


def half_dtype(args: Any) -> torch.dtype | None:
    """The dtype that training computes linear layers in (bf16 or fp16), or None.

    Args:
        args: transformers' training arguments.
    """
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def kept_dtype(args: Any) -> torch.dtype | None:
    """The half-precision dtype that linear layers of the reference may keep, or None.

    None under FSDP: it shards the parameters of a module together, so they must have one dtype.

    Args:
        args: transformers' training arguments.
    """
    return None if uses_fsdp(args) else half_dtype(args)


def match_precision(reference: torch.nn.Module, policy: torch.nn.Module, kept: torch.dtype | None) -> None:
    """Cast the reference's parameters, in place, to the dtypes of the policy's parameters of the same name.

    LLaMA-Factory upcasts trainable parameters to float32 and leaves the reference in half precision. The two then
    differ before the first step (log-ratios from -0.7 to +0.3 were measured), which opens the gates of MinorDPO and
    DPOP at random. Linear layers keep a half-precision dtype if autocast would round the policy's float32 weights to
    the same numbers; that saves most of the memory.

    Args:
        reference: the reference model; a quantized one is not changed.
        policy: the model to be trained, already upcast.
        kept: the half-precision dtype that linear layers may keep, or None.
    """
    if getattr(reference, "quantization_method", None) is not None:
        return

    wanted = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    for prefix, module in reference.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            rounded_anyway = isinstance(module, torch.nn.Linear) and parameter.dtype == kept
            if not rounded_anyway:
                parameter.data = parameter.data.to(wanted.get(name, parameter.dtype))
