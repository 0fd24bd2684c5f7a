"""This package's losses and gradients next to TRL's, for every case.

What runs is `PreferenceTrainer.get_batch_loss_metrics`. Only the models are made up: their logits are of a table.

    python tests/parity/trl_parity.py .venv-trl/bin/python    prints the table
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl_cases import CASES, PADDING, RESPONSE, TABLES, Case, Pair, batches

from llamafactory_ext import get_loss
from llamafactory_ext.losses.divergence import Divergence
from llamafactory_ext.losses.lookup import loss_names
from llamafactory_ext.losses.objective import Objective, Part
from llamafactory_ext.recipe.keys import PREF_BETA
from llamafactory_ext.training.sharing import PrefixSharing
from llamafactory_ext.training.terms import terms_of
from llamafactory_ext.training.trainer import PreferenceTrainer

TOLERANCES = {"float64": 1e-12, "float32": 2e-5}  # of numbers around 1

# Ours by TRL's names.
DIVERGENCES_OF_TRL = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
HYPERPARAMETERS = {"beta", "label_smoothing", "discopop_tau"}

# Cases in which the two differ, and should.
_UNSCORED = "TRL also counts the first token, which without a prompt nothing predicts; ours counts scored tokens"
_UNWEIGHTED = "TRL's `sft` ignores ld_alpha; ours is of the weighted sum, as LLaMA-Factory's pref_ftx"
DEVIATIONS = {
    "sigmoid, beta 0.1, label_smoothing 0.1": "TRL's `sigmoid` ignores label_smoothing; ours, LLaMA-Factory's does not",
    "ipo, beta 0.5, prompts cut off": _UNSCORED,
    "sigmoid_norm, beta 0.5, prompts cut off": _UNSCORED,
    "discopop, beta 1.0, margins of 1e4 nats": "TRL's is NaN far below 0, as 0 times infinity; ours is finite",
    "sigmoid, beta 0.5, f_divergence_type forward_kl, margins of 1e4 nats": (
        "TRL's is infinite far below 0, and its gradient NaN; ours goes on as a straight line from e^15 on"
    ),
    "sigmoid, beta 0.5, f_divergence_type alpha_divergence, f_alpha_divergence_coef 0.5, margins of 1e4 nats, "
    "float32": ("TRL's is constant from e^80 on, and sends no gradient; ours goes on as a straight line from e^15 on"),
    "sft, ld_alpha 0.5": _UNWEIGHTED,
    "sigmoid + sft, beta 0.5, loss_weights [1.0, 0.5], ld_alpha 0.5": _UNWEIGHTED,
    "hinge, beta 0.5, use_weighting True": "TRL fails: it multiplies in place what relu keeps for its gradient",
    "sft, use_weighting True": "TRL fails: it multiplies in place one number that stands for all pairs",
}
# Losses that TRL's DPO trainer does not have.
OURS_ONLY = {
    "minor_dpo": "not in TRL",
    "dpop": "not in TRL",
    "sr_dpo": "not in TRL",
    "sr_ipo": "not in TRL",
    "odpo": "not in TRL",
    "squared_po": "not in TRL",
    "pl_dpo": "not in TRL",
    "minor_sft": "not in TRL",
    "rrhf": "not in TRL",
    "cringe": "not in TRL",
    "kto_pair": "in TRL up to 0.9; its KTO trainer takes responses that are no pairs",
    "orpo": "in TRL's experimental ORPO trainer",
    "simpo": "in TRL's experimental CPO trainer",
}


class TableModel(torch.nn.Module):
    """Answers with logits: at each position that predicts a token of a response, those of a table's distribution.

    Args:
        logps: of each response, its tokens' log-probabilities; one-dimensional.
        shares: of each response, what `Response.share` says.
    """

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=3))

    def __init__(self, logps: list[Tensor], shares: list[Tensor]):
        super().__init__()
        own, share = torch.cat(logps), torch.cat(shares)
        rest = torch.log(-torch.expm1(own))
        self.rows = torch.stack([rest + share.log(), rest + (1 - share).log(), own], dim=-1)  # RESPONSE is the last

    def get_output_embeddings(self) -> None:
        """It has no head."""

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        predicts = torch.nn.functional.pad(input_ids[:, 1:] == RESPONSE, (0, 1))
        zeros = torch.zeros(*input_ids.shape, self.rows.shape[-1], dtype=self.rows.dtype)
        return SimpleNamespace(logits=zeros.index_put(predicts.nonzero(as_tuple=True), self.rows))


def trainer_of(case: Case, model: TableModel, reference: TableModel) -> PreferenceTrainer:
    """A trainer with what `get_batch_loss_metrics` reads, set as the recipe and `PreferenceTrainer.__init__` set it.

    Raises:
        ValueError: if the case has a setting that this does not know.
    """
    settings = dict(case.settings)
    losses = [get_loss(name) for name in case.losses]
    weights = settings.pop("loss_weights", [1.0] * len(losses))
    divergence = Divergence(
        DIVERGENCES_OF_TRL[settings.pop("f_divergence_type", "reverse_kl")],
        settings.pop("f_alpha_divergence_coef", Divergence.alpha),
    )
    is_weighted, ld_alpha = settings.pop("use_weighting", False), settings.pop("ld_alpha", None)
    if unknown := settings.keys() - HYPERPARAMETERS:
        raise ValueError(f"no counterpart of TRL's {sorted(unknown)} is known: say here what it is of ours")
    beta = settings.setdefault("beta", PREF_BETA)
    parts = []
    for loss, weight in zip(losses, weights, strict=True):
        given = {**loss.defaults(), **settings}
        parts.append(Part(loss, {name: given[name] for name in loss.parameters}, weight))
    objective = Objective(tuple(parts), beta, divergence)

    trainer = PreferenceTrainer.__new__(PreferenceTrainer)
    trainer.model, trainer.ref_model, trainer.is_own_reference = model, reference, False
    trainer.beta, trainer.loss_type, trainer.bco_gemma, trainer.ftx_gamma = beta, objective.name, 0.0, 0.0
    trainer.ld_alpha = trainer.reference_ld_alpha = ld_alpha  # with `ld_alpha_reference`, TRL's only way
    trainer.terms = terms_of(objective, is_weighted)
    trainer.sharing = PrefixSharing(wanted=False, is_on=False)
    trainer.finetuning_args = SimpleNamespace(
        objective=objective,
        use_ref_model=objective.needs_reference,
        finetuning_type="full",
        router_loss_weight=0.0,
    )
    return trainer


def collated(pairs: list[Pair]) -> dict[str, Tensor]:
    """As LLaMA-Factory's collator gives pairs: the chosen responses first, padded on the right."""
    tokens = [pair.tokens() for pair in pairs]
    rows = [(prompt, responses[side]) for side in (0, 1) for prompt, *responses in tokens]
    columns = {
        "input_ids": ([prompt + response for prompt, response in rows], PADDING),
        "attention_mask": ([[1] * len(prompt + response) for prompt, response in rows], 0),
        "labels": ([[IGNORE_INDEX] * len(prompt) + response for prompt, response in rows], IGNORE_INDEX),
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        for name, (rows, padding) in columns.items()
    }


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
        loss, of_tokens = ours(case, [TABLES[case.table][index] for index in indices])
        if "error" in found:
            values.append(torch.full_like(loss, torch.nan))
            continue
        expected = torch.tensor([*chain(*found["chosen"], *found["rejected"])], dtype=torch.float64)
        values.append(abs(loss - found["loss"]))
        gradients.append((of_tokens - expected).abs().max())
        sizes += [abs(found["loss"]), expected.abs().max().item()]
    # torch's max, not Python's: NaN stays NaN.
    largest = [torch.stack(each).max().item() if each else torch.nan for each in (values, gradients)]
    return Row(case, *largest, TOLERANCES[case.dtype] * max(size for size in sizes if size == size))


def ours(case: Case, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its gradients with respect to every token, in one row, as float64."""
    dtype = getattr(torch, case.dtype)
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]

    def tensors(name: str) -> list[Tensor]:
        return [torch.tensor(getattr(response, name), dtype=dtype) for response in responses]

    leaves, shares = [logps.requires_grad_() for logps in tensors("policy")], tensors("share")
    model, reference = TableModel(leaves, shares), TableModel(tensors("reference"), shares)
    loss, _ = trainer_of(case, model, reference).get_batch_loss_metrics(model, collated(pairs))
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
    rows = [compare(case, table["cases"][case.name]["batches"]) for case in CASES]
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
