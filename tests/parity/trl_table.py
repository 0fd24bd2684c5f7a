"""TRL's side of `make test-trl`, in TRL's environment: its own losses and gradients for every case, as JSON.

    .venv-trl/bin/python tests/parity/trl_table.py table.json

What runs is `DPOTrainer._compute_loss` of the installed TRL, on batches of its own collator. Only the models are made
up: they answer with log-probabilities of a table.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before trl is imported

import torch
import trl
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl_cases import CASES, PADDING, TABLES, Case, Pair, Response, batches


class TableModel(torch.nn.Module):
    """Answers as a model with TRL's fused head does: 0 at positions whose label is no token of a response.

    Args:
        rows: for each row of a batch, one-dimensional tensors by the name of an output, a number per scored token.
    """

    is_gradient_checkpointing = False

    def __init__(self, rows: list[dict[str, Tensor]]):
        super().__init__()
        self.rows = rows

    def forward(self, labels: Tensor, **_: Any) -> SimpleNamespace:
        is_scored = labels[:, 1:] != -100
        zeros = torch.zeros(is_scored.shape, dtype=self.rows[0]["log_probs"].dtype)
        outputs: dict[str, Any] = {
            name: zeros.masked_scatter(is_scored, torch.cat([row[name] for row in self.rows])) for name in self.rows[0]
        }
        for only_logged in ("entropy", "mean_logits"):
            outputs[only_logged] = zeros
        return SimpleNamespace(**outputs, is_top1=torch.zeros_like(is_scored))


class AloneAccelerator:
    """One process: what is gathered is what was given."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


def config_of(folder: str, **settings: Any) -> trl.DPOConfig:
    return trl.DPOConfig(folder, use_cpu=True, bf16=False, report_to="none", **settings)


def trainer_of(config: trl.DPOConfig, model: TableModel, reference: TableModel) -> DPOTrainer:
    """A trainer with what `_compute_loss` reads, set as `DPOTrainer.__init__` sets it."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.model, trainer.ref_model, trainer.args = model, reference, config
    trainer.accelerator = AloneAccelerator()
    trainer.aux_loss_enabled = False
    trainer.precompute_ref_logps = False  # so that its own lines sum the reference's, too
    trainer.loss_types = config.loss_type
    trainer.loss_weights = config.loss_weights or [1.0] * len(config.loss_type)
    for same in (
        "beta",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "label_smoothing",
        "use_weighting",
    ):
        setattr(trainer, same, getattr(config, same))
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return trainer


def example(pair: Pair) -> dict[str, list[int]]:
    """As TRL's collator takes a pair."""
    return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair.tokens(), strict=True))


def rows_of(responses: list[Response], dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The policy's rows, whose log-probabilities take gradients, and the reference's."""
    policy = [
        {
            "log_probs": torch.tensor(response.policy, dtype=dtype, requires_grad=True),
            "log_sum_sq_probs": torch.tensor(response.log_sum_sq, dtype=dtype),
        }
        for response in responses
    ]
    return policy, [{"log_probs": torch.tensor(response.reference, dtype=dtype)} for response in responses]


def compute(config: trl.DPOConfig, pairs: list[Pair], dtype: torch.dtype) -> dict[str, Any]:
    """TRL's loss of a batch, and its gradients with respect to each token's log-probability; or how it fails."""
    policy, reference = rows_of([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], dtype)
    model = TableModel(policy)
    trainer = trainer_of(config, model, TableModel(reference))
    inputs = DataCollatorForPreference(pad_token_id=PADDING)([example(pair) for pair in pairs])
    leaves = [row["log_probs"] for row in policy]
    try:
        loss = trainer._compute_loss(model, inputs, return_outputs=False)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        return {"error": str(error)}
    found = [gradient.tolist() for gradient in gradients]
    return {"loss": loss.item(), "chosen": found[: len(pairs)], "rejected": found[len(pairs) :]}


def computed(case: Case, folder: str) -> dict[str, Any]:
    """A case with TRL's numbers for each batch of its table."""
    config = config_of(folder, loss_type=case.losses, **case.settings)
    dtype = getattr(torch, case.dtype)
    torch.set_default_dtype(dtype)  # of TRL's constants: it makes a tensor of label_smoothing
    table = TABLES[case.table]
    found = [compute(config, [table[index] for index in batch], dtype) for batch in batches(case.table)]
    return asdict(case) | {"batches": found}


def known_losses() -> list[str]:
    """TRL's own list: what it says to a loss that it does not know."""
    row = {"log_probs": torch.zeros(1), "log_sum_sq_probs": torch.zeros(1)}
    model = TableModel([row, row])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(config_of(folder), model, model)
    trainer.loss_types = ["unknown"]
    token = Response([-1.0], [-1.0], [0.5])
    inputs = DataCollatorForPreference(pad_token_id=PADDING)([example(Pair(1, token, token))])
    try:
        trainer._compute_loss(model, inputs, return_outputs=False)
    except ValueError as error:
        return re.findall(r"'(\w+)'", str(error))
    raise RuntimeError("TRL computed a loss of the name 'unknown'")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = {case.name: computed(case, folder) for case in CASES}
    result = {"trl": trl.__version__, "losses": known_losses(), "cases": cases}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
