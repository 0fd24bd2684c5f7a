"""Stage `small`: shapes that are trained in full on one GPU, with pairs as long as GSM8K's and of 1,024 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_runs import GSM8K, LONG, QWEN_05B, QWEN_15B, SHORT, TINY, make_model
from gpu_speed import PAIRS, Comparison, trainings


def measure(record: Any, folder: Path, rehearse: bool) -> None:
    shapes = {"tiny": TINY} if rehearse else {"0.5B": QWEN_05B, "1.5B": QWEN_15B}
    lengths = {"short pairs": SHORT} if rehearse else {"GSM8K's lengths": GSM8K, "1,024 tokens": LONG}
    sizes, pairs = ((1, 2), 2) if rehearse else ((2, 8), PAIRS)
    settings = {"bf16": True, "optim": "adamw_torch", "disable_gradient_checkpointing": True}
    for shape_name, shape in shapes.items():
        model = make_model(folder / shape_name, shape)
        for length_name, length in lengths.items():
            name = f"{shape_name}, full, {length_name}"
            with record.going_on(name):
                train = trainings(folder, model, length, pairs, settings)
                Comparison(record, name, train, pairs)(sizes, goals=False)
