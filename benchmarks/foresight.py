"""Whether the scores of `data check --model` foretell which chosen responses a DPO training makes less likely.

    python benchmarks/foresight.py        about 20 minutes on two CPU cores, after `make model`

Word problems as of `make reproduce`, half of the pairs with one number of the solution changed, half against the
solution of another problem. SmolLM2-135M-Instruct scores them, is trained on them by DPO, and scores them again. Two
more trainings, without the tenth of the pairs with the highest score and without a random tenth, are compared on
held-out pairs. The criteria are in docs/data.md, settled before the first run. Everything is under outputs/foresight;
if it is interrupted, even by kill -9, run the same command to resume. Run it in the checkout.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from scipy.stats import bootstrap, spearmanr

from llamafactory_ext.data.corruption import make_pair
from llamafactory_ext.whole_files import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "reproduce"))

from stories import stories

Row = dict[str, Any]

RESULTS = Path("outputs/foresight")
TRAIN, HELD_OUT = 240, 80  # pairs
SHARE = 0.1  # of the pairs, dropped
DRAWS = 5000  # of the bootstrap
SCORES = ("normalized_ches", "ches", "edit_distance", "chosen_tail_logp", "chosen_tail_mean_logp")
GROUPS = ("all", "corrupted", "another")
COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
RECIPE = {
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "full",
    "pref_loss": "sigmoid",
    "pref_beta": 0.1,
    "dataset_dir": str(RESULTS / "data"),
    "template": "smollm2",
    "cutoff_len": 256,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5.0e-6,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "num_train_epochs": 1.0,
    "seed": 1,
    "disable_gradient_checkpointing": True,
    "ref_log_probs_cache_dir": str(RESULTS / "references"),
    "infer_dtype": "float32",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main(
    model: Annotated[Path, typer.Option(help="A folder with the model.")] = Path("outputs/SmolLM2-135M-Instruct"),
) -> None:
    if not (model / "config.json").is_file():
        sys.exit(f"{model} holds no model: run `make model`, or name another folder with --model.")
    make_data(RESULTS / "data")
    before = scores(model, "train", "before")
    held_out = {"before": scores(model, "held_out", "held_out_before")}
    command = ["llamafactory-ext", "data", "drop", str(recipe(model, "train", "before")), "--worst", str(SHARE)]
    kept = RESULTS / "data" / "kept.jsonl"
    if not kept.exists():
        run(*command, "--scores", str(RESULTS / "before.jsonl"), "--output", str(kept))
    make_random(RESULTS / "data" / "random.jsonl")
    for dataset in ("train", "kept", "random"):
        trained = train(model, dataset)
        held_out[dataset] = scores(trained, "held_out", f"held_out_after_{dataset}")
    after = scores(RESULTS / "train", "train", "after")
    text = "\n".join([*correlations(before, after, kinds()), "", *dropping(held_out)]) + "\n"
    write_whole(RESULTS / "results.md", text)
    print(text)


# --- data ------------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Pairs whose responses differ in one number, and pairs whose responses are solutions of two problems, in turns."""
    pairs = list(itertools.islice(made(), TRAIN + HELD_OUT))
    for name, rows in (("train", pairs[:TRAIN]), ("held_out", pairs[TRAIN:])):
        write_rows(folder / f"{name}.jsonl", rows)
    if not (folder / "dataset_info.json").exists():
        info = {
            name: {"file_name": f"{name}.jsonl", "ranking": True, "columns": COLUMNS} for name in ("train", "held_out")
        }
        info["random"] = info["train"] | {"file_name": "random.jsonl"}
        write_whole(folder / "dataset_info.json", json.dumps(info, indent=1))


def made() -> Iterator[Row]:
    rng, problems = random.Random(0), stories(0)
    while True:
        pair = make_pair(next(problems), rng, prompt="")
        if pair is not None:
            yield {**pair, "kind": "corrupted"}
        problem, other = next(problems), next(problems)
        yield {
            "instruction": problem.question,
            "chosen": problem.solution,
            "rejected": other.solution,
            "kind": "another",
        }


