"""The GPU memory of a training, part by part, in closed form: nothing is loaded, nothing is run.

The parts were compared with the tensors that real runs hold (tests/planning). Every byte count is per GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .engine import FLOAT16, FLOAT32, Engine
from .model_shape import Adapter, ModelShape

GIB = 1024**3

# bitsandbytes' NF4 stores half a byte per weight and a scale per 64 weights. Double quantization keeps the scales in
# one byte each, with a float32 scale of their own per 256 of them (QLoRA, arXiv 2305.14314, section 3).
NF4 = 0.5 + 4 / 64
NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8 = 1.0

# What no formula gives: the CUDA context with the libraries' workspaces, and blocks that the allocator cannot join.
CONTEXT = GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps and needs per trained parameter.

    Args:
        states: tensors of the parameter's shape and dtype.
        eight_bit: whether each state takes a byte and a float32 scale per 256 elements (bitsandbytes).
        factored: whether a matrix has a state per row and per column in place of one per element (Adafactor).
        multi_tensor: whether a step makes a temporary of all its parameters at once (torch's foreach).
    """

    states: int = 2
    eight_bit: bool = False
    factored: bool = False
    multi_tensor: bool = False

    def bytes(self, shapes: Mapping[str, tuple[int, ...]], embedding: int, element: int) -> float:
        """Bytes of all states for parameters of these shapes, `element` bytes each.

        transformers tells bitsandbytes to keep the `embedding` elements of embeddings in 32 bits.
        """
        if self.factored:
            return element * sum(sum(shape) for shape in shapes.values())
        total = sum(math.prod(shape) for shape in shapes.values())
        if self.eight_bit:
            return self.states * ((total - embedding) * (1 + 4 / 256) + embedding * FLOAT32)
        return self.states * total * element


ADAM = Optimizer()
OPTIMIZERS = {
    "adamw_torch": Optimizer(multi_tensor=True),
    "adamw_torch_fused": ADAM,
    "adamw_apex_fused": ADAM,
    "paged_adamw_32bit": ADAM,
    "adamw_bnb_8bit": Optimizer(eight_bit=True),
    "adamw_8bit": Optimizer(eight_bit=True),
    "paged_adamw_8bit": Optimizer(eight_bit=True),
    "lion_32bit": Optimizer(states=1),
    "paged_lion_32bit": Optimizer(states=1),
    "lion_8bit": Optimizer(states=1, eight_bit=True),
    "paged_lion_8bit": Optimizer(states=1, eight_bit=True),
    "rmsprop": Optimizer(states=1, multi_tensor=True),
    "adagrad": Optimizer(states=1, multi_tensor=True),
    "sgd": Optimizer(states=0, multi_tensor=True),
    "adafactor": Optimizer(states=1, factored=True),
}


@dataclass(frozen=True)
class Training:
    """One training, as far as its memory goes.

    Args:
        model: the policy.
        reference: the reference model, or None where none is loaded.
        reference_sequences: in a batch of the pass that computes the reference's log-probabilities before the first
            step, after which a loaded reference is let go; 0 where there is no such pass.
        adapter: LoRA's, or None for full fine-tuning.
        engine, optimizer: see there.
        half: whether training runs in bf16 or fp16.
        pure: whether trained weights stay in the checkpoint's dtype (`pure_bf16`).
        linear_bytes: bytes per element of quantized linear layers, or None.
        checkpointing: whether only the inputs of the layers are kept, and the rest is computed again.
        attention: `sdpa`, `fa2` or `eager`.
        sequences: in a micro-batch: two per pair.
        length: tokens per sequence, padding included.
        answer: tokens of an answer, which are those that the language-model head runs on.
        chunk: the most logits that the head computes at once; infinite where it computes all.
    """

    model: ModelShape
    reference: ModelShape | None
    reference_sequences: int
    adapter: Adapter | None
    engine: Engine
    optimizer: Optimizer
    half: bool
    pure: bool
    linear_bytes: float | None
    checkpointing: bool
    attention: str
    sequences: int
    length: int
    answer: int
    chunk: float

    @property
    def holds_reference(self) -> bool:
        """Whether a reference model is held while the policy trains."""
        return self.reference is not None and not self.reference_sequences

    @property
    def scored(self) -> int:
        """Token positions of a micro-batch whose logits are computed."""
        return self.sequences * self.answer

    @property
    def chunked(self) -> bool:
        """Whether the head runs on several chunks, each computed again in the backward pass."""
        return self.scored * self.model.vocabulary > self.chunk

    @property
    def positions(self) -> int:
        """Token positions of a micro-batch."""
        return self.sequences * self.length

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return self.adapter.parameters if self.adapter else self.model.parameters

    @property
    def autocast(self) -> bool:
        """Whether torch rounds to half precision at each operation; otherwise the tensors already have their dtype."""
        return self.half and not self.pure and self.engine.compute_bytes is None

    @property
    def frozen_bytes(self) -> int:
        """Bytes per element of weights that are not trained: the engine's dtype, else as loaded."""
        return self.engine.compute_bytes or self.model.dtype_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes per element of trained weights. LLaMA-Factory makes them float32, but for `pure_bf16`; DeepSpeed then
        converts them, except LoRA's matrices under ZeRO-3. PEFT makes those float32 even under `pure_bf16`."""
        stage, converted = self.engine.zero_stage, self.engine.compute_bytes
        if stage is not None and converted and not (self.adapter and stage == 3):
            return converted
        return self.model.dtype_bytes if self.pure and not self.adapter else FLOAT32

    @property
    def gradient_bytes(self) -> int:
        if self.engine.zero_stage is not None and self.engine.compute_bytes:
            return self.engine.compute_bytes
        return self.trained_bytes


