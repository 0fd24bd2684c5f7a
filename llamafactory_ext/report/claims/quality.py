"""The claims of arXiv 2405.21040 about the quality of what is learned: its Tables 2 to 5.

Each is judged for a refined loss against the loss without its refinement, on the same questions, examples or pairs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..benchmarks import differences_of, mean_of_means, paired
from ..correlations import correlation_gain
from ..judged import is_against, outcomes_of, sign_test_p, won_and_lost
from ..table import SIGNIFICANT, Group, Interval, same_seeds, t_interval
from ..variants import Variant
from .study import LIKE, PLAIN, SR, Finding, Study, Verdict

JUDGED, BENCHMARKS, SCORES, HELD_OUT = "Table 2", "Table 3", "Table 4", "Table 5"


def wins_more_than_it_loses(study: Study, loss: str) -> Finding:
    name, plain = Variant(loss).name, PLAIN[loss].name
    group, baseline = study.against_plain(loss)
    is_run = group is not None and baseline is not None and is_against(group, baseline)
    rows = outcomes_of(group.cells) if group is not None and is_run else []
    (won, lost), p = won_and_lost(rows), sign_test_p(rows)
    questions = len({row["id"] for row in rows})
    verdict: Verdict = "cannot tell"
    if p < SIGNIFICANT:
        verdict = "holds" if won > lost else "does not hold"
    judge = group.cells[0].judged["judge"] if is_run and group and group.cells[0].judged else "none"
    return Finding(
        SR,
        f"A judge prefers {name}'s answers to {plain}'s.",
        f"{study.where(loss)}, {name} wins more questions than it loses against {plain}, by most of the verdicts over "
        f"turns and seeds (sign test over questions, p < {SIGNIFICANT}); it does not hold if it loses more, with p < "
        f"{SIGNIFICANT}.",
        verdict,
        f"Of {questions} questions {won} won and {lost} lost, p = {p:.2g}; judge: {judge}."
        if is_run
        else "not measured",
        exhibit=JUDGED,
        is_run=is_run,
    )


def scores_higher_on_benchmarks(study: Study, loss: str) -> Finding:
    name, plain = Variant(loss).name, PLAIN[loss].name
    group, baseline = study.against_plain(loss)
    ours, theirs = paired(group, baseline) if group and baseline else ([], [])
    gain = mean_of_means(list(differences_of(ours, theirs).values())) if ours else None
    interval = gain.interval if gain else None
    return Finding(
        SR,
        f"{name} reaches a higher average over the benchmarks than {plain}.",
        f"{study.where(loss)}, the 95 % interval of the difference of averages, example by example, lies above 0; it "
        "does not hold if it lies below.",
        _side(interval),
        "not measured"
        if gain is None
        else f"{gain.value:+.4f}, interval {_words(interval, 4)}; "
        f"tasks: {', '.join(ours[0].tasks)}; seeds: {len(ours)}.",
        exhibit=BENCHMARKS,
        is_run=gain is not None,
    )


def agrees_better_with_scores(study: Study, loss: str) -> Finding:
    name, plain = Variant(loss).name, PLAIN[loss].name
    group, baseline = study.against_plain(loss)
    gain = correlation_gain(group, baseline).get("Spearman") if group and baseline else None
    interval = gain.interval if gain else None
    return Finding(
        SR,
        f"{name}'s margins agree better with the data's own scores than {plain}'s.",
        f"{study.where(loss)}, the 95 % interval (bootstrap over held-out pairs) of the difference of Spearman's "
        "correlations lies above 0; it does not hold if it lies below.",
        _side(interval),
        "not measured" if gain is None else f"{gain.value:+.3f}, interval {_words(interval, 3)}.",
        exhibit=SCORES,
        is_run=gain is not None,
    )


def keeps_accuracy_at_lower_margins(study: Study, loss: str) -> Finding:
    name, plain = Variant(loss).name, PLAIN[loss].name
    group, baseline = study.against_plain(loss)
    margin, accuracy = held_out_differences(group, baseline) if group and baseline else (np.zeros(0), np.zeros(0))
    of_margin, of_accuracy = t_interval(margin.tolist()), t_interval(accuracy.tolist())
    verdict: Verdict = "cannot tell"
    if of_margin is not None and of_accuracy is not None:
        if of_margin[1] < 0 and of_accuracy[0] > -LIKE:
            verdict = "holds"
        elif of_margin[0] > 0 or of_accuracy[1] < -LIKE:
            verdict = "does not hold"
    return Finding(
        SR,
        f"{name} keeps {plain}'s accuracy on held-out pairs at a lower margin.",
        f"{study.where(loss)}, the 95 % interval of the difference of margins, pair by pair, lies below 0, and that of "
        f"the difference of accuracies above -{LIKE:g}; it does not hold if the former lies above 0, or the latter "
        f"below -{LIKE:g}.",
        verdict,
        f"Margins {margin.mean():+.3f} nats, interval {_words(of_margin, 3)}; accuracies {accuracy.mean():+.3f}, "
        f"interval {_words(of_accuracy, 3)}; {len(margin):,} pairs."
        if len(margin)
        else "not measured",
        exhibit=HELD_OUT,
        is_run=len(margin) > 1,
    )


def held_out_differences(group: Group, baseline: Group) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By pair, the differences of margins in nats and of shares of seeds that rank it right, on what both have scored.

    Shapes (pairs,), as means over the seeds that both have.
    """
    pairs = [(a, b) for a, b in same_seeds(group.cells, baseline.cells) if a.margins and b.margins]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    shared = sorted(set.intersection(*(set(cell.margins) for pair in pairs for cell in pair)))
    ours, theirs = (
        np.array([[cell.margins[index] for index in shared] for cell in side]) for side in zip(*pairs, strict=True)
    )
    right = (ours > 0).astype(np.float64) - (theirs > 0)
    return (ours - theirs).mean(axis=0), right.mean(axis=0)


def _side(interval: Interval | None) -> Verdict:
    """Of an interval that should lie above 0."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "cannot tell"
    return "holds" if interval[0] > 0 else "does not hold"


def _words(interval: Interval | None, digits: int) -> str:
    return "unknown" if interval is None else f"{interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}"
