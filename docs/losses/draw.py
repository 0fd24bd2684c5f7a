"""Draws the curve of every loss's page from the loss itself: python docs/losses/draw.py [LOSS ...]"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes

from llamafactory_ext import PairLogps, get_loss
from llamafactory_ext.losses.lookup import loss_names
from llamafactory_ext.plots import CURVES, new_figure, save

HERE = Path(__file__).parent
BETAS = {"simpo": 2.0, "sigmoid_norm": 5.0}  # their papers'
BETA = 0.1  # of the others
TOKENS = 20  # of a response, where a loss takes means per token


def main() -> None:
    for name in sys.argv[1:] or loss_names():
        figure = new_figure(9.0, 3.4)
        left, right = figure.subplots(1, 2)
        draw(name, left, right)
        save(figure, HERE / f"{name}.png")


def draw(name: str, left: Axes, right: Axes) -> None:
    """The loss, and how hard it pushes each response, along a chosen and along a rejected log-ratio."""
    x = torch.linspace(-60, 60, 481, dtype=torch.float64)
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
    """Loss and gradient at each point: pair by pair, because kto_pair looks at its whole batch."""
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    needs_delta = name in ("sr_dpo", "sr_ipo")
    losses = []
    for winner, loser in zip(chosen, rejected, strict=True):
        zero, length = torch.zeros(1, dtype=winner.dtype), torch.full((1,), float(TOKENS), dtype=winner.dtype)
        delta = torch.ones_like(zero) if needs_delta else None  # as if the augmented margin were 10 nats
        pairs = PairLogps(winner.reshape(1), loser.reshape(1), zero, zero, length, length, delta)
        loss = get_loss(name)
        losses.append(loss(pairs, **{"beta": BETAS.get(name, BETA)} if "beta" in loss.parameters else {}))
    total = torch.cat(losses)
    total.sum().backward()
    gradient = {"chosen": chosen, "rejected": rejected}[side].grad
    return total.detach(), torch.zeros_like(total) if gradient is None else gradient


if __name__ == "__main__":
    main()
