"""Stage `large`: Qwen1.5-7B's shape, LoRA and in full, with pairs as long as GSM8K's, and what `plan` says of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from gpu_runs import DEVICE, GSM8K, SHORT, TINY, make_model
from gpu_speed import PAIRS, Comparison, trainings
from training_runs import QWEN_7B

LORA = {"finetuning_type": "lora", "lora_rank": 16, "bf16": True, "optim": "adamw_torch"}
# Adafactor's states are small; those of 8-bit Adam take two bytes a weight.
OPTIMIZER = "adamw_8bit" if importlib.util.find_spec("bitsandbytes") and DEVICE == "cuda" else "adafactor"
FULL = {"finetuning_type": "full", "bf16": True, "optim": OPTIMIZER}


def measure(record: Any, folder: Path, rehearse: bool) -> None:
    name, shape = ("tiny", TINY) if rehearse else ("7B", QWEN_7B)
    lengths, sizes, pairs = (SHORT, (1, 2), 2) if rehearse else (GSM8K, (4, 16), PAIRS)
    model = make_model(folder / name, shape)
    with record.going_on(f"{name}, LoRA"):
        compared = Comparison(record, f"{name}, LoRA", trainings(folder / "lora", model, lengths, pairs, LORA), pairs)
        runs = compared(sizes, goals=not rehearse, refined=True)
        if runs:
            compared.plan(*next(iter(runs.items())))
    with record.going_on(f"{name}, full"):
        pure = {} if rehearse else {"pure_bf16": True}  # float32 weights and states would take 123 GB
        train = trainings(folder / "full", model, lengths, pairs, FULL | pure)
        Comparison(record, f"{name}, full, {OPTIMIZER}", train, pairs)(sizes[:1], goals=False)
