"""How a training is distributed: what DDP, DeepSpeed's ZeRO and FSDP keep on each GPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .model_shape import ModelShape

FLOAT32, FLOAT16 = 4, 2  # bytes; bfloat16 takes as many as float16

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Engine:
    """How a training is distributed: what is sharded across GPUs, and which buffers take memory beside the model.

    Args:
        name: for display.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3; None without DeepSpeed. DeepSpeed's optimizer updates a float32 copy
            of the weights.
        weight_shards, gradient_shards, optimizer_shards: the number of GPUs that each is sharded across; 1 for a full
            copy per GPU. A reference model is sharded like the weights.
        compute_bytes: bytes per element that the engine converts weights to; None if it keeps the model's dtypes.
        offload_optimizer: whether gradients and optimizer states are in host memory.
        offload_parameters: whether weights are in host memory.
        gathered: elements of weights gathered from other GPUs at the same time.
        reduce_bucket: elements of a buffer for reducing gradients; at most all gradients.
        reduce_buckets: the number of these buffers.
        whole_gradients: whether whole gradients wait on each GPU between the micro-batches of a step.
        loads_whole: whether each GPU loads whole models, and keeps its part of them later.
        rounds_output: whether the engine rounds what the model returns, so that its head must return logits
            (`training/head.py`).
    """

    name: str
    zero_stage: int | None = None
    weight_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1
    compute_bytes: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gathered: int = 0
    reduce_bucket: float = 0
    reduce_buckets: int = 1
    whole_gradients: bool = False
    loads_whole: bool = False
    rounds_output: bool = False


def read_engine(training_args: Any, model: ModelShape, gpus: int) -> Engine:
    """The engine that a recipe's `deepspeed`, `fsdp`, `bf16` and `fp16` set up on this many GPUs.

    Raises:
        UserError: if a configuration file cannot be read, or a setting is not supported.
    """
    if training_args.deepspeed and training_args.fsdp:
        raise UserError("`deepspeed` and `fsdp` exclude each other: remove one of them.")
    if training_args.deepspeed:
        return _deepspeed_engine(_deepspeed_config(training_args.deepspeed), training_args, model, gpus)
    if training_args.fsdp:
        return _fsdp_engine(training_args, model, gpus)
    if gpus == 1:
        return Engine("one GPU")
    # DDP reduces copies of the gradients: `gradient_as_bucket_view` is off.
    return Engine("DDP", reduce_bucket=math.inf)


def _deepspeed_config(source: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    config = _json_of("deepspeed", source, "write the path of a JSON file, such as examples/deepspeed/zero3.json")
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"the deepspeed file {source!r} is not a DeepSpeed configuration: see examples/deepspeed.")
    return config


def _fsdp_config(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """The options, whose names may begin with `fsdp_`."""
    advice = "write the options, such as `version: 2`, or the path of a JSON file"
    config = _json_of("fsdp_config", source, advice) if isinstance(source, str) else source or {}
    if not isinstance(config, dict):
        raise UserError(f"fsdp_config is {config!r}: {advice}.")
    return {name.removeprefix("fsdp_"): value for name, value in config.items()}


def _json_of(key: str, source: str, advice: str) -> Any:
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, TypeError) as error:
        raise UserError(f"the {key} file {source!r} cannot be read: {advice}.") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"the {key} file {source!r} is not valid JSON ({error}): correct it.") from error


def _deepspeed_engine(config: dict[str, Any], training_args: Any, model: ModelShape, gpus: int) -> Engine:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"the deepspeed file has stage {stage!r}: write a `stage` from 0 to 3 in `zero_optimization`.")

    def enabled(precision: str) -> bool:
        value = config.get(precision, {}).get("enabled", False)
        return bool(getattr(training_args, precision) if value == "auto" else value)

    def elements(key: str, default: int, automatic: int) -> int:
        value = zero.get(key, default)
        return automatic if value == "auto" else int(value)

    def offloaded(key: str) -> bool:
        return bool((zero.get(key) or {}).get("device", "none") != "none")

    half = enabled("bf16") or enabled("fp16")
    name = f"DeepSpeed ZeRO-{stage}" + (" with offload" if offloaded("offload_optimizer") else "")
    return Engine(
        name,
        zero_stage=stage,
        weight_shards=gpus if stage == 3 else 1,
        gradient_shards=gpus if stage >= 2 else 1,
        optimizer_shards=gpus if stage >= 1 else 1,
        # Without half precision, the model keeps its dtypes; ZeRO-3 loads it in float32.
        compute_bytes=FLOAT16 if half else FLOAT32 if stage == 3 else None,
        offload_optimizer=offloaded("offload_optimizer"),
        offload_parameters=stage == 3 and offloaded("offload_param"),
        gathered=min(elements("stage3_max_live_parameters", LIVE_PARAMETERS, LIVE_PARAMETERS), model.parameters)
        if stage == 3
        else 0,
        reduce_bucket=elements("reduce_bucket_size", REDUCE_BUCKET, model.hidden**2) if stage >= 1 else 0,
        reduce_buckets=2 if zero.get("overlap_comm") and stage < 3 else 1,
    )


def _fsdp_engine(training_args: Any, model: ModelShape, gpus: int) -> Engine:
    options = str(training_args.fsdp).split()
    if not {"full_shard", "auto_wrap"} <= set(options) or not set(options) <= {"full_shard", "auto_wrap", "offload"}:
        raise UserError(f"fsdp {' '.join(options)!r} cannot be planned: write `fsdp: full_shard auto_wrap`.")
    version = str(_fsdp_config(training_args.fsdp_config).get("version", 1))
    if version not in ("1", "2"):
        raise UserError(f"fsdp_config has version {version}: write `version: 2`, or remove it for FSDP1.")
    layer = (model.parameters - model.outside_layers) // model.layers
    half = bool(training_args.bf16 or training_args.fp16)
    return Engine(
        f"FSDP{version}" + (" with offload" if "offload" in options else ""),
        weight_shards=gpus,
        gradient_shards=gpus,
        optimizer_shards=gpus,
        compute_bytes=FLOAT16 if half else None,
        offload_optimizer="offload" in options,
        offload_parameters="offload" in options,
        gathered=model.outside_layers + 2 * layer,  # the outermost unit, the layer in use and the next one
        # transformers reduces gradients only at the end of a step.
        whole_gradients=training_args.gradient_accumulation_steps > 1,
        loads_whole=True,
        rounds_output=version == "2" and half,
    )
