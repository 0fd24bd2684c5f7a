"""What the runs of `benchmarks/training.py` come to: ratios, targets, tables and the figure. Nothing here trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from training_tokens import BINS, PairTokens, Result, flops, padding_share, peak_flops, prefix_histogram, tokens

Memory = Mapping[str, Mapping[str, Mapping[int, int]]]  # training or head -> system -> pairs in a micro-batch -> bytes

COLORS = {"stock": "#d55e00", "naive": "#cc79a7", "ours": "#0072b2"}


# --- timings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A configuration.

    Args:
        system: `stock` LLaMA-Factory; `naive`, Sr-DPO written on it; `cold`, the plugin with the reference's
            log-probabilities computed in the run; `ours`, the plugin with a warm cache of them.
        micro_batch: pairs.
    """

    system: str
    loss: str
    micro_batch: int


@dataclass(frozen=True)
class Timing:
    """All rounds of a configuration.

    Args:
        setup: seconds from the trainer being built to the first step, median.
        steps: seconds of each optimizer step, without the first of a run.
        losses: that the first round logged, step by step.
        padding: share of the policy's positions.
        mfu: model FLOPs utilization, None where the device's peak is not known.
    """

    case: Case
    setup: float
    steps: list[float]
    seconds: float
    pairs_per_second: float
    tokens_per_second: float
    losses: list[float]
    padding: float
    mfu: float | None


def timing(case: Case, results: Sequence[Result], global_batch: int, device: str) -> Timing:
    """Join the rounds of a configuration: steps of `global_batch` pairs on a device of that name."""
    first = results[0]
    pairs, shared = first["pairs"], case.system in ("ours", "cold")
    steps = [seconds for result in results for seconds in result["steps"][1:]]
    pairs_per_second = global_batch / median(steps)
    peak = peak_flops(device)
    work = sum(flops(pair, shared, first) for pair in pairs) / len(pairs)
    return Timing(
        case=case,
        setup=median(result["setup"] for result in results),
        steps=steps,
        seconds=median(steps),
        pairs_per_second=pairs_per_second,
        tokens_per_second=pairs_per_second * sum(tokens(pair, shared=False) for pair in pairs) / len(pairs),
        losses=first["losses"],
        padding=padding_share(pairs, shared, first["positions"]),
        mfu=None if peak is None else pairs_per_second * work / peak,
    )


@dataclass(frozen=True)
class Build:
    """A cache of the reference's log-probabilities, computed in a run: seconds above a run that finds it."""

    loss: str
    seconds: float
    pairs: int


def build(case: Case, results: Sequence[Result], warm: Timing) -> Build:
    return Build(case.loss, median(result["setup"] for result in results) - warm.setup, len(results[0]["pairs"]))


# --- what must be reached --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets(timings: Sequence[Timing], builds: Sequence[Build], memory: Memory, refined: Sequence[str]) -> list[Target]:
    """The ratios that are aimed at, of medians, as far as they were measured; each side at its best micro-batch.

    Args:
        refined: the losses with a refinement term.
    """
    speed = {timing.case: timing.pairs_per_second for timing in timings}

    def best(system: str, loss: str) -> float:
        return max(value for case, value in speed.items() if (case.system, case.loss) == (system, loss))

    stock = best("stock", "sigmoid")
    found = []
    for loss in dict.fromkeys(case.loss for case in speed if case.system == "ours"):
        if loss in refined:
            found.append(Target(f"{loss}: time per step over stock DPO's", stock / best("ours", loss), 0.75, False))
            continue
        found.append(Target(f"{loss}: pairs per second over stock DPO's", best("ours", loss) / stock, 2.0, True))
        four = {system: speed.get(Case(system, name, 4)) for system, name in (("stock", "sigmoid"), ("ours", loss))}
        if four["stock"] and four["ours"]:
            ratio = four["ours"] / four["stock"]
            found.append(Target(f"{loss}: the same, both at 4 pairs a micro-batch", ratio, 2.6, True))
    if any(case.system == "naive" for case in speed):
        ratio = best("ours", "sr_dpo") / best("naive", "sr_dpo")
        found.append(Target("sr_dpo: pairs per second over a naive Sr-DPO's", ratio, 2.0, True))
    for built in builds:
        if built.loss not in refined:
            ratio = 1 / (1 / best("ours", built.loss) + built.seconds / built.pairs) / stock
            found.append(Target(f"{built.loss}: one epoch, cache built in the run, over stock DPO's", ratio, 1.5, True))
    return found + _memory_targets(memory)


def _memory_targets(memory: Memory) -> list[Target]:
    stock, ours, head = memory["training"]["stock"], memory["training"]["ours"], memory["head"]["ours"]
    ratio = max(ours[size] / stock[size] for size in stock if size in ours)
    *smaller, largest = (head[size] for size in sorted(head))
    # Without a bound, it would be 2: each batch is twice as large as the one before. Chunks are not all of one size.
    growth = largest / max(smaller)
    return [
        Target("peak memory over stock's at the same micro-batch, the largest ratio", ratio, 0.5, False),
        Target(f"log-probabilities: peak of {max(head)} pairs over that of fewer", growth, 1.25, False),
    ]


