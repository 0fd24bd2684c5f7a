"""The rule that turns the pilot into the grid's two learning rates. It was settled before either was run."""

from __future__ import annotations

from collections.abc import Mapping


def choose_rates(accuracies: Mapping[float, float], untrained: float) -> tuple[float, float]:
    """The grid's lower and upper learning rate.

    Upper: the smallest rate of the pilot's ladder at which DPO solves at most half of what the untrained model solves;
    the largest of the ladder if there is none. Lower: a tenth of it, as in arXiv 2408.09834 (1e-6 and 1e-5). So
    that DPO degenerates at the upper rate is how the rate was found, and no finding.

    Args:
        accuracies: of DPO in the pilot, by learning rate.
        untrained: the accuracy of the model that all trainings start from.
    """
    broken = [rate for rate, accuracy in sorted(accuracies.items()) if accuracy <= untrained / 2]
    upper = broken[0] if broken else max(accuracies)
    return upper / 10, upper
