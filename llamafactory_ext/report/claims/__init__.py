"""The claims of the two papers, each with a criterion that was settled before the study in small was run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .minor_dpo import (
    dpo_drives_both_down,
    higher_beta_smaller_margins,
    minor_dpo_keeps_chosen_up,
    minor_dpo_scores_best,
    minor_dpo_survives,
)
from .refinement import lower_at_every_size, more_lambda_lower_margins, overhead, refinement_lowers_margins
from .study import Finding, Study

SIGNS = {"holds": "holds", "does not hold": "**does not hold**", "cannot tell": "*cannot tell*"}


def findings(study: Study) -> list[Finding]:
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


def as_markdown(found: Sequence[Finding]) -> str:
    """A table with a row per claim."""
    lines = ["| paper | claim | verdict | measured | criterion |", "|---|---|---|---|---|"]
    for finding in found:
        cells = (finding.paper, finding.claim, SIGNS[finding.verdict], finding.numbers, finding.criterion)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
