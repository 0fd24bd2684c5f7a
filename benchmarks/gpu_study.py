"""Stage `study`: the smallest that says something. DPO and MinorDPO at a learning rate that is too high for DPO.

A small model learns to solve arithmetic problems on the spot; then each loss is trained on pairs of a right and a
corrupted solution, as `make demo` does with SmolLM2-135M, and watched for degeneration.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_runs import DEVICE, Trainings, losses, make_model, make_tokenizer

from llamafactory_ext.data.corruption import make_pair
from llamafactory_ext.training.monitors import DEGENERATING

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))
from problems import generate

SHAPE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
SHAPE |= {"intermediate_size": 1536, "max_position_embeddings": 1024, "tie_word_embeddings": True}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!:+-*/=()'$\n"
PER_TOKEN = "normalized_rewards/chosen_per_token"


def measure(record: Any, folder: Path, rehearse: bool) -> None:
    solved, pairs, steps, watched = (16, 8, 2, 2) if rehearse else (4096, 512, 250, 40)
    tokenizer = make_tokenizer(LETTERS)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2} if rehearse else {}
    shape = SHAPE | small | {"vocab_size": len(tokenizer)}
    model = make_model(folder / "untrained", shape, dtype=torch.float32, tokenizer=tokenizer)
    data = make_data(folder / "data", solved, pairs)
    settings = {"bf16": DEVICE == "cuda", "optim": "adamw_torch", "per_device_train_batch_size": 2 if rehearse else 16}
    settings |= {"disable_gradient_checkpointing": True}

    learn = Trainings(model, data, folder, settings)
    taught = {"stage": "sft", "dataset": "problems", "learning_rate": 1e-3, "max_steps": steps, "output": "taught"}
    learned = losses(learn(stock=True, save_strategy="steps", save_steps=steps, save_only_model=True, **taught))
    record("the model's loss on solutions, after learning them", learned[-1], "nats a token")

    train = Trainings(folder / "taught" / f"checkpoint-{steps}", data, folder, settings)
    ends = {}
    for loss in ("sigmoid", "minor_dpo"):
        with record.going_on(loss):
            logs = [log for log in train(pref_loss=loss, learning_rate=1e-4, max_steps=watched) if "loss" in log]
            ends[loss] = logs[-1][PER_TOKEN]
            record(f"{loss}: chosen log-ratio at the end", ends[loss], "nats a token")
            record(f"{loss}: steps that are flagged as degenerating", int(sum(log[DEGENERATING] for log in logs)))
    if len(ends) == 2:
        at_least, apart = None if rehearse else 0.0, ends["minor_dpo"] - ends["sigmoid"]
        record("MinorDPO's chosen log-ratio above DPO's", apart, "nats a token", at_least=at_least)


def make_data(folder: Path, solved: int, pairs: int) -> Path:
    """`problems` with their solutions, and `pairs` of other problems."""
    folder.mkdir()
    problems, draw = generate(0), random.Random(0)
    rows = {"problems": [], "pairs": []}
    for problem in problems:
        if len(rows["problems"]) < solved:
            rows["problems"].append({"instruction": problem.question, "input": "", "output": problem.solution})
        elif (pair := make_pair(problem, draw, prompt="")) is not None:
            rows["pairs"].append({"input": "", **pair})
        if len(rows["pairs"]) == pairs:
            break
    columns = {"prompt": "instruction", "query": "input"}
    ranking = {"ranking": True, "columns": columns | {"chosen": "chosen", "rejected": "rejected"}}
    about = {"problems": {"columns": columns | {"response": "output"}}, "pairs": ranking}
    for name in rows:
        about[name] |= {"file_name": f"{name}.jsonl"}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")
    return folder
