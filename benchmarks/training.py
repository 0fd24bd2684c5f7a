"""LLaMA-Factory's DPO stage and the plugin's, side by side: speed, memory, padding, and the ratios that are aimed at.

    python benchmarks/training.py --quick
    python benchmarks/training.py --rounds 3 --losses sigmoid --losses sr_dpo
    python benchmarks/training.py --model /path/to/model --template qwen --data data/metamath_zero_shot.jsonl

Each run is a whole recipe in a process of its own; the configurations take turns, so that whatever else the machine
does hits all alike. Finished runs are kept under --output: interrupted, the same command goes on. Without a GPU,
SmolLM2-135M is trained in full in float32; with one, LoRA in bf16 of random weights in Qwen1.5-7B's shape (untested).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from training_report import Case, Report, build, plot, show, timing
from training_runs import FULL, Runner, check_model_and_sizes, check_pairs, head_only, is_refined, machine, qwen_7b
from training_tokens import Result

from llamafactory_ext.errors import UserError
from llamafactory_ext.losses.lookup import get_loss
from llamafactory_ext.whole_files import write_whole

MODEL, DATA, OUTPUT = Path("outputs/SmolLM2-135M-Instruct"), Path("data/gsm8k_pairs.jsonl"), Path("outputs/bench")
LOSSES = ["sigmoid", "minor_dpo", "dpop", "sr_dpo"]
MICRO_BATCHES = [1, 4]
# Pairs a micro-batch; a run that would hold more than the limit is left out, and so are those after it.
TRAINING_SIZES, HEAD_SIZES = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64)
MEMORY_LIMIT = 10 * 2**30

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Opt = typer.Option


@dataclass(frozen=True)
class Settings:
    """What all runs share: the options of the command line."""

    model: Path
    template: str
    data: Path
    output: Path
    rounds: int
    steps: int
    global_batch: int
    micro_batches: list[int]
    losses: list[str]
    training_sizes: tuple[int, ...] = TRAINING_SIZES
    head_sizes: tuple[int, ...] = HEAD_SIZES

    @property
    def pairs(self) -> int:
        """As many as the steps of a run train on, the first of them to warm up."""
        return self.global_batch * (1 + self.steps)

    @property
    def refined(self) -> list[str]:
        """The losses with a refinement term."""
        return [loss for loss in self.losses if is_refined(loss)]


@app.command(help=__doc__.replace("\n    python", "\n\n    python"))
def main(
    model: Annotated[Path, Opt(help="A model folder; on a GPU, only its tokenizer is used.")] = MODEL,
    template: Annotated[str, Opt(help="LLaMA-Factory's name of the model's template.")] = "smollm2",
    data: Annotated[Path, Opt(help="Pairs (jsonl), registered in the dataset_info.json beside it.")] = DATA,
    output: Annotated[Path, Opt(help="A folder for report.json, report.png and the runs' results.")] = OUTPUT,
    rounds: Annotated[int, Opt(min=1, help="Runs of each configuration.")] = 2,
    steps: Annotated[int, Opt(min=1, help="Measured optimizer steps of a run, after one to warm up.")] = 2,
    global_batch: Annotated[int, Opt(min=1, help="Pairs per optimizer step.")] = 16,
    micro_batch: Annotated[list[int], Opt(min=1, help="Pairs at a time; several times for several.")] = MICRO_BATCHES,
    losses: Annotated[list[str], Opt(help="The plugin's; several times for several.")] = LOSSES,
    quick: Annotated[bool, Opt("--quick", help="One round of 1 + 1 steps of 4 pairs, to see that it works.")] = False,
    fresh: Annotated[bool, Opt("--fresh", help="Forget finished runs.")] = False,
) -> None:
    settings = Settings(model, template, data, output, rounds, steps, global_batch, micro_batch, losses)
    if quick:
        settings = replace(settings, rounds=1, steps=1, global_batch=4, training_sizes=(1, 2), head_sizes=(1, 2))
    try:
        dataset = check(settings)
        if fresh:
            shutil.rmtree(output / "runs", ignore_errors=True)
        report = measure(settings, dataset)
    except UserError as error:
        print(f"training.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    show(report, console)
    write_whole(output / "report.json", json.dumps(report.as_json(), indent=2) + "\n")
    plot(report, output / "report.png")


def check(settings: Settings) -> str:
    """The name of the data set, if the settings can be run.

    Raises:
        UserError: with one sentence that says what to write or do.
    """
    check_model_and_sizes(settings.model, settings.global_batch, settings.micro_batches)
    for name in settings.losses:
        try:
            loss = get_loss(name)
        except ValueError as error:
            raise UserError(f"--losses: {error}") from error
        if not loss.needs_reference:
            raise UserError(f"--losses {name} has no reference whose log-probabilities could be kept: leave it out.")
    return _find_data(settings)


def _find_data(settings: Settings) -> str:
    data, registry = settings.data, settings.data.with_name("dataset_info.json")
    check_pairs(data)
    with data.open(encoding="utf-8") as file:
        rows = sum(1 for _ in file)
    needed = max(settings.pairs, *settings.training_sizes, *settings.head_sizes)
    if rows < needed:
        raise UserError(f"{data} holds {rows} pairs where {needed} are needed: write a smaller --global-batch.")
    registered = json.loads(registry.read_text(encoding="utf-8")) if registry.is_file() else {}
    for name, entry in registered.items():
        if entry.get("file_name") == data.name:
            return name
    raise UserError(f"{data} is not registered: add it to {registry} as a ranking data set.")


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(settings: Settings, dataset: str) -> Report:
    import torch

    gpu = torch.cuda.is_available()
    output = settings.output
    model = qwen_7b(settings.model, output / "qwen1.5-7b-random") if gpu else settings.model
    tuning = {"finetuning_type": "lora", "bf16": True} if gpu else FULL
    runner = Runner(model, settings.template, settings.data, dataset, output, tuning)
    results: dict[Case, list[Result]] = {}
    for turn in range(settings.rounds):
        for case in cases(settings):
            result = runner.seconds(case, turn, settings.global_batch, settings.steps)
            results.setdefault(case, []).append(result)

    limit = torch.cuda.get_device_properties(0).total_memory // 2 if gpu else MEMORY_LIMIT
    head = replace(
        runner, model=head_only(model, output / f"{model.name}-head"), tuning=FULL | ({"bf16": True} if gpu else {})
    )
    memory = {
        "training": peaks(runner, settings.training_sizes, limit),
        "head": peaks(head, settings.head_sizes, limit),
    }
    cold = {case: results.pop(case) for case in list(results) if case.system == "cold"}
    device = torch.cuda.get_device_name() if gpu else "CPU"
    timings = {case: timing(case, found, settings.global_batch, device) for case, found in results.items()}
    builds = [build(case, found, timings[replace(case, system="ours")]) for case, found in cold.items()]
    about = machine() | {
        "model": model.name,
        "data": settings.data.name,
        "precision": "bf16" if gpu else "float32",
        "tuning": tuning["finetuning_type"],
        "global_batch": settings.global_batch,
        "runs": f"{settings.rounds} rounds of 1 + {settings.steps} steps",
    }
    pairs = next(iter(results.values()))[0]["pairs"]
    return Report(about, pairs, list(timings.values()), builds, memory, settings.refined)


def cases(settings: Settings) -> Iterator[Case]:
    """One round, in order: caches are built first, so that the runs that follow find them."""
    smallest = min(settings.micro_batches)
    plain = [loss for loss in settings.losses if loss not in settings.refined]
    for losses in (plain, settings.refined):
        yield from (Case("cold", loss, smallest) for loss in losses[:1])
    for size in settings.micro_batches:
        yield Case("stock", "sigmoid", size)
        yield from (Case("ours", loss, size) for loss in settings.losses)
    if "sr_dpo" in settings.losses:
        yield Case("naive", "sr_dpo", smallest)


def peaks(runner: Runner, sizes: tuple[int, ...], limit: int) -> dict[str, dict[int, int]]:
    """Bytes by pairs in a micro-batch, of both systems, up to where the next size would exceed the limit."""
    curves: dict[str, dict[int, int]] = {"stock": {}, "ours": {}}
    for system, curve in curves.items():
        for size in sizes:
            if curve and max(curve.values()) * size / max(curve) > limit:
                break
            curve[size] = runner.peak(Case(system, "sigmoid", size))
    return curves


if __name__ == "__main__":
    app()
