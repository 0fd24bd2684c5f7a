"""Pairs of your own model: sample, pair, train MinorDPO, evaluate; then again from the model that came out.

    python examples/self_pairs_gsm8k/self_pairs.py                         a model of our own making, on two CPU cores
    python examples/self_pairs_gsm8k/self_pairs.py --gsm8k /path/to/gsm8k  Qwen2.5-1.5B-Instruct on GSM8K (needs a GPU)

Everything is written to outputs/self_pairs. If it is interrupted, even by kill -9, rerun the same command to resume.
Remove that folder to start again. Run it in the checkout.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_ext.plots import CURVES, legend_below, new_figure, save
from llamafactory_ext.sweep.work import keep_checkpoints
from llamafactory_ext.whole_files import write_whole

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "reproduce")]

from steps import make_whole, own_log, run  # noqa: E402
from toy import make_data, make_model  # noqa: E402

RESULTS = Path("outputs/self_pairs")
ROUNDS = 2
EVAL_PYTHON = Path(".venv-eval/bin/python")  # vLLM's environment: `make eval-env`


@dataclass(frozen=True)
class Setting:
    """What one size of the loop works with.

    Args:
        folder: of all results.
        recipe: of a round's training.
        start: the model that the first round starts from.
        problems: to sample and train on.
        test: problems to score on.
        python: the interpreter that runs the evaluation.
        asking: options of `eval gsm8k` and `eval sample`.
        sampling: further options of `eval sample`.
        pairing: options of `data from-samples`.
    """

    folder: Path
    recipe: Path
    start: str
    problems: Path
    test: Path
    python: str
    asking: Sequence[str]
    sampling: Sequence[str]
    pairing: Sequence[str]


def main() -> None:
    args = parse_arguments()
    setting = gsm8k(args.gsm8k) if args.gsm8k else toy()
    model = setting.start
    score(setting, model, 0)
    for number in range(1, ROUNDS + 1):
        model = train_round(setting, model, number)
        score(setting, model, number)
    rounds = [rates(setting, number) for number in range(ROUNDS + 1)]
    write_whole(setting.folder / "rounds.md", as_table(rounds))
    draw(rounds, setting.folder / "rounds.png")
    print("\n" + as_table(rounds))
    ours("eval", "compare", *(str(scores(setting, number)) for number in range(ROUNDS + 1)))
    print(f"Table and plot: {setting.folder / 'rounds.md'}, {setting.folder / 'rounds.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="a folder with GSM8K's train.jsonl and test.jsonl")
    args = parser.parse_args()
    if not (Path.cwd() / "examples" / "self_pairs_gsm8k").is_dir():
        parser.error("run it in the checkout's folder, which its recipes' paths start from.")
    if args.gsm8k:
        missing = [name for name in ("train.jsonl", "test.jsonl") if not (args.gsm8k / name).is_file()]
        if missing:
            parser.error(f"{args.gsm8k} has no {missing[0]}: name a folder with GSM8K's train.jsonl and test.jsonl.")
        if not EVAL_PYTHON.is_file():
            parser.error("--gsm8k samples with vLLM, which has an environment of its own: run `make eval-env` first.")
    return args


# --- settings --------------------------------------------------------------------------------------------------------


def toy() -> Setting:
    """A model of 2.5 million parameters, trained on the spot, and sums of three numbers."""
    folder = RESULTS / "toy"
    make_whole(folder / "data", make_data)
    make_whole(folder / "random", lambda made: make_model(made, folder / "data"))
    train(HERE / "toy_sft.yaml", folder / "start", folder / "start.log")
    return Setting(
        folder,
        HERE / "toy_minor_dpo.yaml",
        str(folder / "start"),
        folder / "data" / "train.jsonl",
        folder / "data" / "test.jsonl",
        sys.executable,
        ("--engine", "hf", "--prompt", "plain", "--max-tokens", "64", "--batch-size", "200"),
        ("--samples", "8"),
        ("--choose", "closest", "--per-problem", "4"),
    )


def gsm8k(data: Path) -> Setting:
    """Qwen2.5-1.5B-Instruct and GSM8K, with vLLM."""
    return Setting(
        RESULTS / "gsm8k",
        HERE / "qwen2.5-1.5b_full_minor_dpo.yaml",
        "Qwen/Qwen2.5-1.5B-Instruct",
        data / "train.jsonl",
        data / "test.jsonl",
        str(EVAL_PYTHON),
        ("--engine", "vllm"),
        ("--samples", "8", "--temperature", "0.8"),
        ("--choose", "closest", "--per-problem", "4"),
    )


# --- steps -----------------------------------------------------------------------------------------------------------


def train_round(setting: Setting, model: str, number: int) -> str:
    """One round: samples of a model, pairs of them, and a training that starts from the model, its reference."""
    folder = setting.folder / f"round{number}"
    words = ("--model", model, "--data", str(setting.problems), "--output", str(folder / "samples"))
    evaluation(setting, "sample", *words, *setting.asking, *setting.sampling, "--seed", str(number))
    if not (folder / "data" / "dataset_info.json").is_file():  # written after the pairs
        pairs = ("--output", str(folder / "data" / "self_pairs.jsonl"), "--overwrite")
        ours("data", "from-samples", str(folder / "samples"), *pairs, *setting.pairing)
    start = (f"model_name_or_path={model}", f"dataset_dir={folder / 'data'}")
    train(setting.recipe, folder / "model", folder / "train.log", *start)
    return str(folder / "model")


def train(recipe: Path, model: Path, log_file: Path, *words: str) -> None:
    """Train, unless it is done; LLaMA-Factory resumes from its last checkpoint, and writes all_results.json last."""
    with own_log(log_file) as log:
        if (model / "all_results.json").is_file():
            return
        if not keep_checkpoints(model):
            shutil.rmtree(model, ignore_errors=True)
        print(f"Training {model}; see {log_file}", flush=True)
        run("llamafactory-cli", "train", str(recipe), *words, f"output_dir={model}", log=log)


def score(setting: Setting, model: str, number: int) -> None:
    """Score a model greedily on the test problems."""
    words = ("--model", model, "--data", str(setting.test), "--output", str(scores(setting, number)))
    evaluation(setting, "gsm8k", *words, *setting.asking)


def evaluation(setting: Setting, command: str, *words: str) -> None:
    """A command of the evaluation; answers that are saved are not asked again."""
    argv = (setting.python, f"evaluation/{command}.py", *words)
    print(f"\n$ {shlex.join(argv)}", flush=True)
    run(*argv)


def ours(*words: str) -> None:
    print(f"\n$ llamafactory-ext {shlex.join(words)}", flush=True)
    run("llamafactory-ext", *words)


# --- results ---------------------------------------------------------------------------------------------------------


def scores(setting: Setting, number: int) -> Path:
    return setting.folder / "scores" / f"round{number}"


def rates(setting: Setting, number: int) -> dict[str, Any]:
    """The accuracy after a round, and the pass rates of the samples that the next round is trained on."""
    scored = json.loads((scores(setting, number) / "results.json").read_text(encoding="utf-8"))["base"]
    sampled = setting.folder / f"round{number + 1}" / "samples" / "pass_rates.json"
    found = json.loads(sampled.read_text(encoding="utf-8"))["base"] if sampled.is_file() else {}
    return {"round": number, "problems": scored["problems"], "greedy": scored["strict"], "sampled": found}


def as_table(rounds: list[dict[str, Any]]) -> str:
    problems = rounds[0]["problems"]
    lines = [
        f"| rounds | solved of {problems} test problems (95%) | pass@1 of samples (95%) | solved at least once |",
        "|---|---|---|---|",
    ]
    for each in rounds:
        greedy, sampled = each["greedy"], each["sampled"]
        cells = [str(each["round"]), f"{greedy['accuracy']:.1%} ({interval(greedy)})"]
        cells += [f"{sampled['pass@1']:.1%} ({interval(sampled)})", f"{sampled['solved']:.1%}"] if sampled else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def interval(found: dict[str, Any]) -> str:
    low, high = found["wilson_95"]
    return f"{100 * low:.1f}-{100 * high:.1f}"


def draw(rounds: list[dict[str, Any]], path: Path) -> None:
    """The pass rates by round, with their intervals."""
    figure = new_figure(width=5.0, height=3.6)
    axes = figure.subplots()
    sampled = [each for each in rounds if each["sampled"]]
    curves = {
        "greedy, test problems": [(each["round"], each["greedy"]["accuracy"], each["greedy"]) for each in rounds],
        "pass@1, training problems": [(each["round"], each["sampled"]["pass@1"], each["sampled"]) for each in sampled],
    }
    for (label, points), color in zip(curves.items(), CURVES.values(), strict=False):
        at, rate = [point[0] for point in points], [point[1] for point in points]
        ends = [point[2]["wilson_95"] for point in points]
        reach = [[y - low for y, (low, _) in zip(rate, ends, strict=True)]]
        reach += [[high - y for y, (_, high) in zip(rate, ends, strict=True)]]
        axes.errorbar(at, rate, yerr=reach, color=color, marker="o", capsize=3, label=label)
    axes.set_xticks([each["round"] for each in rounds])
    axes.set_xlabel("rounds trained")
    axes.set_ylabel("share solved")
    legend_below(figure)
    save(figure, path)


if __name__ == "__main__":
    main()
