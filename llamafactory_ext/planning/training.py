"""The parts of a training that determine its memory: models, adapter, engine, optimizer, micro-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .engine import FLOAT32, Engine
from .model_shape import Adapter, ModelShape

# bitsandbytes' NF4 stores half a byte per weight and a scale per 64 weights. Double quantization keeps the scales in
# one byte each, with a float32 scale per 256 of them (QLoRA, arXiv 2305.14314, section 3).
NF4 = 0.5 + 4 / 64
NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8 = 1.0


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps per trained parameter.

    Args:
        states: tensors of the parameter's shape and dtype.
        eight_bit: whether each state takes a byte and a float32 scale per 256 elements (bitsandbytes).
        factored: whether a matrix has a state per row and per column instead of one per element (Adafactor).
        multi_tensor: whether a step makes a temporary copy of all parameters at once (torch's foreach).
    """

    states: int = 2
    eight_bit: bool = False
    factored: bool = False
    multi_tensor: bool = False

    def bytes(self, shapes: Mapping[str, tuple[int, ...]], embedding: int, element: int) -> float:
        """Bytes of all states for parameters of these shapes, `element` bytes each.

        transformers makes bitsandbytes keep the states of the `embedding` elements in 32 bits.
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
    """What determines the memory of a training.

    Args:
        model: the policy.
        reference: the reference model, or None if none is loaded.
        reference_sequences: sequences in a batch that precomputes the reference's log-probabilities before the first
            step, after which a loaded reference is freed; 0 if they are not precomputed.
        augmented_sequences: sequences in a batch that scores the augmented pairs of a refinement term, without
            gradients, before each step; 0 without such a term.
        augmented_length: tokens of such a sequence, with padding.
        adapter: LoRA's, or None for full fine-tuning.
        engine: how the training is distributed.
        optimizer: what its states take.
        half: whether training runs in bf16 or fp16.
        pure: whether trained weights keep the checkpoint's dtype (`pure_bf16`).
        linear_bytes: bytes per element of quantized linear layers, or None.
        checkpointing: whether gradient checkpointing is on.
        attention: `sdpa`, `fa2` or `eager`.
        sequences: sequences in a micro-batch, two per pair.
        length: tokens per sequence, with padding.
        response: tokens of a response; the language-model head runs on these only.
        chunk: the most logits that the head computes at once; infinite if it computes all.
    """

    model: ModelShape
    reference: ModelShape | None
    reference_sequences: int
    augmented_sequences: int
    augmented_length: int
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
    response: int
    chunk: float

    @property
    def holds_reference(self) -> bool:
        """Whether a reference model is held while the policy trains."""
        return self.reference is not None and not self.reference_sequences

    @property
    def scored(self) -> int:
        """Token positions of a micro-batch whose logits are computed."""
        return self.sequences * self.response

    @property
    def chunked(self) -> bool:
        """Whether the head runs on several chunks, each recomputed in the backward pass."""
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
        """Whether autocast rounds to half precision at each operation; otherwise tensors already have that dtype."""
        return self.half and not self.pure and self.engine.compute_bytes is None

    @property
    def frozen_bytes(self) -> int:
        """Bytes per element of frozen weights: of the engine's dtype, else of the checkpoint's."""
        return self.engine.compute_bytes or self.model.dtype_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes per element of trained weights. LLaMA-Factory makes them float32, except with `pure_bf16`; DeepSpeed
        converts them, except LoRA's matrices under ZeRO-3. PEFT makes these float32 even with `pure_bf16`."""
        stage, converted = self.engine.zero_stage, self.engine.compute_bytes
        if stage is not None and converted and not (self.adapter and stage == 3):
            return converted
        return self.model.dtype_bytes if self.pure and not self.adapter else FLOAT32

    @property
    def gradient_bytes(self) -> int:
        """Bytes per element of gradients."""
        if self.engine.zero_stage is not None and self.engine.compute_bytes:
            return self.engine.compute_bytes
        return self.trained_bytes
