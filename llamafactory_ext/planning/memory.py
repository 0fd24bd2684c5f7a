"""The GPU memory of a training by part, in closed form: nothing is loaded or run.

Tests compare the parts with the tensors of real runs (tests/planning). Every byte count is per GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .activations import (
    activation_bytes,
    activation_dtypes,
    attention_activations,
    layer_activations,
    logits_at_once,
    logits_bytes,
    mlp_activations,
    rounded_weights,
)
from .engine import FLOAT16, FLOAT32
from .model_shape import ModelShape
from .training import Training

GIB = 1024**3

# Allowances, as no formula gives these: the CUDA context with workspaces of libraries, and allocator fragmentation.
CONTEXT = GIB
FRAGMENTATION = 0.05

NOTHING_ROUNDED = {"layers": 0.0, "head": 0.0}


def memory_parts(training: Training) -> dict[str, float]:
    """Bytes per GPU by part; their sum is the peak.

    Activations and logits are those at the time of the loss. If another time in a step needs more memory beside the
    model states (see `other_moments`), the excess is a separate part.
    """
    activations, logits = activation_bytes(training), logits_bytes(training)
    moment, needed = max(other_moments(training).items(), key=lambda item: item[1])
    excess = needed - activations - logits
    parts = {
        **states_on_gpu(training),
        "activations": activations,
        "logits and log-softmax": logits,
        **({f"excess: {moment}": excess} if excess > 0 else {}),
        "buffers and gathered weights": buffer_bytes(training),
    }
    return parts | {"allowance: CUDA, fragmentation": CONTEXT + FRAGMENTATION * sum(parts.values())}


def model_states(training: Training) -> dict[str, float]:
    """Bytes per GPU of weights, gradients, optimizer states and reference model in training, on the GPU or offloaded.

    With P parameters on N GPUs, mixed-precision Adam under ZeRO keeps 2 P of weights, 2 P of gradients and
    K = 12 P of states (float32 copy, two moments); stages 1, 2, 3 divide states, gradients, weights by N
    (ZeRO, arXiv 1910.02054, section 3.1).
    """
    model, engine = training.model, training.engine
    if training.adapter:
        frozen = _frozen_weights(model, training.frozen_bytes, training.linear_bytes)
        weights = frozen + training.trained * training.trained_bytes
    else:
        weights = model.parameters * training.trained_bytes
    return {
        "weights": weights / engine.weight_shards,
        "gradients": training.trained * training.gradient_bytes / engine.gradient_shards,
        "optimizer states": _optimizer_states(training) / engine.optimizer_shards,
        "reference model": reference_bytes(training) if training.holds_reference else 0.0,
    }


def states_on_gpu(training: Training) -> dict[str, float]:
    """The `model_states` that are not offloaded, in bytes per GPU."""
    states, engine = model_states(training), training.engine
    if engine.offload_optimizer:
        states |= {"gradients": 0.0, "optimizer states": 0.0}
    if engine.offload_parameters:
        states |= {"weights": 0.0, "reference model": 0.0}
    return states


def _frozen_weights(model: ModelShape, element: int, linear: float | None) -> float:
    quantized = model.matrix_parameters if linear is not None else 0
    return (model.parameters - quantized) * element + quantized * (linear or 0)


def _optimizer_states(training: Training) -> float:
    if training.engine.zero_stage is not None:
        # DeepSpeed's optimizer gets one flat float32 vector: no matrix to factor, no embedding to keep in 32 bits.
        flat = {"all": (training.trained,)}
        return training.trained * FLOAT32 + training.optimizer.bytes(flat, 0, FLOAT32)
    if training.adapter is None:
        return training.optimizer.bytes(training.model.shapes, training.model.embedding, training.trained_bytes)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (columns, rows) in enumerate(training.adapter.targets):
        shapes[f"{index}.A"], shapes[f"{index}.B"] = (training.adapter.rank, columns), (rows, training.adapter.rank)
        if training.adapter.dora:
            shapes[f"{index}.magnitude"] = (rows,)
    return training.optimizer.bytes(shapes, 0, training.trained_bytes)


def reference_bytes(training: Training) -> float:
    """Bytes per GPU of a reference model, on the GPU or offloaded; 0 without one."""
    reference = training.reference
    return 0.0 if reference is None else _reference_weights(training, reference) / training.engine.weight_shards


def _reference_weights(training: Training, reference: ModelShape) -> float:
    """Bytes of the reference at the policy's precision: `match_precision` does not convert linear layers that autocast
    rounds anyway, nor a reference whose policy has other parameter names (LoRA's)."""
    if training.engine.zero_stage is not None and training.engine.compute_bytes:
        return reference.parameters * training.engine.compute_bytes
    if training.adapter:
        return reference.parameters * reference.dtype_bytes
    spared = 0
    sharded = training.engine.weight_shards > 1  # under FSDP, all are converted
    if training.half and not training.pure and not sharded and reference.dtype_bytes == FLOAT16:
        # A tied head is the embedding's parameter, which is converted.
        spared = reference.linear_parameters + (0 if reference.tied else reference.head)
    return spared * FLOAT16 + (reference.parameters - spared) * training.trained_bytes


def other_moments(training: Training) -> dict[str, float]:
    """Bytes beside the model states at the times in a step that may need more than the loss does, by name."""
    rounded = rounded_weights(training)
    # The head's rounded weights exist only while it runs on a chunk.
    activations = activation_bytes(training) - (0 if training.chunked else rounded["head"])
    moments = {"optimizer step": optimizer_step_bytes(training)}
    if training.adapter is None:
        moments["gradient of the head"] = activations + head_gradient_bytes(training)
        if training.model.tied:
            moments["gradient of the embedding"] = 2.0 * training.trained_bytes * training.model.head
    if training.checkpointing:
        moments["end of the forward pass"] = activations + forward_end_bytes(training)
        moments["backward pass of a layer"] = activations + recomputed_layer_bytes(training)
    if training.reference_sequences:
        moments["reference before the first step"] = reference_pass_bytes(training)
    if training.engine.loads_whole:
        moments["whole models before they are sharded"] = loading_bytes(training)
    if training.augmented_sequences:
        longer = replace(training, length=training.augmented_length)
        rounded_here = rounded if training.adapter is None else NOTHING_ROUNDED
        scoring = _scoring_bytes(longer, training.augmented_sequences, rounded_here)
        # The gradients of the last step are freed by then, except possibly DeepSpeed's.
        gone = states_on_gpu(training)["gradients"] if training.engine.zero_stage is None else 0.0
        moments["augmented pairs before a step"] = scoring - gone
    return moments


def head_gradient_bytes(training: Training) -> float:
    """Bytes beside the activations while the gradient of the head's weights is computed.

    Autocast converts it to float32 at the end. With chunks, memory holds the gradient of earlier chunks, a chunk's own,
    and their sum or the rounded weights; or the gradient of earlier chunks and the chunk's log-softmax.
    """
    _, compute, _ = activation_dtypes(training)
    gradient, of_logits = compute * training.model.head, compute * logits_at_once(training, training.sequences)
    if training.chunked:
        rounded = rounded_weights(training)["head"]
        return gradient + max(2 * gradient, gradient + rounded + of_logits, rounded + logits_bytes(training))
    return gradient + (FLOAT32 * training.model.head if training.autocast else of_logits)


def forward_end_bytes(training: Training) -> float:
    """Bytes beside the activations at the first chunk: the last norm's output, logits and log-softmax in float32.

    Autocast still holds its copies of all trained weights, even those that the backward pass does not need.
    """
    residual, _, _ = activation_dtypes(training)
    rounded = rounded_weights(training)
    cached = rounded["head"] + (0 if training.adapter else rounded["layers"])
    output = training.positions * training.model.hidden * residual
    return output + 2 * FLOAT32 * logits_at_once(training, training.sequences) + cached


def recomputed_layer_bytes(training: Training) -> float:
    """Bytes beside the activations while a checkpointed layer is recomputed and differentiated."""
    model, adapter = training.model, training.adapter
    residual, compute, _ = activation_dtypes(training)
    # What autograd keeps, and the gradient that arrives.
    position = layer_activations(training) + model.hidden * residual
    if adapter is not None and training.autocast:
        # At the widest input: PEFT's copy in LoRA's dtype, and the outputs of the matrix and LoRA before their sum.
        columns, rows = max(adapter.targets)
        position += training.trained_bytes * columns + 3 * compute * rows
    # A tied head's gradient is kept until the embedding's is computed.
    waiting = model.head * training.trained_bytes if model.tied and adapter is None else 0
    return training.positions * position + rounded_weights(training)["layers"] / model.layers + waiting


def reference_pass_bytes(training: Training) -> float:
    """Bytes beside the model states while the reference's log-probabilities are computed before the first step."""
    rounded = rounded_weights(training)
    if training.reference is not None or training.adapter is not None:
        rounded = NOTHING_ROUNDED  # autocast keeps copies of trained weights only
    longest = replace(training, length=max(training.length, training.augmented_length))
    loaded = 0.0 if training.engine.offload_parameters else reference_bytes(training)
    return loaded + _scoring_bytes(longest, training.reference_sequences, rounded) - _later_states(training)


def loading_bytes(training: Training) -> float:
    """Bytes while policy and reference are whole on each GPU, less those of model states and buffers, which are later.

    LLaMA-Factory loads them before accelerate shards them with FSDP, and makes the policy float32 at once.
    """
    whole = model_states(training)["weights"] * training.engine.weight_shards
    if training.reference is not None:
        whole += _reference_weights(training, training.reference)
    return whole - sum(states_on_gpu(training).values()) - buffer_bytes(training)


def _scoring_bytes(training: Training, sequences: int, rounded: Mapping[str, float]) -> float:
    """Bytes of a forward pass without gradients: one layer at a time, then logits and log-softmax of a chunk."""
    model = training.model
    residual, _, _ = activation_dtypes(training)
    positions = sequences * training.length
    stream = positions * model.hidden * residual
    scores = FLOAT32 * model.heads * training.length if training.attention == "eager" else 0  # before their softmax
    widest = max(attention_activations(training) + scores, mlp_activations(training))
    # Embeddings, the layer's input, the residual and the norm's output; later only two, with the last norm's output.
    layer = 4 * stream + positions * widest
    logits = 2 * stream + 2 * FLOAT32 * logits_at_once(training, sequences) + rounded["head"]
    return max(layer, logits) + rounded["layers"]


def _later_states(training: Training) -> float:
    """Bytes per GPU of gradients and optimizer states that do not exist before the first step.

    DeepSpeed creates its float32 copy of the weights at the start, and ZeRO-3 also the buffer of the gradients; the
    optimizer states come with the first step.
    """
    states, engine = states_on_gpu(training), training.engine
    later = states["gradients"] + states["optimizer states"]
    if engine.zero_stage is not None and not engine.offload_optimizer:
        later -= FLOAT32 * training.trained / engine.optimizer_shards
        later -= states["gradients"] if engine.zero_stage == 3 else 0
    return later


def optimizer_step_bytes(training: Training) -> float:
    """Bytes of temporaries of the optimizer: ZeRO converts its gradients to float32, torch's foreach copies a state."""
    engine = training.engine
    if engine.offload_optimizer:
        return 0.0
    part = training.trained / engine.optimizer_shards
    gradients = FLOAT32 if engine.zero_stage is not None and training.gradient_bytes != FLOAT32 else 0
    return part * (gradients + (FLOAT32 if training.optimizer.multi_tensor else 0))


def buffer_bytes(training: Training) -> float:
    """Bytes of copies of weights and gradients: gathered, dequantized, waiting to be reduced, or being reduced."""
    model, engine = training.model, training.engine
    total = float(engine.gathered * training.frozen_bytes)
    if engine.weight_shards > 1 and training.reference is not None and training.holds_reference:
        total += training.reference.largest_layer * training.frozen_bytes
    if engine.whole_gradients:
        total += training.trained * (engine.compute_bytes or training.trained_bytes)
    total += engine.reduce_buckets * min(engine.reduce_bucket, training.trained) * training.gradient_bytes
    if training.linear_bytes is not None:
        total += max(map(math.prod, model.matrices.values())) * FLOAT16
    return total
