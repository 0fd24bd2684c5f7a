"""LLaMA-Factory's DPO stage, TRL's DPO trainer and the plugin on the same tokens: speed, memory, and what is counted.

    python benchmarks/systems.py --quick
    python benchmarks/systems.py --mix long_prompt --micro-batch 1 --micro-batch 2

Three mixes of pairs are made from those of --data. On each, every system is tried at each micro-batch, and then timed
at its best, in turns, so that whatever else the machine does hits all alike. The model is trained in full in float32.
The reference's log-probabilities are known: TRL and the plugin read them, and what LLaMA-Factory spends on them is not
counted. Finished runs are kept under --output: interrupted, the same command goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import typer
from rich.console import Console
from systems_count import work
from systems_data import MIXES, write_mix
from systems_report import SYSTEMS, Mix, Side, plot, show
from training_report import Case
from training_runs import FULL, Runner, check_model_and_sizes, check_pairs, machine, trl_versions
from training_tokens import Result
from training_watch import CLOCKS

from llamafactory_ext.errors import UserError
from llamafactory_ext.whole_files import write_whole

MODEL, DATA = Path("outputs/SmolLM2-135M-Instruct"), Path("data/gsm8k_pairs.jsonl")
OUTPUT, TRL = Path("outputs/bench/systems"), Path(".venv-trl/bin/python")
MICRO_BATCHES, MIX_NAMES, SYSTEM_NAMES = [1, 2, 4], list(MIXES), list(SYSTEMS)

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
    trl: Path
    rounds: int
    steps: int
    global_batch: int
    micro_batches: list[int]
    mixes: list[str]
    systems: list[str]
    clock: str
    memory: float  # bytes

    @property
    def pairs(self) -> int:
        """As many as the longest run takes: the steps, one of them to warm up, or a trial."""
        return max(self.global_batch * (1 + self.steps), 2 * max(self.micro_batches))


@app.command(help=__doc__.replace("\n    python", "\n\n    python"))
def main(
    model: Annotated[Path, Opt(help="A model folder.")] = MODEL,
    template: Annotated[str, Opt(help="LLaMA-Factory's name of the model's template.")] = "smollm2",
    data: Annotated[Path, Opt(help="Pairs of `llamafactory-ext data corrupt` (jsonl).")] = DATA,
    output: Annotated[Path, Opt(help="A folder for report.json, report.png and the runs' results.")] = OUTPUT,
    trl: Annotated[Path, Opt(help="The Python of TRL's environment.")] = TRL,
    rounds: Annotated[int, Opt(min=1, help="Runs of each system at its best micro-batch.")] = 2,
    steps: Annotated[int, Opt(min=1, help="Measured optimizer steps of a run, after one to warm up.")] = 2,
    global_batch: Annotated[int, Opt(min=1, help="Pairs per optimizer step.")] = 16,
    micro_batch: Annotated[list[int], Opt(min=1, help="Pairs at a time to try; several times.")] = MICRO_BATCHES,
    mix: Annotated[list[str], Opt(help=f"One of {', '.join(MIXES)}; several times.")] = MIX_NAMES,
    system: Annotated[list[str], Opt(help=f"One of {', '.join(SYSTEMS)}; several times.")] = SYSTEM_NAMES,
    clock: Annotated[str, Opt(help="wall, or cpu: seconds of one thread, where others use the machine.")] = "wall",
    memory: Annotated[float, Opt(help="GiB; a micro-batch that would hold more is not tried.")] = 10.0,
    quick: Annotated[bool, Opt("--quick", help="One mix, one round of 1 + 1 steps, to see that it works.")] = False,
    fresh: Annotated[bool, Opt("--fresh", help="Forget finished runs.")] = False,
) -> None:
    settings = Settings(
        model, template, data, output, trl, rounds, steps, global_batch, micro_batch, mix, system, clock, memory * 2**30
    )
    if quick:
        settings = replace(settings, rounds=1, steps=1, global_batch=2, micro_batches=[1], mixes=mix[:1])
    try:
        check(settings)
        if fresh:
            shutil.rmtree(output / "runs", ignore_errors=True)
        mixes = [measure(settings, name) for name in settings.mixes]
    except UserError as error:
        print(f"systems.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    about = machine() | {
        "trl_environment": trl_versions(trl),
        "model": model.name,
        "clock": clock,
        "runs": f"{settings.rounds} rounds of 1 + {settings.steps} steps of {settings.global_batch} pairs",
    }
    show(about, mixes, console)
    report = about | {"mixes": [each.as_json() for each in mixes]}
    write_whole(output / "report.json", json.dumps(report, indent=2) + "\n")
    plot(mixes, output / "report.png")


def check(settings: Settings) -> None:
    """Stop at what cannot be run.

    Raises:
        UserError: with one sentence that says what to write or do.
    """
    check_model_and_sizes(settings.model, settings.global_batch, settings.micro_batches)
    check_pairs(settings.data)
    for option, names, known in (
        ("mix", settings.mixes, MIXES),
        ("system", settings.systems, SYSTEMS),
        ("clock", [settings.clock], CLOCKS),
    ):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--{option} {unknown[0]} is none of {', '.join(known)}.")
    if "ours" not in settings.systems or len(settings.systems) == 1:
        raise UserError("--system ours is compared with another one: name both.")
    if any(name.startswith("trl") for name in settings.systems) and "trl" not in trl_versions(settings.trl):
        raise UserError(f"{settings.trl} has no TRL: run `make trl-env`, or name its Python with --trl.")


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(settings: Settings, mix: str) -> Mix:
    data = write_mix(settings.data, settings.output / "data", mix, settings.pairs)
    runner = Runner(settings.model, settings.template, data, mix, settings.output, FULL, settings.trl, settings.clock)
    trials = {system: tried(runner, system, settings) for system in settings.systems}
    best = {system: min(found, key=lambda size: found[size]["per_pair"]) for system, found in trials.items()}
    runs: dict[str, list[Result]] = {system: [] for system in settings.systems}
    for turn in range(settings.rounds):
        for system, size in best.items():
            case = Case(system, "sigmoid", size)
            runs[system].append(runner.seconds(case, turn, settings.global_batch, settings.steps))

    pairs = runs["ours"][0]["pairs"]
    for system, found in runs.items():
        if found[0]["pairs"] != pairs:
            raise UserError(f"{system} trained on other tokens than ours.")
    rows = json.loads(runner.tokens().read_text(encoding="utf-8"))["rows"]
    prompts = [len(row["prompt_ids"]) for row in rows[: len(pairs)]]
    sides = [side(system, best[system], runs[system], trials[system], prompts) for system in settings.systems]
    return Mix(mix, pairs, mean(prompts), sides)


def tried(runner: Runner, system: str, settings: Settings) -> dict[int, Result]:
    """A short run at each micro-batch, up to where the next would hold more than the limit."""
    found: dict[int, Result] = {}
    sizes = sorted(settings.micro_batches)
    for size in sizes:
        if found and max(each["bytes"] for each in found.values()) * size / max(found) > settings.memory:
            break
        found[size] = runner.trial(Case(system, "sigmoid", size), sizes[-1])
    return found


def side(system: str, size: int, runs: Sequence[Result], trials: dict[int, Result], prompts: Sequence[int]) -> Side:
    """Join the rounds of a system."""
    from llamafactory_ext.training.logps import CHUNK

    measured = [
        (seconds, reference)
        for run in runs
        for seconds, reference in zip(run["steps"][1:], run["reference"][1:], strict=True)
    ]
    return Side(
        system=system,
        micro_batch=size,
        steps=[seconds - reference for seconds, reference in measured],
        in_reference=median(reference for _, reference in measured),
        losses=runs[0]["losses"],
        trials={each: trial["per_pair"] for each, trial in trials.items()},
        peaks={each: trial["bytes"] for each, trial in trials.items()},
        work=work(system, size, prompts, runs[0], CHUNK),
    )


if __name__ == "__main__":
    app()
