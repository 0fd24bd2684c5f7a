"""This package's losses and gradients next to TRL's, for every case that both have.

python tests/parity/trl_parity.py .venv-trl/bin/python    prints the table
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl_cases import CASES, TABLES, Case, Pair, Response, batches

from llamafactory_ext import PairLogps, get_loss
from llamafactory_ext.losses.lookup import loss_names

TOLERANCES = {"float64": 1e-12, "float32": 2e-5}  # of numbers around 1

# Cases in which the two differ, and should.
_UNSCORED = "TRL also counts the first token, which without a prompt nothing predicts; ours counts scored tokens"
DEVIATIONS = {
    "sigmoid, beta 0.1, label_smoothing 0.1": "TRL's `sigmoid` ignores label_smoothing; ours, LLaMA-Factory's does not",
    "ipo, beta 0.5, prompts cut off": _UNSCORED,
    "sigmoid_norm, beta 0.5, prompts cut off": _UNSCORED,
    "discopop, beta 1.0, margins of 1e4 nats": "TRL's is NaN far below 0, as 0 times infinity; ours is finite",
    "hinge, beta 0.5, use_weighting True": "TRL fails: it multiplies in place what relu keeps for its gradient",
    "sft, use_weighting True": "TRL fails: it multiplies in place one number that stands for all pairs",
}
# Losses that TRL's DPO trainer does not have.
OURS_ONLY = {
    "minor_dpo": "not in TRL",
    "dpop": "not in TRL",
    "sr_dpo": "not in TRL",
    "sr_ipo": "not in TRL",
    "kto_pair": "in TRL up to 0.9; its KTO trainer takes responses that are no pairs",
    "orpo": "in TRL's experimental ORPO trainer",
    "simpo": "in TRL's experimental CPO trainer",
}


@dataclass(frozen=True)
class Tokens:
    """The numbers of a response's scored tokens, shape `(tokens,)` each; `policy` takes gradients."""

    policy: Tensor
    reference: Tensor
    log_sum_sq: Tensor

    @classmethod
    def of(cls, response: Response, dtype: torch.dtype) -> Tokens:
        return cls(
            torch.tensor(response.policy, dtype=dtype, requires_grad=True),
            torch.tensor(response.reference, dtype=dtype),
            torch.tensor(response.log_sum_sq, dtype=dtype),
        )


@dataclass(frozen=True)
class Batch:
    """A batch, token by token, for what does not see sums alone."""

    chosen: list[Tokens]
    rejected: list[Tokens]

    @classmethod
    def of(cls, pairs: list[Pair], dtype: torch.dtype) -> Batch:
        return cls(
            [Tokens.of(pair.chosen, dtype) for pair in pairs], [Tokens.of(pair.rejected, dtype) for pair in pairs]
        )

    def pairs(self) -> PairLogps:
        """As the trainer hands it to a loss."""
        sides = (self.chosen, self.rejected)
        policy = [torch.stack([tokens.policy.sum() for tokens in side]) for side in sides]
        reference = [torch.stack([tokens.reference.sum() for tokens in side]) for side in sides]
        return PairLogps(
            *policy, *reference, *(torch.tensor([len(tokens.policy) for tokens in side]) for side in sides)
        )


def loss_of(case: Case, batch: Batch) -> Tensor:
    """The mean of one loss over the pairs."""
    (name,) = case.losses
    loss = get_loss(name)
    return loss(batch.pairs(), **{key: value for key, value in case.settings.items() if key in loss.parameters}).mean()


# How this package computes a case, by its kind: the mean over a batch. A kind that is not here is not compared.
OURS: dict[str, Callable[[Case, Batch], Tensor]] = {"loss": loss_of}
COMPARED = [case for case in CASES if case.kind in OURS]


@dataclass(frozen=True)
class Row:
    """A case with the largest absolute deviations between TRL's numbers and ours; NaN where either has no number."""

    case: Case
    value: float
    gradient: float
    allowed: float

    @property
    def differs(self) -> bool:
        return not (self.value <= self.allowed and self.gradient <= self.allowed)

    @property
    def verdict(self) -> str:
        reason = DEVIATIONS.get(self.case.name)
        if reason is None:
            return "DIFFERS" if self.differs else "same"
        return f"differs: {reason}" if self.differs else f"SAME, though listed: {reason}"

    @property
    def is_right(self) -> bool:
        return self.differs == (self.case.name in DEVIATIONS)


def compare(case: Case, theirs: list[dict[str, Any]]) -> Row:
    """One case; `theirs` are TRL's numbers of each batch."""
    values, gradients, sizes = [], [], [1.0]
    for indices, found in zip(batches(case.table), theirs, strict=True):
        if "error" in found:
            values.append(torch.tensor(torch.nan, dtype=torch.float64))
            continue
        loss, of_tokens = _ours(case, [TABLES[case.table][index] for index in indices])
        expected = torch.tensor([*chain(*found["chosen"], *found["rejected"])], dtype=torch.float64)
        values.append(abs(loss - found["loss"]))
        gradients.append((of_tokens - expected).abs().max())
        sizes += [abs(found["loss"]), expected.abs().max().item()]
    # torch's max, not Python's: NaN stays NaN.
    largest = [torch.stack(each).max().item() if each else torch.nan for each in (values, gradients)]
    return Row(case, *largest, TOLERANCES[case.dtype] * max(size for size in sizes if size == size))


def _ours(case: Case, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its gradients with respect to every token, in one row, as float64."""
    batch = Batch.of(pairs, getattr(torch, case.dtype))
    loss = OURS[case.kind](case, batch)
    leaves = [tokens.policy for tokens in batch.chosen + batch.rejected]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach().double(), torch.cat(gradients).double()


def trl_table(python: str) -> dict[str, Any]:
    """TRL's numbers, computed in its own environment.

    Args:
        python: the Python of that environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        subprocess.run([python, str(Path(__file__).with_name("trl_table.py")), str(table)], check=True)
        return json.loads(table.read_text(encoding="utf-8"))


def lines(table: dict[str, Any]) -> list[str]:
    """What is printed: a line per case, then what has no counterpart."""
    rows = [compare(case, table["cases"][case.name]["batches"]) for case in COMPARED]
    cells = [("loss", "settings", "value", "gradient", "verdict"), *map(_cells, rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(4)]
    shown = [" | ".join([*(row[at].ljust(widths[at]) for at in range(4)), row[4]]) for row in cells]
    only = [f"{name}: {OURS_ONLY.get(name, 'not in TRL, and NOT LISTED')}" for name in _ours_only(table)]
    title = f"Largest absolute deviation from TRL {table['trl']}, of the loss and of its gradients per token:"
    return [title, "", *shown, "", "Without a counterpart in TRL's DPO trainer:", *only]


def _cells(row: Row) -> tuple[str, ...]:
    losses, _, settings = row.case.name.partition(", ")
    return losses, settings, f"{row.value:.1e}", f"{row.gradient:.1e}", row.verdict


def _ours_only(table: dict[str, Any]) -> list[str]:
    return [name for name in loss_names() if name not in table["losses"]]


if __name__ == "__main__":
    print("\n".join(lines(trl_table(sys.argv[1]))))
