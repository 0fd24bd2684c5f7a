"""The claims of arXiv 2405.21040."""

from __future__ import annotations

from itertools import pairwise

from ..table import SIGNIFICANT
from ..variants import Variant
from .study import (
    DPO,
    LIKE,
    MOST,
    PLAIN,
    SR,
    Finding,
    Study,
    Verdict,
    accuracy_of,
    held_out_margin,
    mean_seconds,
    nats,
    paired_test,
    so_many,
    verdict_of_all,
    verdict_of_most,
    with_lambda,
    with_size,
)

MARGINS, SIZES, BY_LAMBDA = "Figure 1", "Figure 2", "Table 5"
STEPS_IN_SMALL, SIZES_IN_SMALL = 8, 3  # of the study in small, whose failed cells are no verdict


def refinement_lowers_margins(study: Study, loss: str) -> Finding:
    refined, plain = Variant(loss), PLAIN[loss]
    group, baseline = study.against_plain(loss)
    p, difference = paired_test(group, baseline)
    ours, theirs = held_out_margin(group), held_out_margin(baseline)
    scored = group is not None and baseline is not None and None not in (group.accuracy, baseline.accuracy)
    alike = scored and abs(difference) < LIKE and p >= SIGNIFICANT
    verdict: Verdict = "cannot tell"
    if ours is not None and theirs is not None:
        verdict = "does not hold" if ours >= theirs else "holds" if alike else "cannot tell"
    return Finding(
        SR,
        f"{refined.name} has lower margins than {plain.name} at like accuracy.",
        f"{study.where(loss)}, the mean margin of held-out pairs is lower than {plain.name}'s, "
        f"and the accuracies on problems differ by less than {LIKE:.0%}, not significantly.",
        verdict,
        f"Margins {nats(ours)} against {nats(theirs)}; accuracy {accuracy_of(group)} against {accuracy_of(baseline)} "
        f"({difference:+.1%}, p = {p:.2g}).",
        exhibit=MARGINS,
        is_run=scored and ours is not None and theirs is not None,
    )


def more_lambda_lower_margins(study: Study) -> Finding:
    falls, words, missing = [], [], False
    for loss in PLAIN:
        if len(study.lambdas(loss)) < 2:
            continue
        margins = _margins_by_lambda(study, loss)
        known = [margin for margin in margins.values() if margin is not None]
        missing = missing or len(known) < len(margins)
        falls += [later < earlier for earlier, later in pairwise(known)]
        words.append(f"{', '.join(margins)}: {', '.join(map(nats, margins.values()))}")
    missing = missing or (study.in_small and len(falls) < STEPS_IN_SMALL)
    return Finding(
        SR,
        "The larger lambda, the lower the margin.",
        f"The mean margin of held-out pairs is lower at the next larger lambda, from 0 on, in {MOST} % of the steps; "
        f"it does not hold if in {100 - MOST} %.",
        "cannot tell" if missing else verdict_of_most(falls),
        f"Lower in {so_many(falls)} steps. {'; '.join(words)}.",
        exhibit=BY_LAMBDA,
        is_run=bool(falls),
    )


def _margins_by_lambda(study: Study, loss: str) -> dict[str, float | None]:
    """In words, the margins at each lambda, from 0 on if the loss without refinement was run."""
    rate, beta, _ = study.setting(loss)
    plain = study.one(PLAIN[loss], rate, beta)
    first, *others = study.lambdas(loss)
    margins = {} if plain is None else {PLAIN[loss].name: held_out_margin(plain)}
    margins[f"{Variant(loss).name} at {first}"] = held_out_margin(study.one(with_lambda(loss, first), rate, beta))
    return margins | {str(value): held_out_margin(study.one(with_lambda(loss, value), rate, beta)) for value in others}


def lower_at_every_size(study: Study) -> Finding:
    rate, beta, weight = study.setting("sr_dpo")
    sizes = study.sizes("sr_dpo")
    lower, words = [], []
    for size in sizes:
        refined, plain = (with_size(variant, size) for variant in (with_lambda("sr_dpo", weight), DPO))
        ours, theirs = (held_out_margin(study.one(variant, rate, beta)) for variant in (refined, plain))
        if ours is not None and theirs is not None:
            lower.append(ours < theirs)
        scores = f"{accuracy_of(study.one(refined, rate, beta))} and {accuracy_of(study.one(plain, rate, beta))}"
        words.append(f"{size:,} pairs: margins {nats(ours)} and {nats(theirs)}, accuracy {scores}")
    return Finding(
        SR,
        "Sr-DPO's margins are lower than DPO's however many pairs there are.",
        "The mean margin of held-out pairs is lower with every number of pairs; it does not hold if with none.",
        "cannot tell"
        if len(lower) < max(SIZES_IN_SMALL if study.in_small else 2, len(sizes))
        else verdict_of_all(lower),
        f"Sr-DPO and DPO with {'; '.join(words)}.",
        exhibit=SIZES,
        is_run=len(lower) > 1,
    )


def overhead(study: Study) -> Finding:
    refined, plain = map(mean_seconds, study.against_plain("sr_dpo"))
    ratio = refined / plain if refined and plain else None
    return Finding(
        SR,
        "The refinement costs little: a second forward pass without gradient.",
        f"Sr-DPO's training takes at most 1.5 times as long as DPO's, both with the plugin ({_coarse(study)}).",
        "cannot tell" if ratio is None else "holds" if ratio <= 1.5 else "does not hold",
        "not measured" if ratio is None else f"{refined:.0f} s against {plain:.0f} s: {ratio:.2f} times.",
        is_run=ratio is not None,
    )


def _coarse(study: Study) -> str:
    where = "two cells at a time on two cores, so a coarse figure" if study.in_small else "a coarse figure"
    return f"{where}; `make bench` measures it alone"
