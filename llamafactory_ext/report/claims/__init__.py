"""The claims of the two papers, each with a criterion that was settled before anything was run that it judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .minor_dpo import (
    dpo_drives_both_down,
    higher_beta_smaller_margins,
    minor_dpo_keeps_chosen_up,
    minor_dpo_scores_best,
    minor_dpo_survives,
)
from .quality import (
    agrees_better_with_scores,
    keeps_accuracy_at_lower_margins,
    scores_higher_on_benchmarks,
    wins_more_than_it_loses,
)
from .refinement import lower_at_every_size, more_lambda_lower_margins, overhead, refinement_lowers_margins
from .study import PLAIN, Finding, Study

SIGNS = {"holds": "holds", "does not hold": "**does not hold**", "cannot tell": "*cannot tell*"}


def findings(study: Study) -> list[Finding]:
    """What becomes of the claims that the study in small was made for."""
    checks: list[Callable[[Study], Finding]] = [
        dpo_drives_both_down,
        minor_dpo_keeps_chosen_up,
        higher_beta_smaller_margins,
        minor_dpo_survives,
        minor_dpo_scores_best,
        lambda study: refinement_lowers_margins(study, "sr_dpo"),
        lambda study: refinement_lowers_margins(study, "sr_ipo"),
        more_lambda_lower_margins,
        lower_at_every_size,
        overhead,
    ]
    return [check(study) for check in checks]


def all_findings(study: Study) -> list[Finding]:
    """Those, and what becomes of the claims that need a judge, benchmarks, or scores in the data."""
    checks = (
        wins_more_than_it_loses,
        scores_higher_on_benchmarks,
        agrees_better_with_scores,
        keeps_accuracy_at_lower_margins,
    )
    return [*findings(study), *(check(study, loss) for check in checks for loss in PLAIN)]


def as_markdown(found: Sequence[Finding]) -> str:
    """A table with a row per claim."""
    lines = ["| paper | claim | verdict | measured | criterion |", "|---|---|---|---|---|"]
    for finding in found:
        cells = (finding.paper, finding.claim, SIGNS[finding.verdict], finding.numbers, finding.criterion)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