# --- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Args:
        about: date, commit, versions, machine, settings.
        pairs: of the runs.
        refined: the losses with a refinement term.
    """

    about: dict[str, Any]
    pairs: Sequence[PairTokens]
    timings: Sequence[Timing]
    builds: Sequence[Build]
    memory: Memory
    refined: Sequence[str]

    @property
    def targets(self) -> list[Target]:
        return targets(self.timings, self.builds, self.memory, self.refined)

    @property
    def loss_difference(self) -> float | None:
        """The largest between a step's loss in ours and on LLaMA-Factory's path, if a loss was trained by both."""
        losses = {timing.case: timing.losses for timing in self.timings}
        differences = [
            abs(theirs - ours)
            for case in losses
            if case.system != "ours" and replace(case, system="ours") in losses
            for theirs, ours in zip(losses[case], losses[replace(case, system="ours")], strict=True)
        ]
        return max(differences, default=None)

    @property
    def tokens(self) -> dict[str, Any]:
        count = len(self.pairs)
        return {
            "pairs": count,
            "tokens_per_pair": sum(tokens(pair, shared=False) for pair in self.pairs) / count,
            "tokens_per_pair_prefix_once": sum(tokens(pair, shared=True) for pair in self.pairs) / count,
            "prefix_histogram": prefix_histogram(self.pairs),
        }

    def as_json(self) -> dict[str, Any]:
        return {
            **self.about,
            "tokens": self.tokens,
            "loss_difference": self.loss_difference,
            "timings": [asdict(timing) for timing in self.timings],
            "cache_builds": [asdict(build) for build in self.builds],
            "peak_bytes": self.memory,
            "targets": [asdict(target) | {"reached": target.reached} for target in self.targets],
        }


def show_about(about: Mapping[str, Any], console: Console) -> None:
    for name, value in about.items():
        listed = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        console.print(f"{name.replace('_', ' ')}: {listed}", markup=False, highlight=False)


def show(report: Report, console: Console) -> None:
    show_about(report.about, console)
    if report.loss_difference is not None:
        console.print(f"losses differ by at most {report.loss_difference:.1e} from LLaMA-Factory's", highlight=False)
    for table in (_tokens(report), _timings(report), _builds(report), *_memory(report), targets_table(report.targets)):
        console.print("", table)


def make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "loss") else "right")
    return table


def _tokens(report: Report) -> Table:
    found = report.tokens
    each, once = found["tokens_per_pair"], found["tokens_per_pair_prefix_once"]
    title = f"{found['pairs']} pairs of {each:.0f} tokens, {once:.0f} with the common prefix once"
    table = make_table(title, "tokens in the common prefix", "pairs", "")
    for index, count in enumerate(found["prefix_histogram"]):
        bar = "█" * round(30 * count / found["pairs"])
        table.add_row(f"{index / BINS:.0%} to {(index + 1) / BINS:.0%}", str(count), bar)
    return table


def _timings(report: Report) -> Table:
    stock = min(timing.seconds for timing in report.timings if timing.case.system == "stock")
    known = [timing.mfu for timing in report.timings if timing.mfu is not None]
    columns = ("", "loss", "batch", "s/step", "pairs/s", "tokens/s", "speed", "padding", *(["MFU"] if known else []))
    table = make_table("medians (batch: pairs in a micro-batch; speed: over stock's best)", *columns)
    for timing in report.timings:
        table.add_row(
            timing.case.system,
            timing.case.loss,
            str(timing.case.micro_batch),
            f"{timing.seconds:.2f}",
            f"{timing.pairs_per_second:.3f}",
            f"{timing.tokens_per_second:.0f}",
            f"{stock / timing.seconds:.2f}",
            f"{timing.padding:.1%}",
            *([] if timing.mfu is None else [f"{timing.mfu:.1%}"]),
        )
    return table


def _builds(report: Report) -> Table:
    table = make_table("caches built before the first step", "loss", "s", "pairs", "s/pair")
    for built in report.builds:
        table.add_row(built.loss, f"{built.seconds:.1f}", str(built.pairs), f"{built.seconds / built.pairs:.2f}")
    return table


def _memory(report: Report) -> list[Table]:
    titles = {"training": "peak, MiB", "head": "log-probabilities, MiB"}
    tables = []
    for part, title in titles.items():
        table = make_table(title, "batch", "stock", "ours", "ratio")
        stock, ours = report.memory[part]["stock"], report.memory[part]["ours"]
        for size in sorted({*stock, *ours}):
            ratio = f"{ours[size] / stock[size]:.2f}" if size in stock and size in ours else ""
            cells = [f"{curve[size] / 2**20:,.0f}" if size in curve else "" for curve in (stock, ours)]
            table.add_row(str(size), *cells, ratio)
        tables.append(table)
    return tables


def targets_table(targets: Sequence[Target]) -> Table:
    table = make_table("targets", "", "measured", "wanted", "reached")
    for target in targets:
        wanted = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        reached = "[green]yes[/]" if target.reached else "[red]no[/]"
        table.add_row(target.what, f"{target.value:.2f}", wanted, reached)
    return table


def plot(report: Report, path: Path) -> None:
    """Seconds per step relative to stock's best, and the two memory curves."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    bars, *curves = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    stock = min(timing.seconds for timing in report.timings if timing.case.system == "stock")
    for place, timing in enumerate(report.timings):
        bars.barh(place, timing.seconds / stock, color=COLORS[timing.case.system])
    cases = [timing.case for timing in report.timings]
    bars.set_yticks(range(len(cases)), [f"{case.system} {case.loss}, {case.micro_batch}" for case in cases])
    bars.invert_yaxis()
    bars.axvline(1, color="0.6", linewidth=0.8)
    bars.set_xlabel("time per step, relative to stock's best")
    for axes, part, title in zip(curves, ("training", "head"), ("training", "log-probabilities"), strict=True):
        for system, curve in report.memory[part].items():
            axes.plot(list(curve), [size / 2**30 for size in curve.values()], "o-", color=COLORS[system], label=system)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("pairs in a micro-batch")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    curves[0].set_ylabel("peak above what lasts (GiB)")
    curves[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
