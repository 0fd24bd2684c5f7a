"""What a training costs in GPU hours, by counting multiplications.

A forward pass over a sequence of s tokens multiplies each weight of the linear layers once per token, and compares each
token with those before it:

    F(s) = 2 s P + 2 s^2 L d     floating-point operations

P are the weights of the linear layers and of the head, L the layers, d the width of all attention heads together. A
backward pass costs 2 F where weights are trained, F where only an adapter is, and another F where activations are
computed again (gradient checkpointing). Prefix sharing computes less, padding more.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_shape import ModelShape

# Dense bfloat16 of one GPU in 10^12 operations a second, by the vendors' data sheets.
PEAK = {"a100": 312.0, "h100": 989.0, "h200": 989.0, "l40s": 362.0, "rtx4090": 165.0}
UTILIZATION = 0.4  # of the peak, in training: an assumption, which runs on few GPUs exceed and large models miss
SECONDS = 3600.0


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Args:
        name: one of `PEAK`.
        utilization: the share of its peak that a training reaches, above 0 and at most 1.
    """

    name: str
    utilization: float

    def hours(self, operations: float) -> float:
        """The hours of one GPU that so many operations take."""
        return operations / (PEAK[self.name] * 1e12 * self.utilization) / SECONDS


def forward(model: ModelShape, tokens: int) -> float:
    """F(s), the operations of a forward pass over one sequence of `tokens`."""
    weights = model.matrix_parameters + model.head
    return 2.0 * tokens * weights + 2.0 * tokens**2 * model.layers * model.heads * model.head_dim


def training_operations(
    model: ModelShape, pairs: int, tokens: int, *, full: bool, checkpointing: bool, refined: bool
) -> float:
    """The operations of a training, without its reference.

    Args:
        model: what is trained.
        pairs: of all steps: a pair counts once per epoch.
        tokens: of one sequence, prompt and response.
        full: whether weights are trained; else an adapter is.
        checkpointing: whether activations are computed again.
        refined: whether a refinement term runs the policy on augmented pairs, too (arXiv 2405.21040, Algorithm 1).
    """
    passes = 1 + (2 if full else 1) + checkpointing + refined
    return 2.0 * pairs * passes * forward(model, tokens)


def reference_operations(model: ModelShape, pairs: int, tokens: int, *, refined: bool) -> float:
    """The operations of the reference, which sees each pair once, and its augmented pair once."""
    return 2.0 * pairs * (1 + refined) * forward(model, tokens)
