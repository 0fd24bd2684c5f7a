"""From nothing to a report: make pairs, train DPO, DPOP and MinorDPO through llamafactory-cli, score and compare them.

    python examples/demo/demo.py                          the embedded model, problems of our own making
    python examples/demo/demo.py --data train.jsonl       pairs and problems from a GSM8K file
    python examples/demo/demo.py --model /path/to/model   another model (its chat template must be ChatML)

It is the sweep in sweep.yaml, with the data and model filled in. If it is interrupted, rerun the same command to
resume.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from llamafactory_ext import hashes
from llamafactory_ext.data.corruption import Problem, make_pair, parse_solution
from llamafactory_ext.plots import plot_runs
from llamafactory_ext.recipe.reading import read_recipe
from llamafactory_ext.sweep.results import read_results
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from model import default_model  # noqa: E402
from problems import generate  # noqa: E402

NAMES = {"sigmoid": "DPO", "dpop": "DPOP", "minor_dpo": "MinorDPO"}


def main() -> None:
    args = parse_arguments()
    problems = read_problems(args.data)
    pairs, held_out = split(problems, args.pairs, args.problems)
    model = args.model or default_model(args.cache)
    sweep = read_yaml(HERE / "sweep.yaml")
    recipe = read_recipe([str(ROOT / sweep["recipe"]), f"model_name_or_path={model}", "overwrite_cache=true"])
    # A folder of its own for whatever changes the results.
    folder = args.output / hashes.of_value([recipe, sweep, pairs, gsm8k_rows(held_out)])[:12]
    print(f"{len(pairs)} pairs, {len(held_out)} held-out problems, model {model.name}, results in {folder}", flush=True)

    write_data(folder / "data", pairs, held_out)
    sweep["recipe"] = {**recipe, "dataset_dir": str(folder / "data")}
    sweep["output"] = str(folder / "sweep")
    sweep["evaluators"][0]["gsm8k"]["data"] = str(folder / "data" / "held_out.jsonl")
    write_whole(folder / "sweep.yaml", yaml.safe_dump(sweep, sort_keys=False))
    run("sweep", str(folder / "sweep.yaml"))
    run("report", str(folder / "sweep"))

    cells = read_results(folder / "sweep").cells
    histories = {NAMES[cell.loss]: cell.log_history for cell in cells}
    print(f"Reward curves side by side: {plot_runs(histories, folder / 'normalized_rewards.png')}")
    print("So few problems show that it works, not which loss is better.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a GSM8K jsonl file (question, answer); default: generated problems")
    parser.add_argument("--model", type=Path, help="a model folder; default: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--pairs", type=int, default=40, help="preference pairs to train on (%(default)s)")
    parser.add_argument("--problems", type=int, default=16, help="held-out problems to score on (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="(%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where the model is kept (%(default)s)")
    args = parser.parse_args()
    for path in (args.data, args.model):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist: write the path of an existing file or folder.")
    if args.pairs < 1 or args.problems < 1:
        parser.error("--pairs and --problems must be at least 1.")
    return args


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llamafactory_ext"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- data ------------------------------------------------------------------------------------------------------------


def read_problems(path: Path | None) -> Any:
    if path is None:
        return generate(seed=0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return (parse_solution(row["question"], row["answer"]) for row in rows)


def split(problems: Any, pair_count: int, problem_count: int) -> tuple[list[dict[str, str]], list[Problem]]:
    """The first problems that can be corrupted become pairs, the next ones are held out."""
    rng = random.Random(0)
    made = (make_pair(problem, rng) for problem in problems)
    pairs = list(itertools.islice((pair for pair in made if pair is not None), pair_count))
    held_out = list(itertools.islice(problems, problem_count))
    if len(pairs) < pair_count or len(held_out) < problem_count:
        sys.exit(
            f"The data has too few problems for {pair_count} pairs and {problem_count} held-out ones: ask for less."
        )
    return pairs, held_out


def gsm8k_rows(held_out: list[Problem]) -> list[dict[str, str]]:
    """The held-out problems in GSM8K's layout."""
    return [{"question": p.question, "answer": f"{p.steps}\n#### {p.answer}"} for p in held_out]


def write_data(folder: Path, pairs: list[dict[str, str]], held_out: list[Problem]) -> None:
    write_rows(folder / "arithmetic_pairs.jsonl", pairs)
    write_rows(folder / "held_out.jsonl", gsm8k_rows(held_out))
    # Registered as the sample in `data` is, whose name and layout the pairs share.
    write_whole(folder / "dataset_info.json", (ROOT / "data" / "dataset_info.json").read_bytes())


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def run(*words: str) -> None:
    """A command of the package's, in this environment, also where that is not activated."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if status := subprocess.run([sys.executable, "-m", "llamafactory_ext.cli", *words], env=environment).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
