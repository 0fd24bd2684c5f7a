"""What the runs of `benchmarks/systems.py` come to: ratios, goals, tables and the figure. Nothing here trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from systems_count import Work
from training_report import Target, make_table, show_about, targets_table
from training_tokens import PairTokens, tokens

SYSTEMS = {"stock": "stock", "trl": "TRL", "trl_narrow": "TRL narrow", "ours": "ours"}
COLORS = {"stock": "#d55e00", "trl": "#009e73", "trl_narrow": "#56b4e9", "ours": "#0072b2"}
MIXES = {
    "differ_late": "pairs that differ late",
    "share_prompt": "pairs that share the prompt only",
    "long_prompt": "long prompts, short responses",
}
# Our speed over that of the fastest other system; our memory over that of the smallest.
SPEED = {"differ_late": 2.2, "share_prompt": 2.0, "long_prompt": 3.0}
MEMORY = 0.6


@dataclass(frozen=True)
class Side:
    """A system on a mix.

    Args:
        micro_batch: pairs at a time, those of the fastest trial.
        steps: seconds of each optimizer step, the reference's log-probabilities known, without the first of a run.
        in_reference: seconds that a step took beside that, because the system does not take them from a file.
        losses: step by step.
        trials: seconds per pair, without the optimizer, by pairs in a micro-batch.
        peaks: bytes above what lasts, likewise.
    """

    system: str
    micro_batch: int
    steps: list[float]
    in_reference: float
    losses: list[float]
    trials: Mapping[int, float]
    peaks: Mapping[int, int]
    work: Work

    @cached_property
    def seconds(self) -> float:
        return median(self.steps)

    @property
    def peak(self) -> int:
        """At its best micro-batch."""
        return self.peaks[self.micro_batch]


@dataclass(frozen=True)
class Mix:
    """All systems on one mix of pairs.

    Args:
        pairs: of the runs.
        prompt: mean tokens of the prompts.
    """

    name: str
    pairs: Sequence[PairTokens]
    prompt: float
    sides: Sequence[Side]

    @cached_property
    def ours(self) -> Side:
        return next(side for side in self.sides if side.system == "ours")

    @cached_property
    def others(self) -> list[Side]:
        return [side for side in self.sides if side is not self.ours]

    @cached_property
    def fastest(self) -> Side:
        """Of the others."""
        return min(self.others, key=lambda side: side.seconds)

    @property
    def speed(self) -> float:
        return self.fastest.seconds / self.ours.seconds

    @property
    def counted(self) -> float:
        """The ratio of operations that `speed` would be if both computed at the same rate."""
        return self.fastest.work.operations / self.ours.work.operations

    @property
    def memory(self) -> float:
        """Our peak over the smallest other's, the largest ratio of the micro-batches that were tried."""
        ratios = []
        for size, peak in self.ours.peaks.items():
            others = [side.peaks[size] for side in self.others if size in side.peaks]
            ratios += [peak / min(others)] if others else []
        return max(ratios)

    @property
    def loss_difference(self) -> float:
        """The largest of a step's losses between ours and another system's."""
        return max(
            abs(theirs - ours)
            for side in self.others
            for theirs, ours in zip(side.losses, self.ours.losses, strict=True)
        )

    @property
    def targets(self) -> list[Target]:
        name, fastest = MIXES[self.name], self.fastest
        best = self.ours.peak / min(side.peak for side in self.others)
        return [
            Target(f"{name}: speed over {SYSTEMS[fastest.system]}", self.speed, SPEED[self.name], True),
            Target(f"{name}: peak memory at the same micro-batch, largest ratio", self.memory, MEMORY, False),
            Target(f"{name}: peak memory, each at its best micro-batch", best, MEMORY, False),
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "mix": self.name,
            "pairs": len(self.pairs),
            "tokens_per_pair": mean(tokens(pair, shared=False) for pair in self.pairs),
            "tokens_per_pair_prefix_once": mean(tokens(pair, shared=True) for pair in self.pairs),
            "tokens_per_prompt": self.prompt,
            "sides": [asdict(side) | {"seconds": side.seconds} for side in self.sides],
            "speed": self.speed,
            "counted": self.counted,
            "loss_difference": self.loss_difference,
            "targets": [asdict(target) | {"reached": target.reached} for target in self.targets],
        }


# --- what is shown ---------------------------------------------------------------------------------------------------


def show(about: Mapping[str, Any], mixes: Sequence[Mix], console: Console) -> None:
    show_about(about, console)
    for mix in mixes:
        console.print("", _sides(mix), _trials(mix), sep="\n")
        console.print(
            f"ours is {mix.speed:.2f} times as fast as {SYSTEMS[mix.fastest.system]}, which computes {mix.counted:.2f} "
            f"times as many operations; losses differ by at most {mix.loss_difference:.1e}",
            highlight=False,
            soft_wrap=True,
        )
    console.print("", targets_table([target for mix in mixes for target in mix.targets]))


def _sides(mix: Mix) -> Table:
    found = mix.as_json()
    table = make_table(
        f"{MIXES[mix.name]}: {found['pairs']} pairs of {found['tokens_per_pair']:.0f} tokens, "
        f"{found['tokens_per_pair_prefix_once']:.0f} with the shared prefix once, {mix.prompt:.0f} in the prompt; "
        "medians, and counts a pair",
        "",
        "batch",
        "s/step",
        "of ours",
        "reference",
        "body",
        "head",
        "GFLOP",
        "MiB",
    )
    for side in mix.sides:
        table.add_row(
            SYSTEMS[side.system],
            str(side.micro_batch),
            f"{side.seconds:.2f}",
            f"{side.seconds / mix.ours.seconds:.2f}",
            f"{side.in_reference:.2f}" if side.in_reference else "",
            f"{side.work.body:.0f}",
            f"{side.work.head:.0f}",
            f"{side.work.operations / 1e9:.0f}",
            f"{side.peak / 2**20:,.0f}",
        )
    return table


def _trials(mix: Mix) -> Table:
    sizes = sorted({size for side in mix.sides for size in side.trials})
    table = make_table(
        "trials by pairs in a micro-batch: seconds per pair, and peak in MiB", "", *(str(size) for size in sizes)
    )
    for side in mix.sides:
        cells = [
            f"{side.trials[size]:.2f}, {side.peaks[size] / 2**20:,.0f}" if size in side.trials else "" for size in sizes
        ]
        table.add_row(SYSTEMS[side.system], *cells)
    return table


def plot(mixes: Sequence[Mix], path: Path) -> None:
    """Seconds per step of each system, relative to ours, a panel per mix."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(13, 2.6), layout="constrained")
    panels = figure.subplots(1, len(mixes), sharey=True, squeeze=False)[0]
    for axes, mix in zip(panels, mixes, strict=True):
        for place, side in enumerate(mix.sides):
            bar = axes.barh(place, side.seconds / mix.ours.seconds, color=COLORS[side.system])
            axes.bar_label(bar, fmt="%.2f", padding=3)
        axes.set_yticks(range(len(mix.sides)), [SYSTEMS[side.system] for side in mix.sides])
        axes.set_title(MIXES[mix.name])
        axes.set_xlabel("time per step, relative to ours")
        axes.margins(x=0.15)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
