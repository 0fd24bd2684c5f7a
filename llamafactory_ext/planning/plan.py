"""Plans a recipe on given GPUs: its steps, its memory by part, and settings that fit."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import examples
from ..errors import UserError
from ..recipe.reading import Settings, check_sizes, parse_recipe
from .engine import FLOAT16, FLOAT32, read_engine
from .memory import GIB, memory_parts, model_states, reference_bytes
from .model_shape import lora_adapter, read_model
from .schedule import Schedule, count_pairs, make_schedule, padded, training_args_of
from .training import ADAM, INT8, NF4, NF4_DOUBLE, OPTIMIZERS, Optimizer, Training

BYTES_PER_TOKEN = 3  # English text has more with common tokenizers
OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")


@dataclass(frozen=True)
class Plan:
    """A recipe on given GPUs.

    Args:
        engine: how the training is distributed, for display.
        parameters, trained: number of parameters, and of trained ones.
        gpus: number of GPUs on all nodes.
        gpu_memory: bytes of one GPU.
        schedule: steps and tokens.
        cutoff_len: tokens of the longest sequence, for which memory is planned.
        memory: bytes per GPU by part.
        host_memory: bytes of offloaded states per node.
        deepspeed_estimate: DeepSpeed's own estimate for weights, gradients and optimizer states: bytes per GPU, and
            bytes of host memory per node; None if it does not apply.
        notes: what was assumed, or could not be determined.
    """

    engine: str
    parameters: int
    trained: int
    gpus: int
    gpu_memory: float
    schedule: Schedule
    cutoff_len: int
    memory: dict[str, float]
    host_memory: float
    deepspeed_estimate: tuple[int, int] | None
    notes: tuple[str, ...]

    @property
    def total(self) -> float:
        """Bytes per GPU; rather too much than too little, as the parts do not all peak at the same time."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether `total` is at most `gpu_memory`."""
        return self.total <= self.gpu_memory


def make_plan(
    settings: Settings,
    gpus: int,
    gpu_memory_gib: float,
    *,
    gpus_per_node: int = 8,
    tokens: int | None = None,
    answer_tokens: int | None = None,
) -> Plan:
    """Plan a recipe of stage dpo.

    Args:
        settings: LLaMA-Factory's and the plugin's keys.
        gpus: number of GPUs on all nodes.
        gpu_memory_gib: GiB of one GPU.
        gpus_per_node: number of GPUs that share a host.
        tokens: typical tokens of one sequence, prompt and response; `cutoff_len` if None. Memory is always planned for
            `cutoff_len`.
        answer_tokens: tokens of the longest response; `cutoff_len` if None. Prefix sharing is not counted.

    Raises:
        UserError: if something is missing or not supported.
    """
    for name, value in {"gpus": gpus, "gpu_memory": gpu_memory_gib, "gpus_per_node": gpus_per_node}.items():
        if value <= 0:
            raise UserError(f"{name} is {value}: write a number above 0.")
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens is {tokens}: write the typical tokens of one sequence, at least 1.")

    model_args, data_args, finetuning_args = parse_recipe(settings)
    check_sizes(data_args)
    training_args = training_args_of(settings)
    _check_supported(model_args, finetuning_args, training_args)

    notes: list[str] = []
    for name, asked in {"tokens": tokens, "answer tokens": answer_tokens}.items():
        if (asked or 0) > data_args.cutoff_len:
            notes.append(f"{asked} {name} are above cutoff_len: {data_args.cutoff_len} are planned.")
    response = min(answer_tokens or data_args.cutoff_len, data_args.cutoff_len)
    length = min(tokens or data_args.cutoff_len, data_args.cutoff_len)
    sr_tokens = _sr_tokens(model_args, finetuning_args, notes)
    augmented = None if sr_tokens is None else length + sr_tokens
    schedule = make_schedule(training_args, count_pairs(data_args, notes), gpus, length, augmented)
    precomputes = _precomputes_reference(model_args, data_args, finetuning_args, training_args, schedule)
    training = _training(
        model_args, data_args, finetuning_args, training_args, gpus, response, precomputes, sr_tokens, notes
    )
    parts = memory_parts(training)
    nodes = math.ceil(gpus / gpus_per_node)
    return Plan(
        engine=training.engine.name,
        parameters=training.model.parameters,
        trained=training.trained,
        gpus=gpus,
        gpu_memory=gpu_memory_gib * GIB,
        schedule=schedule,
        cutoff_len=data_args.cutoff_len,
        memory=parts,
        host_memory=min(gpus, gpus_per_node) * _offloaded(training),
        deepspeed_estimate=_deepspeed_estimate(training, math.ceil(gpus / nodes), nodes, notes),
        notes=tuple(notes),
    )


# --- the recipe -------------------------------------------------------------------------------------------------------


