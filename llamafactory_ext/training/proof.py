"""Whether prefix sharing gives a model's own numbers: tried on made-up pairs before the first step.

A model may treat positions, masks or windows in a way of its own, and no list of families keeps up with new ones. So a
few pairs are scored in both layouts by the model as it is trained: wrapped, quantized, with adapters, in its precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX

from .layout import Batch, Layout, padded, shared_prefix

if TYPE_CHECKING:
    from torch import Tensor


# Tokens of the prompt, of what both responses begin with, and of the rest of the chosen and the rejected one: a long
# shared prefix, long tails, hardly a prefix, and a response that the other one begins with.
SHAPES = ((37, 12, 9, 23), (3, 2, 30, 4), (21, 0, 1, 17), (8, 25, 0, 6))
LONGEST = max(sum(shape[:2]) + max(shape[2:]) for shape in SHAPES)
SHORTEST = 16  # of a window: in less, the pairs have no room to differ
ROUNDING = 2  # times the precision's unit: families that share exactly stay below a tenth of it in bfloat16
LEAST = 1e-4  # nats: what many layers of float32 may add up to
MOST = 0.1  # of a log-probability: a model that is as noisy as this proves nothing


@dataclass(frozen=True)
class Proof:
    """Log-probabilities of the tokens of made-up pairs, in nats.

    Args:
        deviation: the largest difference between a row per response and prefix trees, of any token.
        noise: the largest difference between two ways to batch a row per response.
        drawn: the largest difference between the same rows twice, in the mode of training.
        scale: the largest log-probability, without its sign.
        epsilon: the unit of rounding of the model's precision.
    """

    deviation: float
    noise: float
    drawn: float
    scale: float
    epsilon: float

    @property
    def allowance(self) -> float:
        return min(3 * self.noise, MOST * self.scale) + max(ROUNDING * self.epsilon * self.scale, LEAST)

    @property
    def is_random(self) -> bool:
        """Whether training draws numbers (dropout, jitter), of which both responses would share those of the prefix."""
        return not self.drawn <= self.allowance  # also if one of them is NaN

    @property
    def holds(self) -> bool:
        return self.deviation <= self.allowance and not self.is_random


def prove(
    score: Callable[[Layout], Tensor],
    score_in_training: Callable[[Layout], Tensor],
    tokens: Sequence[int],
    *,
    attention: str,
    device: torch.device,
    dtype: torch.dtype,
    window: int | None = None,
) -> Proof:
    """Score made-up pairs in both layouts, and once more in other batches.

    Args:
        score: the log-probabilities that the model gives a layout's tokens, as `logps.token_logps`, without dropout.
        score_in_training: the same in the mode of training.
        tokens: ids of ordinary tokens, which the model treats as text.
        attention: the model's implementation, as for `shared_prefix`.
        device: of the model's inputs.
        dtype: in which it computes.
        window: the longest sequence that it may be given; None: any.
    """
    batch = made_up_pairs(tokens, device, window)
    pairs = len(SHAPES)
    turned = torch.cat([torch.arange(pairs).flip(0), pairs + torch.arange(pairs).flip(0)])
    # Not compiled, if it is a compiled model: that would take minutes.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        rows = score(padded(batch)).double().cpu()
        length = rows.shape[1]
        trees, reordered, alone = (
            _of_length(score(layout).double().cpu(), length)
            for layout in (shared_prefix(batch, attention), padded(_reordered(batch, turned)), padded(_pair(batch, 0)))
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            once, twice = (score_in_training(padded(_pair(batch, 0))).double().cpu() for _ in range(2))
    noise = torch.cat([(rows[turned] - reordered).flatten(), (rows[[0, pairs]] - alone).flatten()]).abs().max()
    return Proof(
        deviation=(rows - trees).abs().max().item(),
        noise=noise.item(),
        drawn=(once - twice).abs().max().item(),
        scale=rows.abs().max().item(),
        epsilon=torch.finfo(dtype).eps,
    )


def _of_length(rows: Tensor, length: int) -> Tensor:
    """Rows of another layout, which ends elsewhere; beyond a response's end there are zeros."""
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]))


def made_up_pairs(tokens: Sequence[int], device: torch.device, window: int | None = None) -> Batch:
    """Pairs of random tokens as LLaMA-Factory's collator makes them: padded on the right, chosen ones first.

    Args:
        tokens: the ids to choose from.
        device: of the batch.
        window: the longest sequence; None: any.
    """
    draw = torch.Generator().manual_seed(0)
    pool = torch.tensor(tokens)

    def text(length: int) -> list[int]:
        drawn: list[int] = pool[torch.randint(len(pool), (length,), generator=draw)].tolist()
        return drawn

    sides: tuple[list[Any], list[Any]] = ([], [])
    for prompt_length, common_length, *tails in (_within(shape, window) for shape in SHAPES):
        prompt, common = text(prompt_length), text(common_length)
        for side, tail in zip(sides, tails, strict=True):
            side.append((prompt, [*common, *text(tail)]))
    rows = [*sides[0], *sides[1]]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in rows:
        fill = length - len(prompt) - len(response)
        columns["input_ids"].append([*prompt, *response, *[tokens[0]] * fill])
        columns["attention_mask"].append([1] * (length - fill) + [0] * fill)
        columns["labels"].append([IGNORE_INDEX] * len(prompt) + response + [IGNORE_INDEX] * fill)
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def _within(shape: tuple[int, int, int, int], window: int | None) -> tuple[int, int, int, int]:
    """The shape, made shorter where it does not fit a window; the longest part keeps most."""
    if window is None or window >= LONGEST:
        return shape
    prompt, common, chosen, rejected = (math.floor(part * window / LONGEST) for part in shape)
    return max(prompt, 1), common, chosen, max(rejected, 1)


def _reordered(batch: Batch, order: Tensor) -> Batch:
    """The rows in another order, with eight columns of padding more."""
    padding = {"input_ids": int(batch["input_ids"][0, 0]), "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: torch.nn.functional.pad(values[order.to(values.device)], (0, 8), value=padding[name])
        for name, values in batch.items()
    }


def _pair(batch: Batch, number: int) -> Batch:
    pairs = len(batch["labels"]) // 2
    return {name: values[[number, pairs + number]] for name, values in batch.items()}
