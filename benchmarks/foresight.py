"""Whether the scores of `data check --model` foretell which chosen responses a DPO training makes less likely.

    python benchmarks/foresight.py        under half an hour on two shared CPU cores
    python benchmarks/foresight.py --model outputs/SmolLM2-135M-Instruct --template smollm2 --learning-rate 5e-6 \
        --pairs 200 --seeds 1 --output outputs/foresight_smollm2        an hour, after `make model`

Word problems as of `make reproduce`, half of the pairs with one number of the solution changed, half against the
solution of another problem. A model scores them, is trained on them by DPO, and scores them again. Further trainings,
without the tenth of the pairs with the highest score and without a random tenth, are compared on held-out pairs. The
model is that of `make reproduce`, after 200 steps of SFT, unless --model names another. The criteria are in
docs/data.md, settled before the first run. If it is interrupted, even by kill -9, run the same command to resume.
Run it in the checkout.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from scipy.stats import bootstrap, rankdata

from llamafactory_ext.data.corruption import make_pair
from llamafactory_ext.whole_files import write_whole

REPRODUCE = Path(__file__).resolve().parents[1] / "examples" / "reproduce"
sys.path.insert(0, str(REPRODUCE))

from start import make_data as make_sft_data  # noqa: E402
from start import make_model  # noqa: E402
from stories import stories  # noqa: E402

Row = dict[str, Any]

HELD_OUT = 200  # pairs
SFT_STEPS, SFT_BATCH = 200, 16
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
    "cutoff_len": 256,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "num_train_epochs": 1.0,
    "disable_gradient_checkpointing": True,
    "infer_dtype": "float32",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main(
    model: Annotated[
        Path | None, typer.Option(help="A folder with a model (default: the study's, trained here).")
    ] = None,
    template: Annotated[str, typer.Option(help="Its template.")] = "chatml",
    learning_rate: Annotated[float, typer.Option(help="Of DPO.")] = 1.0e-4,
    pairs: Annotated[int, typer.Option(min=20, help="To train on.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings on each data set, with other orders of the pairs.")] = 4,
    output: Annotated[Path, typer.Option(help="A folder.")] = Path("outputs/foresight"),
) -> None:
    study = Study(output, {"template": template, "learning_rate": learning_rate})
    study.make_data(pairs)
    start = study.sft() if model is None else model
    before = study.scores(start, "train", "before")
    trained = [study.train(start, "train", seed) for seed in range(1, seeds + 1)]
    after = [study.scores(each, "train", f"{each.name}_after") for each in trained]
    kinds = [row["kind"] for row in read_rows(output / "data" / "train.jsonl")]
    foretold = "\n".join(correlations(before, after, kinds))
    print(f"{foretold}\n", flush=True)  # half of the time is still to come
    study.drop(start)
    held_out = {"before": [study.scores(start, "held_out", "held_out_before")]}
    for dataset in ("train", "kept", "random"):
        trained = [study.train(start, dataset, seed) for seed in range(1, seeds + 1)]
        held_out[dataset] = [study.scores(each, "held_out", f"{each.name}_held_out") for each in trained]
    dropped = "\n".join(dropping(held_out))
    print(dropped)
    write_whole(output / "results.md", f"{foretold}\n\n{dropped}\n")


# --- data ------------------------------------------------------------------------------------------------------------


def made() -> Iterator[Row]:
    rng, problems = random.Random(1), stories(1)
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


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Data, trainings and scores in a folder; what is there is not made again.

    Args:
        folder: of everything.
        changes: keys of the recipes that differ between studies.
    """

    folder: Path
    changes: Row

    def make_data(self, pairs: int) -> None:
        """The pairs to train on, the same without a random tenth, and the held-out ones."""
        data, rows = self.folder / "data", list(itertools.islice(made(), pairs + HELD_OUT))
        sets = {"train": rows[:pairs], "held_out": rows[pairs:]}
        gone = set(random.Random(1).sample(range(pairs), int(SHARE * pairs)))
        sets["random"] = [row for index, row in enumerate(sets["train"]) if index not in gone]
        for name, members in sets.items():
            write_rows(data / f"{name}.jsonl", members)
        if not (data / "dataset_info.json").exists():
            info = {name: {"file_name": f"{name}.jsonl", "ranking": True, "columns": COLUMNS} for name in sets}
            write_whole(data / "dataset_info.json", json.dumps(info, indent=1))

    def sft(self) -> Path:
        """The model of `make reproduce`, after a few hundred steps from random weights."""
        for name, make in (("sft_data", make_sft_data), ("random_weights", self._random_weights)):
            folder, unfinished = self.folder / name, self.folder / f".{name}.unfinished"
            if not folder.is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.replace(folder)
        about = yaml.safe_load((REPRODUCE / "sft.yaml").read_text(encoding="utf-8"))
        about |= {"model_name_or_path": str(self.folder / "random_weights"), "max_steps": SFT_STEPS}
        about |= {"dataset_dir": str(self.folder / "sft_data"), "max_samples": SFT_STEPS * SFT_BATCH}
        return self._trained("sft", about | {"save_strategy": "no", "per_device_train_batch_size": SFT_BATCH})

    def _random_weights(self, folder: Path) -> None:
        make_model(folder, self.folder / "sft_data")

    def scores(self, model: Path, dataset: str, name: str) -> list[Row]:
        """What `data check --model` says of each pair of a data set."""
        output = self.folder / f"{name}.jsonl"
        if not output.exists():
            recipe = self._recipe(name, self._dpo(model, dataset))
            self._run("llamafactory-ext", "data", "check", str(recipe), "--model", "--output", str(output))
        return read_rows(output)

    def drop(self, model: Path) -> None:
        """Make the data set without the tenth of the pairs with the highest score."""
        kept = self.folder / "data" / "kept.jsonl"
        if not kept.exists() or "kept" not in (self.folder / "data" / "dataset_info.json").read_text(encoding="utf-8"):
            recipe = self._recipe("before", self._dpo(model, "train"))
            words = ["--scores", str(self.folder / "before.jsonl"), "--worst", str(SHARE), "--output", str(kept)]
            self._run("llamafactory-ext", "data", "drop", str(recipe), *words, "--overwrite")

    def train(self, model: Path, dataset: str, seed: int) -> Path:
        """The model after an epoch of DPO."""
        return self._trained(f"{dataset}{seed}", self._dpo(model, dataset) | {"seed": seed})

    def _dpo(self, model: Path, dataset: str) -> Row:
        about = {"model_name_or_path": str(model), "dataset_dir": str(self.folder / "data"), "dataset": dataset}
        return {**about, "ref_log_probs_cache_dir": str(self.folder / "references"), **RECIPE, **self.changes}

    def _trained(self, name: str, settings: Row) -> Path:
        """The folder of a training's model; all_results.json is written last."""
        folder = self.folder / name
        if not (folder / "all_results.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self._run("llamafactory-cli", "train", str(self._recipe(name, settings | {"output_dir": str(folder)})))
        return folder

    def _recipe(self, name: str, settings: Row) -> Path:
        path = self.folder / f"{name}.yaml"
        write_whole(path, yaml.safe_dump(settings, sort_keys=False))
        return path

    def _run(self, *words: str) -> None:
        """A command of this environment, also where it is not activated."""
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        print(" ".join(words), flush=True)
        begun, path = time.monotonic(), self.folder / "log.txt"
        with path.open("ab") as log:
            status = subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode
        if status:
            sys.exit(f"{' '.join(words)} ended with {status}: see {path}, then run the same command to resume.")
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)


