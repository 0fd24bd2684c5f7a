"""The claims of arXiv 2405.21040."""

from __future__ import annotations

from itertools import pairwise

from ..variants import Variant
from .study import (
    DPO,
    LIKE,
    MOST,
    PLAIN,
    SIGNIFICANT,
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


def refinement_lowers_margins(study: Study, loss: str) -> Finding:
    rate, beta = study.rates[0], 0.1
    refined, plain = with_lambda(loss, 0.3), PLAIN[loss]
    group, baseline = study.one(refined, rate, beta), study.one(plain, rate, beta)
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
        f"At the lower rate, beta 0.1 and lambda 0.3, the mean margin of held-out pairs is lower than {plain.name}'s, "
        f"and the accuracies on problems differ by less than {LIKE:.0%}, not significantly.",
        verdict,
        f"Margins {nats(ours)} against {nats(theirs)}; accuracy {accuracy_of(group)} against {accuracy_of(baseline)} "
        f"({difference:+.1%}, p = {p:.2g}).",
    )


def more_lambda_lower_margins(study: Study) -> Finding:
    falls, words = [], []
    lambdas = (0.1, 0.3, 0.5, 1.0)
    for loss, plain in PLAIN.items():
        variants = [plain, *(with_lambda(loss, value) for value in lambdas)]
        margins = [held_out_margin(study.one(variant, study.rates[0], 0.1)) for variant in variants]
        known = [margin for margin in margins if margin is not None]
        falls += [later < earlier for earlier, later in pairwise(known)]
        at = f"{plain.name}, {Variant(loss).name} at {', '.join(map(str, lambdas))}"
        words.append(f"{at}: {', '.join(map(nats, margins))}")
    return Finding(
        SR,
        "The larger lambda, the lower the margin.",
        f"The mean margin of held-out pairs is lower at the next larger lambda, from 0 on, in {MOST} % of the steps; "
        f"it does not hold if in {100 - MOST} %.",
        "cannot tell" if len(falls) < 8 else verdict_of_most(falls),
        f"Lower in {so_many(falls)} steps. {'; '.join(words)}.",
    )


def lower_at_every_size(study: Study) -> Finding:
    rate = study.rates[0]
    sizes = (256, 512, 1024)
    lower, words = [], []
    for size in sizes:
        refined, plain = (with_size(variant, size) for variant in (with_lambda("sr_dpo", 0.3), DPO))
        ours, theirs = (held_out_margin(study.one(variant, rate, 0.1)) for variant in (refined, plain))
        if ours is not None and theirs is not None:
            lower.append(ours < theirs)
        scores = f"{accuracy_of(study.one(refined, rate, 0.1))} and {accuracy_of(study.one(plain, rate, 0.1))}"
        words.append(f"{size:,} pairs: margins {nats(ours)} and {nats(theirs)}, accuracy {scores}")
    return Finding(
        SR,
        "Sr-DPO's margins are lower than DPO's however many pairs there are.",
        "The mean margin of held-out pairs is lower with every number of pairs; it does not hold if with none.",
        "cannot tell" if len(lower) < len(sizes) else verdict_of_all(lower),
        f"Sr-DPO and DPO with {'; '.join(words)}.",
    )


def overhead(study: Study) -> Finding:
    rate = study.rates[0]
    refined, plain = (mean_seconds(study.one(variant, rate, 0.1)) for variant in (with_lambda("sr_dpo", 0.3), DPO))
    ratio = refined / plain if refined and plain else None
    return Finding(
        SR,
        "The refinement costs little: a second forward pass without gradient.",
        "Sr-DPO's training takes at most 1.5 times as long as DPO's, both with the plugin (two cells at a time on two "
        "cores, so a coarse figure; `make bench` measures it alone).",
        "cannot tell" if ratio is None else "holds" if ratio <= 1.5 else "does not hold",
        "not measured" if ratio is None else f"{refined:.0f} s against {plain:.0f} s: {ratio:.2f} times.",
    )
