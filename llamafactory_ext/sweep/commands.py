"""`llamafactory-ext sweep`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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
    dry_run: Annotated[bool, Opt("--dry-run", help="Show the cells, steps and time; run nothing.")] = False,
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
      pref_loss: [sigmoid, minor_dpo]
      pref_beta: [0.1, 0.5]
    evaluation: {data: test.jsonl, engine: hf, base: true, options: {limit: 200}}  # of `eval gsm8k`; or python:
    held_out: {dataset: test_pairs, max_samples: 500}  # pairs to score
    gpus_per_cell: 1                     # without GPUs, at_once: cells at a time
    launcher: {timeout_min: 720}         # of submitit's AutoExecutor, or of Ray's client
    ```

    Keys that a cell's loss does not take are dropped from its recipe. `llamafactory-ext report OUTPUT` makes the page.

    Exit status: 0 if everything is done, 1 if a command failed or is not done, 2 if the file is wrong.
    """
    from .conduct import Part, conduct

    flags = {Part.train: train_only, Part.apart: apart, Part.shared: shared}
    part = next((part for part, given in flags.items() if given), Part.all)
    if not conduct(file, only or [], launcher, part, dry_run=dry_run, rerun_failed=rerun_failed):
        raise typer.Exit(1)