def _check_supported(model_args: Any, finetuning_args: Any, training_args: Any) -> None:
    if finetuning_args.stage != "dpo":
        raise UserError(f"stage {finetuning_args.stage!r} cannot be planned: write `stage: dpo`.")
    if finetuning_args.finetuning_type not in ("full", "lora"):
        raise UserError(
            f"finetuning_type {finetuning_args.finetuning_type!r} cannot be planned: write full, or lora (with "
            "quantization_bit for QLoRA)."
        )
    if model_args.quantization_bit not in (None, 4, 8):
        raise UserError(f"quantization_bit {model_args.quantization_bit!r} cannot be planned: write 4 or 8.")
    if model_args.quantization_bit and finetuning_args.finetuning_type != "lora":
        raise UserError("quantized weights cannot be trained: write `finetuning_type: lora` with quantization_bit.")


def _training(
    model_args: Any,
    data_args: Any,
    finetuning_args: Any,
    training_args: Any,
    gpus: int,
    response: int,
    precomputes: bool,
    sr_tokens: int | None,
    notes: list[str],
) -> Training:
    from ..training.logps import CHUNK, MICRO_BATCHES_AT_ONCE

    trust = bool(getattr(model_args, "trust_remote_code", False))
    model = read_model(model_args.model_name_or_path, trust)
    if not model.dense:
        notes.append("The model is a mixture of experts: its activations are counted as those of a dense model.")
    lora = finetuning_args.finetuning_type == "lora"
    loaded = _loads_reference(model_args, finetuning_args, training_args, precomputes)
    reference = read_model(finetuning_args.ref_model or model_args.model_name_or_path, trust) if loaded else None
    if reference is not None and finetuning_args.ref_model_quantization_bit is not None:
        notes.append("ref_model_quantization_bit is not counted.")
    if finetuning_args.additional_target:
        notes.append("additional_target is not counted.")

    targets, rank = finetuning_args.lora_target, finetuning_args.lora_rank
    sequences, at_once = 2 * training_args.per_device_train_batch_size, MICRO_BATCHES_AT_ONCE
    accumulation = training_args.gradient_accumulation_steps
    half = bool(training_args.bf16 or training_args.fp16)
    engine = read_engine(training_args, model, gpus)
    return Training(
        model=model,
        reference=reference,
        reference_sequences=sequences * at_once if precomputes else 0,
        augmented_sequences=0 if sr_tokens is None else sequences * min(at_once, accumulation),
        augmented_length=0 if sr_tokens is None else padded(data_args.cutoff_len + sr_tokens),
        adapter=lora_adapter(model, targets, rank, finetuning_args.use_dora) if lora else None,
        engine=engine,
        optimizer=_optimizer(finetuning_args, training_args, notes),
        half=half,
        pure=finetuning_args.pure_bf16,
        linear_bytes={None: None, 4: NF4_DOUBLE if model_args.double_quantization else NF4, 8: INT8}[
            model_args.quantization_bit
        ],
        checkpointing=not model_args.disable_gradient_checkpointing,
        attention={"disabled": "eager", "fa2": "fa2"}.get(str(model_args.flash_attn), "sdpa"),
        sequences=sequences,
        length=padded(data_args.cutoff_len),
        response=response,
        chunk=math.inf if engine.rounds_output else CHUNK,
    )


def _sr_tokens(model_args: Any, finetuning_args: Any, notes: list[str]) -> int | None:
    """Tokens of the refinement prompt, which precedes prompts; None without a refinement term."""
    from transformers import AutoTokenizer

    text = finetuning_args.refinement_prompt
    if text is None:
        return None
    with suppress(Exception):  # whatever transformers raises if there is only a configuration
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
        )
        if len(tokenizer) > 100:  # without files, transformers 5 makes an empty tokenizer
            return len(tokenizer.encode(text, add_special_tokens=False))
    tokens = math.ceil(len(text.encode()) / BYTES_PER_TOKEN)
    notes.append(f"The tokenizer cannot be loaded: sr_prompt is counted as {tokens} tokens.")
    return tokens


def _precomputes_reference(
    model_args: Any, data_args: Any, finetuning_args: Any, training_args: Any, schedule: Schedule
) -> bool:
    """Whether the reference's log-probabilities are precomputed before the first step."""
    from ..training.reference.model import obstacle

    wanted = finetuning_args.precompute_ref_log_probs
    pending = _pending(model_args, finetuning_args)
    if not finetuning_args.use_ref_model or wanted is False or data_args.streaming:
        return False
    if obstacle(pending, training_args, []) is not None:
        return False
    return bool(wanted) or not schedule.ends_early


def _loads_reference(model_args: Any, finetuning_args: Any, training_args: Any, precomputes: bool) -> bool:
    without_adapter = finetuning_args.finetuning_type == "lora" and finetuning_args.ref_model is None
    if not finetuning_args.use_ref_model or without_adapter:
        return False
    return not (precomputes and _pending(model_args, finetuning_args).starts_as_policy(training_args))


def _pending(model_args: Any, finetuning_args: Any) -> Any:
    from llamafactory.train.trainer_utils import create_ref_model

    from ..training.reference.model import PendingReference

    return PendingReference(create_ref_model, model_args, finetuning_args)


