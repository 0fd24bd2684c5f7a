"""Draws the curve of every loss's page from the loss itself: python docs/losses/draw.py [LOSS ...]"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes

from llamafactory_ext import PairLogps, get_loss
from llamafactory_ext.losses.lookup import loss_names
from llamafactory_ext.losses.reference_free import log_of_rest
from llamafactory_ext.plots import CURVES, new_figure, save

HERE = Path(__file__).parent
BETAS = {"simpo": 2.0, "sigmoid_norm": 5.0}  # their papers'
BETA = 0.1  # of the others
TOKENS = 20  # of a response, where a loss depends on them
REACHES = {"squared_po": 4.0}  # in nats: it is too steep for the others'
REACH = 60.0


def main() -> None:
    for name in sys.argv[1:] or loss_names():
        figure = new_figure(9.0, 3.4)
        left, right = figure.subplots(1, 2)
        draw(name, left, right)
        save(figure, HERE / f"{name}.png")


def draw(name: str, left: Axes, right: Axes) -> None:
    """The loss, and how hard it pushes each response, along a chosen and along a rejected log-ratio."""
    reach = REACHES.get(name, REACH)
    x = torch.linspace(-reach, reach, 481, dtype=torch.float64)
    start = 0.0
    label = "log-ratio of the response, the other's at 0 (nats)"
    if not get_loss(name).needs_reference:
        x, start = torch.linspace(-60, -0.5, 481, dtype=torch.float64), -30.0
        label = f"log-probability of its {TOKENS} tokens (nats)"
    for side in ("chosen", "rejected"):
        values = {"chosen": torch.full_like(x, start), "rejected": torch.full_like(x, start), side: x}
        loss, push = along(name, values["chosen"], values["rejected"], side)
        left.plot(x, loss, color=CURVES[side], label=f"along the {side} response")
        right.plot(x, push, color=CURVES[side], label=f"{side} response")
    beta = f", β = {BETAS.get(name, BETA):g}" if "beta" in get_loss(name).parameters else ""
    left.set_title(f"{name}: loss of a pair{beta}")
    right.set_title("gradient with respect to its log-probability")
    for axes in (left, right):
        axes.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        axes.set_xlabel(label)
        axes.legend(frameon=False)
    right.axhline(0, color="0.8", linewidth=0.8, zorder=0)


def along(name: str, chosen: torch.Tensor, rejected: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient at each point: pair by pair, because kto_pair looks at its whole batch.

    What else a loss needs is made up: an augmented margin of 10 nats, scores that differ by e, and a vocabulary of two
    tokens, in which a token of probability p has a logit log(p / (1 - p)) above the other one's.
    """
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss = get_loss(name)
    given = {"beta": BETAS.get(name, BETA)} if "beta" in loss.parameters else {}
    losses = []
    for winner, loser in zip(chosen, rejected, strict=True):
        zero, length = torch.zeros(1, dtype=winner.dtype), torch.full((1,), float(TOKENS), dtype=winner.dtype)
        pairs = PairLogps(
            winner.reshape(1),
            loser.reshape(1),
            zero,
            zero,
            length,
            length,
            refinement=torch.ones_like(zero) if name in ("sr_dpo", "sr_ipo") else None,
            score_gap=zero + math.e if loss.needs_scores else None,
            contrast=-length * log_of_rest(loser.reshape(1) / length) if loss.needs_contrast else None,
        )
        losses.append(loss(pairs, **given))
    total = torch.cat(losses)
    total.sum().backward()
    gradient = {"chosen": chosen, "rejected": rejected}[side].grad
    return total.detach(), torch.zeros_like(total) if gradient is None else gradient


if __name__ == "__main__":
    main()
