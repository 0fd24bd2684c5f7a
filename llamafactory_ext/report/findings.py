"""What a sweep has found, in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

from ..sweep.results import Result, SweepResults
from .judged import ALL, UNTRAINED, WinRates
from .look import Look
from .table import BASELINE, SIGNIFICANT, Comparison, Group


def findings(
    found: Sequence[Group], comparisons: Sequence[Comparison], look: Look, rates: Sequence[WinRates] = ()
) -> str:
    """Which setting scores best, whether it differs from DPO, which one ranks held-out pairs best, and what a judge
    prefers."""
    others = [_on_pairs(found, look), _on_judging(rates, look)]
    scored = any(group.accuracy is not None for group in found)
    problems = _on_problems(found, comparisons, look) if scored or not any(others) else ""
    return " ".join(filter(None, [problems, *others]))


def _on_problems(found: Sequence[Group], comparisons: Sequence[Comparison], look: Look) -> str:
    scored = [group for group in found if group.accuracy is not None]
    if not scored:
        return "No model has been scored on problems yet, so nothing can be said about accuracy."
    first, *ties = _best([group.accuracy or 0.0 for group in scored])
    best = scored[first]
    share = f"{_percent(best.accuracy)} of the problems"
    if len(scored) == 1:
        return f"Only {_named(best, look)} has been scored, so nothing can be compared: it solves {share}."
    if ties:
        equal = [scored[place] for place in (first, *ties)]
        names = " and ".join(_named(group, look) for group in equal) if len(equal) < 3 else f"{len(equal)} settings"
        return f"{names} share the highest strict accuracy, {_percent(best.accuracy)}; {_equals(equal, comparisons)}"
    highest = f"{_named(best, look)} has the highest strict accuracy, {_percent(best.accuracy)}"
    return f"{highest}; {_against_dpo(best, comparisons)}"


def _equals(equal: Sequence[Group], comparisons: Sequence[Comparison]) -> str:
    tested = [c for c in comparisons if c.group in equal]
    if not tested:
        return "none of them could be tested against DPO with the same settings."
    differ = sum(c.p_holm < SIGNIFICANT for c in tested)
    verb = "differ" if differ > 1 else "differs"
    return f"{differ or 'none'} of them {verb} significantly from DPO with the same settings."


def _against_dpo(best: Group, comparisons: Sequence[Comparison]) -> str:
    if best.variant.loss == BASELINE:
        others = [c for c in comparisons if c.baseline is best]
        worse = sum(c.p_holm < SIGNIFICANT and c.difference < 0 for c in others)
        if not others:
            return "no other method was tested against it."
        if not worse:
            return "no other method with the same settings differs significantly from it."
        verb = "is" if worse == 1 else "are"
        return f"{worse} of {len(others)} other methods with the same settings {verb} significantly worse."
    comparison = next((c for c in comparisons if c.group is best), None)
    if comparison is None:
        return "DPO was not scored with the same settings, so it is open whether the two differ."
    significant = "is" if comparison.p_holm < SIGNIFICANT else "is not"
    return (
        f"the difference of {100 * comparison.difference:+.1f} points to DPO with the same settings {significant} "
        f"significant (p = {comparison.p_holm:.2g} after Holm's correction)."
    )


def _on_pairs(found: Sequence[Group], look: Look) -> str:
    ranked = [(group, held_out) for group in found if (held_out := group.held_out) and held_out.pairs]
    if len(ranked) < 2:
        return ""
    first, *ties = _best([held_out.accuracy or 0.0 for _, held_out in ranked])
    group, held_out = ranked[first]
    if ties:
        return f"On held-out pairs, {len(ties) + 1} settings share the highest accuracy, {_percent(held_out.accuracy)}."
    assert held_out.accuracy_interval is not None
    low, high = (_percent(bound) for bound in held_out.accuracy_interval)
    return (
        f"On held-out pairs, {_named(group, look)} has the highest accuracy, {_percent(held_out.accuracy)} "
        f"(95% interval {low} to {high})."
    )


def _on_judging(rates: Sequence[WinRates], look: Look) -> str:
    judged = [each for each in rates if each.part == ALL]
    if not judged:
        return ""
    best = max(judged, key=lambda each: each.rate("win") - each.rate("lose"))
    name, judge = _named(best.group, look), best.judge
    begun = f"Judged by {judge}, {name}" if len(judged) == 1 else f"Of {len(judged)} settings judged by {judge}, {name}"
    against = look.labels[best.baseline.variant] if best.baseline else f"the {UNTRAINED} model"
    p = best.p if best.p_holm is None else best.p_holm
    return (
        f"{begun} {'does best: it ' if len(judged) > 1 else ''}wins {_percent(best.rate('win'))} and loses "
        f"{_percent(best.rate('lose'))} against {against}, which {'is' if p < SIGNIFICANT else 'is not'} significant "
        f"(p = {p:.2g} by a sign test over {best.questions} questions, after Holm's correction)."
    )


def best_cells(results: SweepResults) -> list[Result]:
    """The cells with the highest strict accuracy, in the order of the sweep; empty if none was scored."""
    scored = {cell.name: cell.summary["strict"]["accuracy"] for cell in results.cells if cell.summary}
    return [cell for cell in results.cells if scored and scored.get(cell.name) == max(scored.values())]


def _best(values: Sequence[float]) -> list[int]:
    """The places of all values that are the highest, but for rounding."""
    return [place for place, value in enumerate(values) if isclose(value, max(values))]


def _named(group: Group, look: Look) -> str:
    return f"{look.labels[group.variant]} (learning rate {group.learning_rate:g}, β = {group.beta:g})"


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0.0):.1f}%"