def _optimizer(finetuning_args: Any, training_args: Any, notes: list[str]) -> Optimizer:
    name = str(getattr(training_args.optim, "value", training_args.optim))
    name = next((key for key in OTHER_OPTIMIZERS if getattr(finetuning_args, key, False)), name)
    if name not in OPTIMIZERS:
        notes.append(f"The optimizer {name!r} is unknown: its states are counted as Adam's.")
    return OPTIMIZERS.get(name, ADAM)


def _offloaded(training: Training) -> float:
    """Bytes per GPU that are offloaded to host memory."""
    states, engine = model_states(training), training.engine
    total = 0.0
    if engine.offload_optimizer:
        # DeepSpeed also keeps its shard of the gradients there in float32.
        total += states["gradients"] + states["optimizer states"]
        total += FLOAT32 * training.trained / engine.optimizer_shards if engine.zero_stage is not None else 0
    if engine.offload_parameters:
        total += states["weights"] + reference_bytes(training)
    return total


def _deepspeed_estimate(training: Training, gpus: int, nodes: int, notes: list[str]) -> tuple[int, int] | None:
    """DeepSpeed's own estimate, which is for full mixed-precision training with Adam under ZeRO-2 and 3."""
    engine = training.engine
    if engine.zero_stage not in (2, 3) or training.adapter or engine.compute_bytes != FLOAT16:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        notes.append("DeepSpeed's own estimate is not shown: DeepSpeed is not installed.")
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    model, offload = training.model, engine.offload_optimizer
    if engine.zero_stage == 2:
        host, gpu = estimate_zero2_model_states_mem_needs(model.parameters, gpus, nodes, cpu_offload=offload)
    else:
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            model.parameters,
            model.largest_layer,
            gpus,
            nodes,
            cpu_offload=offload,
            cpu_offload_params=engine.offload_parameters,
        )
    return gpu, host


# --- settings that fit ------------------------------------------------------------------------------------------------


def alternatives(
    settings: Settings,
    gpus: int,
    gpu_memory_gib: float,
    *,
    gpus_per_node: int = 8,
    tokens: int | None = None,
    answer_tokens: int | None = None,
) -> list[tuple[Settings, Plan]]:
    """Settings that fit the GPUs with the same global batch, smallest change first.

    Takes the arguments of `make_plan`. Returns pairs of the changed YAML keys (None: remove the key) and the plan with
    them; for each way to save memory, the largest micro-batch that fits.
    """
    found: list[tuple[Settings, Plan]] = []
    for method in _methods(settings, gpus):
        for split in _batch_splits(settings):
            changes = {key: value for key, value in {**method, **split}.items() if settings.get(key) != value}
            if not changes:
                continue
            if any(changes == seen for seen, _ in found):
                break
            changed = {key: value for key, value in {**settings, **changes}.items() if value is not None}
            try:
                plan = make_plan(
                    changed,
                    gpus,
                    gpu_memory_gib,
                    gpus_per_node=gpus_per_node,
                    tokens=tokens,
                    answer_tokens=answer_tokens,
                )
            except UserError:  # not possible with this model, such as LoRA that needs the names of its layers
                break
            if plan.fits:
                found.append((changes, plan))
                break
    return found


def _batch_splits(settings: Settings) -> Iterator[Settings]:
    """Micro-batches, from the recipe's own downwards, with the accumulation that keeps the global batch."""
    args = training_args_of(settings)
    micro = args.per_device_train_batch_size
    product = micro * args.gradient_accumulation_steps
    for size in range(micro, 0, -1):
        if product % size == 0:
            yield {"per_device_train_batch_size": size, "gradient_accumulation_steps": product // size}


def _methods(settings: Settings, gpus: int) -> Iterator[Settings]:
    """Ways to save memory, from those that keep the result to those that change what is trained."""
    yield {}
    checkpointing = {"disable_gradient_checkpointing": False} if settings.get("disable_gradient_checkpointing") else {}
    if checkpointing:
        yield checkpointing
    quantized, lora = settings.get("quantization_bit"), settings.get("finetuning_type", "lora") == "lora"
    loads_reference = not lora or settings.get("ref_model")
    if settings.get("precompute_ref_log_probs") is False and loads_reference and not settings.get("streaming"):
        yield {**checkpointing, "precompute_ref_log_probs": None}
    if not (quantized or settings.get("pure_bf16")):  # LLaMA-Factory refuses pure_bf16 with ZeRO-3
        for name in ("zero2", "zero3", "zero3_offload") if gpus > 1 else ("zero3_offload",):
            file = _deepspeed_file(settings, name)
            if file is not None:
                yield {**checkpointing, "deepspeed": file, "fsdp": None}
    if not lora:
        yield {**checkpointing, "finetuning_type": "lora"}
    if quantized != 4:
        yield {**checkpointing, "finetuning_type": "lora", "quantization_bit": 4}


def _deepspeed_file(settings: Settings, name: str) -> str | None:
    """An example configuration: beside the recipe's own, in the working directory, or in the package."""
    own = settings.get("deepspeed")
    folders = [Path(own).parent] if isinstance(own, str) else []
    folders += [Path("examples/deepspeed"), examples.home() / "examples" / "deepspeed"]
    return next((str(folder / f"{name}.json") for folder in folders if (folder / f"{name}.json").is_file()), None)
