"""Prints a plan: tables, notes, and settings that fit."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.table import Table

from ..recipe.reading import Settings
from .memory import GIB
from .plan import Plan


def render(plan: Plan, console: Console, found: Sequence[tuple[Settings, Plan]] | None = None) -> None:
    """Print a plan.

    Args:
        plan: of the recipe as written.
        console: where to print.
        found: from `alternatives`, or None if it was not called.
    """
    console.print(_schedule_table(plan))
    console.print(_memory_table(plan))
    for note in plan.notes:
        console.print(f"Note: {note}", markup=False)
    if found is None:
        return
    if not found:
        console.print("No batch size, checkpointing, ZeRO, LoRA or QLoRA makes it fit: use more or larger GPUs.")
        return
    console.print("Settings that fit with the same global batch, smallest change first:")
    for changes, other in found:
        host = f", and {other.host_memory / GIB:.0f} GiB of host memory per node" if other.host_memory else ""
        console.print(f"\n{other.total / GIB:.1f} GiB per GPU{host} ({other.engine}):", markup=False)
        console.print(yaml.safe_dump(changes, sort_keys=False).rstrip(), markup=False)


def _schedule_table(plan: Plan) -> Table:
    schedule = plan.schedule
    table = Table(title="Steps", show_header=False)
    rows = {
        "GPUs": f"{plan.gpus} ({plan.engine})",
        "parameters (trainable)": f"{plan.parameters:,} ({plan.trained:,})",
        "pairs": schedule.pairs,
        "global batch (pairs)": schedule.global_batch,
        "steps per epoch": schedule.steps_per_epoch,
        "steps": schedule.steps,
        "warm-up steps": schedule.warmup_steps,
        "tokens per step": schedule.tokens_per_step,
        "tokens": schedule.tokens,
    }
    for name, value in rows.items():
        table.add_row(name, "unknown" if value is None else value if isinstance(value, str) else f"{value:,}")
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table("memory per GPU", "GiB", title=f"Memory for sequences of {plan.cutoff_len} tokens")
    table.columns[1].justify = "right"
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    table.add_row(f"total: {verdict} in {plan.gpu_memory / GIB:g} GiB", f"{plan.total / GIB:.2f}")
    if plan.host_memory:
        table.add_row("host memory per node", f"{plan.host_memory / GIB:.2f}")
    if plan.deepspeed_estimate is not None:
        gpu, host = plan.deepspeed_estimate
        table.add_row("DeepSpeed's estimate: weights, gradients, optimizer", f"{gpu / GIB:.2f}")
        table.add_row("DeepSpeed's estimate: host memory per node", f"{host / GIB:.2f}")
    return table
