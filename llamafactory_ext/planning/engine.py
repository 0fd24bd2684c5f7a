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


def read_engine(training_args: Any, model: ModelShape, gpus: int) -> Engine:
    """The engine that a recipe's `deepspeed`, `fsdp`, `bf16` and `fp16` set up on this many GPUs.

    Raises:
        UserError: if the DeepSpeed file cannot be read, or a setting is not supported.
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
    try:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, TypeError) as error:
        raise UserError(
            f"the deepspeed file {source!r} cannot be read: write the path of a JSON file, such as "
            "examples/deepspeed/zero3.json."
        ) from error
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"the deepspeed file {source!r} is not valid JSON ({error}): correct it.") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"the deepspeed file {source!r} is not a DeepSpeed configuration: see examples/deepspeed.")
    return config


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
    layer = (model.parameters - model.outside_layers) // model.layers
    return Engine(
        "FSDP" + (" with offload" if "offload" in options else ""),
        weight_shards=gpus,
        gradient_shards=gpus,
        optimizer_shards=gpus,
        compute_bytes=FLOAT16 if training_args.bf16 or training_args.fp16 else None,
        offload_optimizer="offload" in options,
        offload_parameters="offload" in options,
        gathered=model.outside_layers + 2 * layer,  # the outermost unit, the layer in use and the next one
    )
