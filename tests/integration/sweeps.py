"""Small sweeps for the command line: a place with model and data, sweeps' files, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
import yaml

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def make_place(folder):
    """A model, data and problems."""
    tiny.make_data(folder / "data")
    tiny.make_model(folder / "model", dtype="float32", max_position_embeddings=512)
    problems = [{"question": f"What is {n} + 3?", "answer": f"So.\n#### {n + 3}"} for n in range(5)]
    (folder / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return folder


def write_sweep(folder, name, axes, launcher=None, evaluators=(), **changes):
    """`name`.yaml: a sweep of the place's model and pairs, with scores, into the folder `name`."""
    recipe = tiny.recipe(folder / "model", folder / "data", folder / "unused", **changes)
    recipe = {
        key: value for key, value in recipe.items() if key not in ("output_dir", "max_steps", "ref_log_probs_cache_dir")
    }
    recipe |= {"num_train_epochs": 1.0, "learning_rate": 0.01, "per_device_train_batch_size": 2}
    settings = {
        "recipe": {**recipe, "model_name_or_path": "model", "dataset_dir": "data"},
        "axes": axes,
        "output": name,
        "gpus_per_cell": 0,
        "at_once": 2,
        "evaluators": [
            {"gsm8k": {"data": "test.jsonl", "engine": "hf", "options": {"max-tokens": 12}}},
            {"pairs": {"dataset": "pairs_eval"}},
            *evaluators,
        ],
        "launcher": launcher or {},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def sweep(folder, *words, **options):
    """The command line, in a folder."""
    return _command(folder, "sweep", *words, **options)


def report(folder, *words):
    """Likewise `llamafactory-ext report`."""
    return _command(folder, "report", *words)


def _command(folder, *words, **options):
    command = [sys.executable, "-m", "llamafactory_ext.cli", *words]
    environment = os.environ | {"PATH": PATH, "COLUMNS": "200", "OPENAI_API_KEY": "none"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, **options)