def memory_parts(training: Training) -> dict[str, float]:
    """Bytes per GPU by part; their sum is the peak.

    Activations and logits are those of the moment when the loss is computed. Where another moment needs more beside
    the model states (see `other_moments`), the excess is a part of its own.
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
    """Bytes per GPU of weights, gradients, optimizer states and reference model while training, wherever they lie.

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
    """Those of `model_states` that are not offloaded."""
    states, engine = model_states(training), training.engine
    if engine.offload_optimizer:
        states |= {"gradients": 0.0, "optimizer states": 0.0}
    if engine.offload_parameters:
        states |= {"weights": 0.0, "reference model": 0.0}
    return states


def _frozen_weights(model: ModelShape, element: int, linear: float | None) -> float:
    quantized = model.linear_parameters if linear is not None else 0
    return (model.parameters - quantized) * element + quantized * (linear or 0)


def _optimizer_states(training: Training) -> float:
    if training.engine.zero_stage is not None:
        # DeepSpeed's optimizer sees one flat float32 vector: no matrix to factor, no embedding to except.
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
    """Bytes per GPU of a reference model, held or let go after its pass, wherever it lies."""
    reference = training.reference
    return 0.0 if reference is None else _reference_weights(training, reference) / training.engine.weight_shards


def _reference_weights(training: Training, reference: ModelShape) -> float:
    """The reference at the policy's precision: see `reference.match_precision`, which spares linear layers that
    autocast rounds anyway, and leaves a reference alone whose policy has other names (LoRA's)."""
    if training.engine.zero_stage is not None and training.engine.compute_bytes:
        return reference.parameters * training.engine.compute_bytes
    if training.adapter:
        return reference.parameters * reference.dtype_bytes
    spared = 0
    sharded = training.engine.weight_shards > 1  # FSDP, which needs one dtype: none is spared
    if training.half and not training.pure and not sharded and reference.dtype_bytes == FLOAT16:
        # A tied head is the embedding's parameter, which is converted.
        spared = reference.linear_parameters + (0 if reference.tied else reference.head)
    return spared * FLOAT16 + (reference.parameters - spared) * training.trained_bytes


def logits_bytes(training: Training) -> float:
    """The peak of logits and log-probabilities over the vocabulary in `logps.response_logps`.

    Three float32 tensors of shape (tokens of a chunk, vocabulary) at once, in the backward pass of the log-softmax: its
    output, its gradient and that of its input. Or, where the head computes all logits and the reference is scored in
    every step: its logits and their log-softmax beside the policy's, which waits for its backward pass.
    """
    return 3 * FLOAT32 * _logits_at_once(training, training.sequences)


def _logits_at_once(training: Training, sequences: int) -> float:
    """Elements of the logits that are computed at once for so many sequences.

    Equal chunks may be smaller, but then a batch with shorter answers may fill one.
    """
    return min(training.chunk, sequences * training.answer * training.model.vocabulary)


def activation_bytes(training: Training) -> float:
    """What the policy's forward pass keeps for the backward pass, weights that it rounds included.

    With gradient checkpointing, of each layer only its input.
    """
    model = training.model
    residual, compute, _ = _activation_dtypes(training)
    layer = model.hidden * residual if training.checkpointing else layer_activations(training)
    last = model.hidden * (FLOAT32 if training.adapter else FLOAT32 + residual)
    head = residual if training.chunked else 0 if training.adapter else compute
    rounded = _rounded_weights(training)
    kept = (0 if training.chunked else rounded["head"]) + (0 if training.checkpointing else rounded["layers"])
    return training.positions * (model.layers * layer + last) + training.scored * model.hidden * head + kept


def other_moments(training: Training) -> dict[str, float]:
    """Bytes beside the model states at the moments that may need more than that of the loss."""
    rounded = _rounded_weights(training)
    # Before and after the head has run, or between its chunks, its rounded weights are not there.
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
    return moments


def head_gradient_bytes(training: Training) -> float:
    """Bytes beside the activations while the gradient of the head's weights is computed.

    Autocast converts it to float32 in the end. With chunks there are the gradient of those before, a chunk's, and the
    sum of both or the rounded weights; or the gradient of those before beside the chunk's log-softmax.
    """
    _, compute, _ = _activation_dtypes(training)
    gradient, of_logits = compute * training.model.head, compute * _logits_at_once(training, training.sequences)
    if training.chunked:
        rounded = _rounded_weights(training)["head"]
        return gradient + max(2 * gradient, gradient + rounded + of_logits, rounded + logits_bytes(training))
    return gradient + (FLOAT32 * training.model.head if training.autocast else of_logits)


def forward_end_bytes(training: Training) -> float:
    """Bytes beside the activations at the first chunk: the last norm's output, logits and log-softmax in float32.

    Autocast's copies of all trained weights are still there, whether or not the backward pass needs them.
    """
    residual, _, _ = _activation_dtypes(training)
    rounded = _rounded_weights(training)
    cached = rounded["head"] + (0 if training.adapter else rounded["layers"])
    output = training.positions * training.model.hidden * residual
    return output + 2 * FLOAT32 * _logits_at_once(training, training.sequences) + cached


def recomputed_layer_bytes(training: Training) -> float:
    """Bytes beside the activations while a layer is computed again and differentiated."""
    model, adapter = training.model, training.adapter
    residual, compute, _ = _activation_dtypes(training)
    # What autograd keeps, and the gradient that arrives.
    position = layer_activations(training) + model.hidden * residual
    if adapter is not None and training.autocast:
        # At the widest input, PEFT's copy in LoRA's dtype, and outputs of the matrix and of LoRA's before they are one.
        columns, rows = max(adapter.targets)
        position += training.trained_bytes * columns + 3 * compute * rows
    # A tied head's gradient waits for that of the embedding.
    waiting = model.head * training.trained_bytes if model.tied and adapter is None else 0
    return training.positions * position + _rounded_weights(training)["layers"] / model.layers + waiting


def reference_pass_bytes(training: Training) -> float:
    """Bytes beside the model states while the reference's log-probabilities are computed before the first step.

    A pass without gradient: one layer at a time, then logits and log-softmax of a chunk.
    """
    model, rounded = training.model, _rounded_weights(training)
    residual, _, _ = _activation_dtypes(training)
    positions = training.reference_sequences * training.length
    stream = positions * model.hidden * residual
    if training.reference is not None or training.adapter is not None:
        rounded = {"layers": 0.0, "head": 0.0}  # autocast keeps those of trained weights only
    scores = FLOAT32 * model.heads * training.length if training.attention == "eager" else 0  # before their softmax
    widest = max(_attention_activations(training) + scores, _mlp_activations(training))
    # Beside the embeddings: the layer's input, the residual and the norm's output, then only the last norm's output.
    layer = 4 * stream + positions * widest
    logits = 2 * stream + 2 * FLOAT32 * _logits_at_once(training, training.reference_sequences) + rounded["head"]
    loaded = 0.0 if training.engine.offload_parameters else reference_bytes(training)
    return loaded + max(layer, logits) + rounded["layers"] - _later_states(training)


