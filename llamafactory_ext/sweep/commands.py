"""`llamafactory-ext sweep`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..planning.cost import PEAK, UTILIZATION, Gpu

Opt = typer.Option


class Launcher(StrEnum):
    local = "local"
    slurm = "slurm"
    ray = "ray"


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file.", metavar="SWEEP.yaml")],
    only: Annotated[
        list[str] | None, Opt(help="Only cells whose name matches this pattern, such as 'minor_dpo-*'.")
    ] = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Show the cells, steps and GPU hours; run nothing.")] = False,
    gpu: Annotated[str, Opt(help=f"With --dry-run, the GPU to price for: {', '.join(PEAK)}.")] = "h100",
    utilization: Annotated[
        float, Opt(min=0.01, max=1, help="With --dry-run, the share of the GPU's peak.")
    ] = UTILIZATION,
    tokens: Annotated[
        int | None, Opt(min=1, help="With --dry-run, tokens of a sequence (default: cutoff_len).")
    ] = None,
    rerun_failed: Annotated[bool, Opt("--rerun-failed", help="Try failed cells again.")] = False,
    train_only: Annotated[
        bool, Opt("--train-only", help="Train only; run the command again without it to score.")
    ] = False,
    apart: Annotated[bool, Opt("--apart", hidden=True, help="Only what belongs to one cell: a cluster's job.")] = False,
    shared: Annotated[bool, Opt("--shared", hidden=True, help="Only what cells share: a cluster's last job.")] = False,
    launcher: Annotated[Launcher, Opt(help="Here, or a cluster job per cell (needs the extra `cluster`).")] = (
        Launcher.local
    ),
) -> None:
    """Train and score a grid of recipes. If a run is interrupted, even by kill -9, rerun the same command to resume.

    llamafactory-ext sweep examples/metamath_qwen1.5_7b/sweep.yaml --dry-run

    llamafactory-ext sweep examples/metamath_qwen1.5_7b/sweep.yaml --only 'minor_dpo-*' --rerun-failed

    A sweep's file:

    ```yaml
    recipe: examples/demo/smollm2-135m_full_minor_dpo.yaml  # or its keys
    output: outputs/sweep                # a folder per cell: recipe, logs, model, scores
    axes:                                # or a list of such grids
      pref_loss: [sigmoid, sr_dpo]
      sr_lambda: {best_of: lambda.yaml, by: margin}  # or [0.1, 0.3]; chosen by an earlier sweep
    evaluators:                          # of each trained model, those that you want
    - gsm8k: {data: test.jsonl, engine: hf, base: true, options: {limit: 200}}  # of `eval gsm8k`; or python:
    - pairs: {dataset: test_pairs, max_samples: 500}  # of `score`
    - lm_eval: {tasks: open_llm_leaderboard, python: .venv-eval/bin/python}  # of `eval harness`
    - judge: {data: questions.jsonl, judge: gpt-4, baseline: sigmoid, engine: hf}  # of `eval answers` and `judge`
    gpus_per_cell: 1                     # without GPUs, at_once: cells at a time
    launcher: {timeout_min: 720}         # of submitit's AutoExecutor, or of Ray's client
    ```

    Keys that a cell's loss does not take are dropped from its recipe. `llamafactory-ext report OUTPUT` makes the page.

    Exit status: 0 if everything is done, 1 if a command failed or is not done, 2 if the file is wrong.
    """
    from .conduct import Part, conduct
    from .price import Pricing

    if gpu not in PEAK:
        raise UserError(f"--gpu {gpu} is unknown: write one of {', '.join(PEAK)}.")
    pricing = Pricing(Gpu(gpu, utilization), tokens)
    flags = {Part.train: train_only, Part.apart: apart, Part.shared: shared}
    part = next((part for part, given in flags.items() if given), Part.all)
    if not conduct(file, only or [], launcher, part, dry_run=pricing if dry_run else None, rerun_failed=rerun_failed):
        raise typer.Exit(1)
