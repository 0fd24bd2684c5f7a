"""From nothing to a table: make pairs, train DPO, DPOP and MinorDPO through llamafactory-cli, score, plot.

    python examples/demo/demo.py                          the embedded model, problems of our own making
    python examples/demo/demo.py --data train.jsonl       pairs and problems from a GSM8K file
    python examples/demo/demo.py --model /path/to/model   another model (its chat template must be ChatML)

What is finished is kept in the output folder and found again: after an interruption, the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llamafactory_ext.data.corruption import Problem, make_pair, parse_solution
from llamafactory_ext.plots import plot_runs
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from model import default_model  # noqa: E402
from problems import generate  # noqa: E402

EVALUATION = HERE.parents[1] / "evaluation" / "gsm8k.py"
RECIPES = {
    "DPO": HERE / "smollm2-135m_full_sigmoid.yaml",
    "DPOP": HERE / "smollm2-135m_full_dpop.yaml",
    "MinorDPO": HERE / "smollm2-135m_full_minor_dpo.yaml",
}
HELD_OUT = "held_out.jsonl"
console = Console()


def main() -> None:
    args = parse_arguments()
    problems = read_problems(args.data)
    pairs, held_out = split(problems, args.pairs, args.problems)
    model = args.model or default_model(args.cache)
    folder = args.output / fingerprint(args, pairs, held_out)
    console.print(f"{len(pairs)} pairs, {len(held_out)} held-out problems, model {model.name}, results in {folder}")

    data = write_data(folder / "data", pairs, held_out)
    models = {"base": model}
    with progress_bar() as progress:
        for name, recipe in RECIPES.items():
            models[name] = train(name, recipe, model, data, folder / name, progress)
        scores = {name: score(name, path, data, folder / f"score_{name}", progress) for name, path in models.items()}

    histories = {name: log_history(folder / name) for name in RECIPES}
    figure = plot_runs(histories, folder / "normalized_rewards.png")
    print_table(scores, histories)
    console.print(f"Reward curves side by side: {figure}")


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


def write_data(folder: Path, pairs: list[dict[str, str]], held_out: list[Problem]) -> Path:
    write_whole(folder / "arithmetic_pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    # Registered as the shipped sample is, whose name and layout the pairs share.
    write_whole(folder / "dataset_info.json", (HERE.parents[1] / "data" / "dataset_info.json").read_bytes())
    # The held-out problems in GSM8K's layout.
    rows = [{"question": p.question, "answer": f"{p.steps}\n#### {p.answer}"} for p in held_out]
    write_whole(folder / HELD_OUT, "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fingerprint(args: argparse.Namespace, pairs: list[dict[str, str]], held_out: list[Problem]) -> str:
    """A folder name that changes with anything that changes the results."""
    recipes = [path.read_text(encoding="utf-8") for path in RECIPES.values()]
    return hashlib.sha256(repr((str(args.model), pairs, held_out, recipes)).encode()).hexdigest()[:12]


# --- running commands ------------------------------------------------------------------------------------------------


def run(command: list[str], log: Path, show: Callable[[], None]) -> None:
    """Run a command, its output in a log file, and show how far it is; if it fails, show the end of the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # The scripts of this environment, also where it is not activated.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                show()
                time.sleep(0.5)
        finally:
            process.terminate()
    if process.returncode != 0:
        console.print(log.read_text()[-3000:], markup=False)
        sys.exit(f"{command[0]} failed; its whole output is in {log}.")


def lines(path: Path) -> list[str]:
    """The complete lines of a file that another process may be writing to."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


# --- training --------------------------------------------------------------------------------------------------------


def train(name: str, recipe: Path, model: Path, data: Path, folder: Path, progress: Progress) -> Path:
    task = progress.add_task(f"train {name}", total=None, status="")

    def show_last_step() -> None:
        if log := lines(folder / "trainer_log.jsonl"):
            last = json.loads(log[-1])
            status = f"loss {last['loss']:.3f}" if "loss" in last else ""
            progress.update(task, completed=last["current_steps"], total=last["total_steps"], status=status)

    if not (folder / "all_results.json").is_file():  # what LLaMA-Factory writes last
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            *("llamafactory-cli", "train", str(recipe)),
            *(f"model_name_or_path={model}", f"dataset_dir={data}", f"output_dir={folder}", "overwrite_cache=true"),
        ]
        run(command, folder.with_suffix(".log"), show_last_step)
    progress.update(task, completed=1, total=1, status=f"loss {final_loss(folder):.3f}")
    return folder


def final_loss(folder: Path) -> float:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))["train_loss"]


def log_history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


# --- results ---------------------------------------------------------------------------------------------------------


def score(name: str, model: Path, data: Path, folder: Path, progress: Progress) -> dict[str, Any]:
    """The summary of the evaluation script for one model; it resumes by itself and never answers a problem twice."""
    held_out = data / HELD_OUT
    task = progress.add_task(f"score {name}", total=len(lines(held_out)), status="")

    def show_answers() -> None:
        progress.update(task, completed=len(lines(folder / "base" / "generations.jsonl")))

    if not (folder / "results.json").is_file():
        command = [
            *(sys.executable, str(EVALUATION), "--engine", "hf", "--model", str(model), "--data", str(held_out)),
            *("--output", str(folder), "--max-tokens", "128", "--batch-size", "8"),
        ]
        run(command, folder.with_suffix(".log"), show_answers)
    show_answers()
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))["base"]
    progress.update(task, status=f"strict {result['strict']['accuracy']:.0%}")
    return result


def print_table(scores: dict[str, dict[str, Any]], histories: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(
        title="The same data and settings, three losses",
        caption="strict: the number behind `the answer is`; flexible: the last number; marked: ends as asked; "
        "rewards: normalized, at the last step, in nats. So few problems show that it works, not which loss is better.",
    )
    for column in ("model", "strict", "flexible", "marked", "chosen", "rejected", "margin"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, result in scores.items():
        last = next((log for log in reversed(histories.get(name, [])) if "normalized_rewards/chosen" in log), None)
        curves = ("chosen", "rejected", "margins")
        rewards = [f"{last[f'normalized_rewards/{curve}']:+.2f}" for curve in curves] if last else ["", "", ""]
        marked = result["strict_prompt"]["answered"] / result["problems"]
        shares = (result["strict"]["accuracy"], result["flexible"]["accuracy"], marked)
        table.add_row(name, *(f"{share:.0%}" for share in shares), *rewards)
    console.print(table)


def progress_bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


if __name__ == "__main__":
    main()