def _later_states(training: Training) -> float:
    """Bytes per GPU of gradients and optimizer states that do not exist before the first step.

    DeepSpeed makes its float32 copy of the weights at once, and ZeRO-3 the gradients' buffer; its optimizer, too, has
    no states before its first step.
    """
    states, engine = states_on_gpu(training), training.engine
    later = states["gradients"] + states["optimizer states"]
    if engine.zero_stage is not None and not engine.offload_optimizer:
        later -= FLOAT32 * training.trained / engine.optimizer_shards
        later -= states["gradients"] if engine.zero_stage == 3 else 0
    return later


def _activation_dtypes(training: Training) -> tuple[int, int, int]:
    """Bytes per element of the residual stream, of what the matrix products see, and of LoRA's inputs."""
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

    The counting of Korthikanti et al. (arXiv 2205.05198, section 4.1) for Llama's layer: RMSNorm (which computes in
    float32), rotary embeddings, SDPA or flash attention (nothing of the size of length^2), gated MLP, no dropout.
    Older layers, without the gate, keep less.
    """
    model = training.model
    residual, compute, adapted = _activation_dtypes(training)
    attention, mlp = _attention_activations(training), _mlp_activations(training)
    if training.adapter is None:
        # Per norm its input in float32 and the normalized vector, for the gradient of the norm's weight.
        norms = 2 * model.hidden * (FLOAT32 + residual)
        # The input of the matrix products: autocast rounds it anew for each of the five that follow a norm.
        rounded = 5 * compute if residual != compute else 2 * compute
        return norms + rounded * model.hidden + attention + mlp + compute * model.intermediate

    # Frozen norms and matrices need no input for a gradient of theirs; LoRA's do.
    norms = 2 * model.hidden * FLOAT32
    targets = training.adapter.targets
    if training.autocast or adapted != residual:  # a copy for each target, in LoRA's dtype
        inputs = adapted * sum(columns for columns, _ in targets) / model.layers
    else:
        inputs = adapted * (2 * model.hidden + model.intermediate)
    inputs += adapted * training.adapter.rank * len(targets) / model.layers
    return norms + attention + mlp + inputs


def _attention_activations(training: Training) -> float:
    model = training.model
    _, compute, _ = _activation_dtypes(training)
    # SDPA is given a padding mask and then repeats keys and values to the number of heads.
    kv_heads = model.kv_heads if training.attention == "fa2" else model.heads
    kept = compute * 2 * (model.heads + kv_heads) * model.head_dim  # query, key, value, output
    kept += FLOAT32 * model.heads  # log of the softmax's denominator
    if training.attention == "eager":  # the softmax in float32, and rounded for the product with the values
        kept += model.heads * training.length * (FLOAT32 + (compute if compute < FLOAT32 else 0))
    return kept


def _mlp_activations(training: Training) -> float:
    _, compute, _ = _activation_dtypes(training)
    return compute * 3 * training.model.intermediate  # gate, its SiLU, up


def optimizer_step_bytes(training: Training) -> float:
    """Temporaries of the step: ZeRO converts the gradients of its part to float32, torch's foreach copies a state."""
    engine = training.engine
    if engine.offload_optimizer:
        return 0.0
    part = training.trained / engine.optimizer_shards
    gradients = FLOAT32 if engine.zero_stage is not None and training.gradient_bytes != FLOAT32 else 0
    return part * (gradients + (FLOAT32 if training.optimizer.multi_tensor else 0))


def buffer_bytes(training: Training) -> float:
    """Copies of weights and gradients that exist beside them: gathered, dequantized, or being reduced."""
    model, engine = training.model, training.engine
    total = float(engine.gathered * training.frozen_bytes)
    if engine.weight_shards > 1 and training.reference is not None and training.holds_reference:
        total += training.reference.largest_layer * training.frozen_bytes
    total += engine.reduce_buckets * min(engine.reduce_bucket, training.trained) * training.gradient_bytes
    if training.linear_bytes is not None:
        total += max(math.prod(model.shapes[f"{name}.weight"]) for name in model.linear) * FLOAT16
    return total


def _rounded_weights(training: Training) -> dict[str, float]:
    """Bytes of the copies in half precision that autocast makes of float32 matrices, for the backward pass."""
    model = training.model
    stored = training.frozen_bytes if training.adapter else training.trained_bytes
    if not training.autocast or stored != FLOAT32:
        return {"layers": 0.0, "head": 0.0}
    quantized = training.linear_bytes is not None
    return {"layers": 0.0 if quantized else FLOAT16 * model.linear_parameters, "head": float(FLOAT16 * model.head)}