def make_random(path: Path) -> None:
    """The training pairs without as many as are dropped by their score, drawn at random."""
    rows = read_rows(RESULTS / "data" / "train.jsonl")
    dropped = set(random.Random(1).sample(range(TRAIN), int(SHARE * TRAIN)))
    write_rows(path, [row for index, row in enumerate(rows) if index not in dropped])


def kinds() -> list[str]:
    return [row["kind"] for row in read_rows(RESULTS / "data" / "train.jsonl")]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


# --- commands --------------------------------------------------------------------------------------------------------


def recipe(model: Path, dataset: str, name: str) -> Path:
    path = RESULTS / f"{name}.yaml"
    about = {"model_name_or_path": str(model), "dataset": dataset, "output_dir": str(RESULTS / name)}
    write_whole(path, yaml.safe_dump({**about, **RECIPE}, sort_keys=False))
    return path


def scores(model: Path, dataset: str, name: str) -> list[Row]:
    output = RESULTS / f"{name}.jsonl"
    if not output.exists():
        run("llamafactory-ext", "data", "check", str(recipe(model, dataset, name)), "--model", "--output", str(output))
    return read_rows(output)


def train(model: Path, dataset: str) -> Path:
    """The model after one epoch; all_results.json is written last."""
    folder = RESULTS / dataset
    if not (folder / "all_results.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        run("llamafactory-cli", "train", str(recipe(model, dataset, dataset)))
    return folder


def run(*words: str) -> None:
    """A command of this environment, also where it is not activated."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    print(" ".join(words), flush=True)
    begun = time.monotonic()
    with (RESULTS / "log.txt").open("ab") as log:
        status = subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode
    if status:
        sys.exit(
            f"{' '.join(words)} ended with {status}: see {RESULTS / 'log.txt'}, then run the same command to resume."
        )
    print(f"  {time.monotonic() - begun:.0f} s", flush=True)


# --- results ---------------------------------------------------------------------------------------------------------


def correlations(before: list[Row], after: list[Row], kinds: list[str]) -> list[str]:
    """Spearman's correlation of each score with the change of the chosen response's log-probability, as a table."""
    change = np.array([b["chosen_logp"] - a["chosen_logp"] for a, b in zip(before, after, strict=True)])
    lines = ["| score before the training | " + " | ".join(GROUPS) + " |", "|---|" + "---|" * len(GROUPS)]
    members = {name: np.array([name in ("all", kind) for kind in kinds]) for name in GROUPS}
    for score in SCORES:
        values = np.array([row[score] for row in before], dtype=float)
        cells = [interval(spearman, values[chosen], change[chosen]) for chosen in members.values()]
        lines.append(f"| `{score}` | {' | '.join(cells)} |")
    counts = [f"{chosen.sum()} pairs, {(change[chosen] < 0).mean():.0%} fell" for chosen in members.values()]
    means = [f"{change[chosen].mean():+.2f}" for chosen in members.values()]
    return [*lines, f"| pairs | {' | '.join(counts)} |", f"| mean change, nats | {' | '.join(means)} |"]


def dropping(held_out: dict[str, list[Row]]) -> list[str]:
    """The mean change of held-out chosen log-probabilities after each training, as a table."""
    logps = {name: np.array([row["chosen_logp"] for row in rows]) for name, rows in held_out.items()}
    lines = ["| trained on | held-out change of log p(chosen), nats |", "|---|---|"]
    titles = {"train": "all pairs", "kept": "without the worst tenth", "random": "without a random tenth"}
    lines += [f"| {title} | {interval(np.mean, logps[name] - logps['before'])} |" for name, title in titles.items()]
    return [*lines, f"| worst minus random | {interval(np.mean, logps['kept'] - logps['random'])} |"]


def spearman(values: np.ndarray, others: np.ndarray) -> float:
    return float(spearmanr(values, others).statistic)


def interval(statistic: Callable[..., float], *samples: np.ndarray) -> str:
    """A statistic and its 95 % bootstrap interval over pairs."""
    about = {"paired": True, "vectorized": False, "n_resamples": DRAWS, "method": "percentile", "rng": 0}
    low, high = bootstrap(samples, statistic, **about).confidence_interval
    return f"{statistic(*samples):+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    typer.run(main)
