"""The claims of arXiv 2408.09834."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..table import SIGNIFICANT, Group
from .study import (
    DPO,
    DPOP,
    GRID,
    MINOR,
    MINOR_DPO,
    MOST,
    Finding,
    Study,
    Verdict,
    accuracy_of,
    ends_by_rate,
    final_log_ratio,
    paired_test,
    percent,
    so_many,
    verdict_of_most,
)

REWARDS, ACCURACY = "Figures 2 to 5", "Figure 6"

# --- curves ----------------------------------------------------------------------------------------------------------


def dpo_drives_both_down(study: Study) -> Finding:
    groups = study.of(DPO)
    chosen, rejected = ([final_log_ratio(group, side) for group in groups] for side in ("chosen", "rejected"))
    below = [c < 0 and r < 0 for c, r in zip(chosen, rejected, strict=True)]
    return Finding(
        MINOR,
        "DPO drives the rewards of chosen and rejected answers alike below 0.",
        f"Both final log-ratios are below 0 in {MOST} % of DPO's settings; it does not hold if in {100 - MOST} %.",
        "cannot tell" if study.misses(DPO) else verdict_of_most(below),
        f"Both below 0 in {so_many(below)} settings; {ends_by_rate(study, DPO, 'chosen')}; "
        f"{ends_by_rate(study, DPO, 'rejected')}.",
        exhibit=REWARDS,
        is_run=_have_curves(groups),
    )


def _have_curves(groups: Sequence[Group]) -> bool:
    return any(group.final("normalized_rewards/chosen") is not None for group in groups)


def minor_dpo_keeps_chosen_up(study: Study) -> Finding:
    groups = study.of(MINOR_DPO)
    above = [final_log_ratio(group, "chosen") > 0 for group in groups]
    return Finding(
        MINOR,
        "MinorDPO keeps the rewards of chosen answers above 0.",
        f"The final chosen log-ratio is above 0 in {MOST} % of MinorDPO's settings; it does not hold if in "
        f"{100 - MOST} %.",
        "cannot tell" if study.misses(MINOR_DPO) else verdict_of_most(above),
        f"Above 0 in {so_many(above)} settings; {ends_by_rate(study, MINOR_DPO, 'chosen')}.",
        exhibit=REWARDS,
        is_run=_have_curves(groups),
    )


def higher_beta_smaller_margins(study: Study) -> Finding:
    falls, words = [], []
    run = [variant for variant in GRID if study.of(variant)]
    for variant in run:
        for rate in study.rates:
            margins = [final_log_ratio(group, "margins") for group in study.of(variant, rate)]
            falls += [later < earlier for earlier, later in pairwise(margins)]
            words.append(f"{variant.name} at {rate:g}: {', '.join(f'{margin:.2f}' for margin in margins)}")
    return Finding(
        MINOR,
        "A higher beta gives smaller margins.",
        f"The final margin (log-ratios) is smaller at the next higher beta in {MOST} % of the steps along beta; it "
        f"does not hold if in {100 - MOST} %.",
        "cannot tell" if study.misses(*run) else verdict_of_most(falls),
        f"Smaller in {so_many(falls)} steps. Margins in nats by beta: {'; '.join(words)}.",
        exhibit=REWARDS,
        is_run=bool(falls) and _have_curves([group for variant in run for group in study.of(variant)]),
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def minor_dpo_survives(study: Study) -> Finding:
    rate, beta = (study.rates[-1], study.betas[0]) if study.groups else (0.0, 0.0)
    minor, dpo = study.one(MINOR_DPO, rate, beta), study.one(DPO, rate, beta)
    p, difference = paired_test(minor, dpo)
    verdict: Verdict = "cannot tell"
    scored = minor is not None and minor.accuracy is not None
    if study.untrained is not None and minor is not None and minor.accuracy is not None:
        half = study.untrained / 2
        survives = not study.in_small and dpo is not None and dpo.accuracy is not None and dpo.accuracy > half
        if minor.accuracy <= half or (difference < 0 and p < SIGNIFICANT) or survives:
            verdict = "does not hold"
        elif difference > 0 and p < SIGNIFICANT:
            verdict = "holds"
    accuracies = [f"{v.name} {', '.join(accuracy_of(study.one(v, rate, b)) for b in study.betas)}" for v in GRID]
    return Finding(
        MINOR,
        "At the high rate and a low beta DPO degenerates and MinorDPO does not.",
        f"At {rate:g} and beta {beta:g}, MinorDPO solves more than half of what the untrained model solves, and more "
        f"than DPO (paired test over problems, p < 0.05). {_that_dpo_breaks(study)}",
        verdict,
        f"Accuracy at {rate:g} by beta (untrained {percent(study.untrained)}): {'; '.join(accuracies)}; MinorDPO "
        f"against DPO at beta {beta:g}: {difference:+.1%}, p = {p:.2g}. Empty, looping or repetitive outputs there: "
        f"DPO {percent(dpo.degenerate if dpo else None)}, MinorDPO {percent(minor.degenerate if minor else None)}.",
        exhibit=ACCURACY,
        is_run=scored,
    )


def _that_dpo_breaks(study: Study) -> str:
    if study.in_small:
        return "That DPO breaks there is how the rate was chosen: no finding."
    return "It does not hold if MinorDPO does not, or if DPO solves more than half as well."


def minor_dpo_scores_best(study: Study) -> Finding:
    verdicts, words = [], []
    for rate in study.rates:
        best = {variant: study.best(variant, rate) for variant in GRID}
        rivals = [group for variant in (DPO, DPOP) if (group := best[variant]) is not None]
        rival = max(rivals, key=lambda group: group.accuracy or 0.0, default=None)
        p, difference = paired_test(best[MINOR_DPO], rival)
        verdicts.append("cannot tell" if p >= SIGNIFICANT else "holds" if difference > 0 else "does not hold")
        scores = ", ".join(f"{v.name} {accuracy_of(g)} (beta {g.beta:g})" for v, g in best.items() if g)
        words.append(f"at {rate:g}: {scores}, MinorDPO minus the better of the others {difference:+.1%}, p = {p:.2g}")
    verdict: Verdict = "cannot tell"
    if "does not hold" in verdicts:
        verdict = "does not hold"
    elif set(verdicts) == {"holds"}:
        verdict = "holds"
    return Finding(
        MINOR,
        f"MinorDPO's best score tops those of DPO and DPOP {study.at_all_rates}.",
        f"The best of MinorDPO's betas solves more than the best of the others' {study.at_all_rates}, each with p < "
        "0.05 (paired test over problems); it does not hold if it solves fewer at one, with p < 0.05.",
        verdict,
        f"Best of each: {'; '.join(words)}.",
        exhibit=ACCURACY,
        is_run=any(
            study.best(MINOR_DPO, rate) and (study.best(DPO, rate) or study.best(DPOP, rate)) for rate in study.rates
        ),
    )
