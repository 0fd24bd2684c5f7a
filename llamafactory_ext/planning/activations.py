"""Closed-form memory of activations and logits that a forward pass keeps for the backward pass, in bytes per GPU."""

from __future__ import annotations

from .engine import FLOAT16, FLOAT32
from .training import Training


def logits_bytes(training: Training) -> float:
    """The peak of logits and log-probabilities over the vocabulary in `logps.response_logps`.

    Three float32 tensors of shape (tokens of a chunk, vocabulary) at once, in the backward pass of the log-softmax: its
    output, its gradient and the gradient of its input. If the head computes all logits and the reference is scored in
    every step, they are the reference's logits and log-softmax, and the policy's log-softmax.
    """
    return 3 * FLOAT32 * logits_at_once(training, training.sequences)


def logits_at_once(training: Training, sequences: int) -> float:
    """Elements of the logits that are computed at once for this many sequences.

    Chunks of equal size may be smaller, but a batch with shorter responses may fill a whole one.
    """
    return min(training.chunk, sequences * training.response * training.model.vocabulary)


def activation_bytes(training: Training) -> float:
    """Bytes that the policy's forward pass keeps for the backward pass, with the weights that autocast rounds.

    With gradient checkpointing, only the input of each layer is kept.
    """
    model = training.model
    residual, compute, _ = activation_dtypes(training)
    layer = model.hidden * residual if training.checkpointing else layer_activations(training)
    last = model.hidden * (FLOAT32 if training.adapter else FLOAT32 + residual)
    head = residual if training.chunked else 0 if training.adapter else compute
    rounded = rounded_weights(training)
    kept = (0 if training.chunked else rounded["head"]) + (0 if training.checkpointing else rounded["layers"])
    return training.positions * (model.layers * layer + last) + training.scored * model.hidden * head + kept


def activation_dtypes(training: Training) -> tuple[int, int, int]:
    """Bytes per element of the residual stream, of the inputs of matrix products, and of LoRA's inputs."""
    if training.adapter:
        residual = training.frozen_bytes
        compute = FLOAT16 if training.autocast else residual
        return residual, compute, compute if training.autocast else max(residual, training.trained_bytes)
    if training.autocast:
        return FLOAT32, FLOAT16, 0
    element = training.engine.compute_bytes or training.trained_bytes
    return element, element, 0


def layer_activations(training: Training) -> float:
    """Bytes per position that autograd keeps within one decoder layer.

    Counted as by Korthikanti et al. (arXiv 2205.05198, section 4.1), for Llama's layer: RMSNorm (in float32), rotary
    embeddings, SDPA or flash attention (nothing of size length^2), gated MLP, no dropout. Layers without a gate keep
    less.
    """
    model = training.model
    residual, compute, adapted = activation_dtypes(training)
    attention, mlp = attention_activations(training), mlp_activations(training)
    if training.adapter is None:
        # For each norm, its input in float32, and the normalized vector for the gradient of its weight.
        norms = 2 * model.hidden * (FLOAT32 + residual)
        # The inputs of the matrix products: autocast rounds them again for each of the five that follow a norm.
        rounded = 5 * compute if residual != compute else 2 * compute
        return norms + rounded * model.hidden + attention + mlp + compute * model.intermediate

    # Frozen norms and matrices keep no input for their gradients; LoRA's do.
    norms = 2 * model.hidden * FLOAT32
    targets = training.adapter.targets
    if training.autocast or adapted != residual:  # a copy for each target, in LoRA's dtype
        inputs = adapted * sum(columns for columns, _ in targets) / model.layers
    else:
        inputs = adapted * (2 * model.hidden + model.intermediate)
    inputs += adapted * training.adapter.rank * len(targets) / model.layers
    return norms + attention + mlp + inputs


def attention_activations(training: Training) -> float:
    """Bytes per position that attention keeps."""
    model = training.model
    _, compute, _ = activation_dtypes(training)
    # With a padding mask, SDPA repeats keys and values to the number of heads.
    kv_heads = model.kv_heads if training.attention == "fa2" else model.heads
    kept = compute * 2 * (model.heads + kv_heads) * model.head_dim  # query, key, value, output
    kept += FLOAT32 * model.heads  # log of the softmax's denominator
    if training.attention == "eager":  # the softmax in float32, and rounded for the product with the values
        kept += model.heads * training.length * (FLOAT32 + (compute if compute < FLOAT32 else 0))
    return kept


def mlp_activations(training: Training) -> float:
    """Bytes per position that the gated MLP keeps."""
    _, compute, _ = activation_dtypes(training)
    return compute * 3 * training.model.intermediate  # gate, its SiLU, up


def rounded_weights(training: Training) -> dict[str, float]:
    """Bytes of the copies in half precision that autocast makes of float32 matrices, for the backward pass."""
    model = training.model
    stored = training.frozen_bytes if training.adapter else training.trained_bytes
    if not training.autocast or stored != FLOAT32:
        return {"layers": 0.0, "head": 0.0}
    quantized = training.linear_bytes is not None
    return {"layers": 0.0 if quantized else FLOAT16 * model.matrix_parameters, "head": float(FLOAT16 * model.head)}