# --- results ---------------------------------------------------------------------------------------------------------


def correlations(before: list[Row], after: list[list[Row]], kinds: list[str]) -> list[str]:
    """Spearman's correlation of each score with the change of the chosen response's log-probability, as a table."""
    change = logps(after) - logps([before])
    lines = ["| score before the training | " + " | ".join(GROUPS) + " |", "|---|" + "---|" * len(GROUPS)]
    members = {name: np.array([name in ("all", kind) for kind in kinds]) for name in GROUPS}
    for score in SCORES:
        values = np.array([row[score] for row in before], dtype=float)
        cells = [interval(spearman, values[chosen], change[chosen]) for chosen in members.values()]
        lines.append(f"| `{score}` | {' | '.join(cells)} |")
    counts = [f"{chosen.sum()} pairs, {(change[chosen] < 0).mean():.0%} fell" for chosen in members.values()]
    means = [f"{change[chosen].mean():+.2f}" for chosen in members.values()]
    return [*lines, f"| pairs | {' | '.join(counts)} |", f"| mean change, nats | {' | '.join(means)} |"]


def dropping(held_out: dict[str, list[list[Row]]]) -> list[str]:
    """The mean change of held-out chosen log-probabilities after each training, as a table."""
    found = {name: logps(of_seeds) for name, of_seeds in held_out.items()}
    lines = ["| trained on | held-out change of log p(chosen), nats |", "|---|---|"]
    titles = {"train": "all pairs", "kept": "without the worst tenth", "random": "without a random tenth"}
    lines += [f"| {title} | {interval(np.mean, found[name] - found['before'])} |" for name, title in titles.items()]
    difference = found["kept"] - found["random"]
    each = [
        (logps([kept]) - logps([other])).mean()
        for kept, other in zip(held_out["kept"], held_out["random"], strict=True)
    ]
    lines.append(f"| without the worst minus without a random tenth | {interval(np.mean, difference)} |")
    return [*lines, f"| the same by training | {', '.join(f'{value:+.2f}' for value in each)} |"]


def logps(of_seeds: list[list[Row]]) -> np.ndarray:
    """The log-probability of each chosen response, in nats, the mean over trainings."""
    return np.mean([[row["chosen_logp"] for row in rows] for rows in of_seeds], axis=0)


def spearman(values: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's correlation along an axis."""
    ranks = [rankdata(each, axis=axis) for each in (values, others)]
    a, b = (each - each.mean(axis=axis, keepdims=True) for each in ranks)
    return (a * b).sum(axis=axis) / np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))


def interval(statistic: Callable[..., Any], *samples: np.ndarray) -> str:
    """A statistic and its 95 % bootstrap interval over pairs."""
    found = bootstrap(samples, statistic, paired=True, n_resamples=DRAWS, method="percentile", batch=500, rng=0)
    low, high = found.confidence_interval
    return f"{statistic(*samples):+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    typer.run(main)
