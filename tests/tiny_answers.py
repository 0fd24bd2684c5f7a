"""Small data with answers of several turns, and with more than two answers to a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import SUMS

RANKED = {"prompt": "instruction", "answers": "answers", "scores": "scores"}
TURNS = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
}


def answers_to(a: int, b: int) -> list[str]:
    return [f"{a} + {b} = {a + b}.", f"{a} + {b} = {a + b + 1}.", f"{a} + {b} is {a}.", f"{a} plus {b} is many."]


def turns_of(a: int, b: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    chosen = [("gpt", f"{a} + {b} = ?"), ("human", "Well?"), ("gpt", f"It is {a + b}.")]
    rejected = [("gpt", f"{a} + {b} = ?"), ("human", "Now?"), ("gpt", f"It is {a}."), ("human", "No."), ("gpt", "Oh.")]
    return tuple([{"from": who, "value": text} for who, text in side] for side in (chosen, rejected))  # type: ignore


def make_answers(folder: Path, data: Path) -> Path:
    """The pairs of a data folder, beside rows with four answers, with two, with several rejected ones, and of turns."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    scores = [3.0, 1.0, 1.0, 0.5]
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": pairs,
        "four": [
            {"instruction": f"What is {a} + {b}?", "answers": answers_to(a, b), "scores": scores, "weight": b / 4}
            for a, b in SUMS[:12]
        ],
        "two": [
            {
                "instruction": row["instruction"],
                "answers": [row["rejected"], row["chosen"]],
                "scores": [0.0, row["gap"]],
            }
            for row in pairs
        ],
        "rejected": [
            {"instruction": f"What is {a} + {b}?", "chosen": answers_to(a, b)[0], "rejected": answers_to(a, b)[1:]}
            | {"gap": a / 4, "half": a / 8}
            for a, b in SUMS[:12]
        ],
        "turns": [
            {
                "messages": [{"from": "human", "value": f"What is {a} + {b}?"}],
                "chosen": turns_of(a, b)[0],
                "rejected": turns_of(a, b)[1],
            }
            for a, b in SUMS[:12]
        ],
    }
    entries: dict[str, dict[str, Any]] = {
        "pairs": {"columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
        "four": {"columns": RANKED},
        "two": {"columns": RANKED},
        "rejected": {"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
        "turns": TURNS,
    }
    for name, of_set in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in of_set)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    info = {name: {"file_name": f"{name}.jsonl", "ranking": True, **entry} for name, entry in entries.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder
