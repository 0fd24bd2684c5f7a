"""Which figures a sweep has something to show in, and the words above and below each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..sweep.results import SweepResults
from .curves import refinement_figure, reward_figure, reward_list_figure, training_figure
from .figures import coefficient_figure, score_figure, score_list_figure, sizes_figure
from .look import Look
from .papers import untrained_accuracy
from .table import Group
from .variants import UNREFINED, Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COEFFICIENT = ("sigmoid", "minor_dpo", "dpop", "sr_dpo")  # the log-sigmoid losses, which have one


class Drawn(NamedTuple):
    """A figure of the report.

    Args:
        name: of its files.
        title, caption: above and below it.
        figure: what is drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def draw(results: SweepResults, found: Sequence[Group], look: Look) -> Iterator[Drawn]:
    """All figures that the sweep has data for."""
    several_sizes = len({group.variant.size for group in found if group.variant.size}) > 1
    sized = [group for group in found if group.variant.size and several_sizes]  # these have a figure of their own
    others = [group for group in found if group not in sized]
    yield from _scores(results, others, look)
    for rate in sorted({group.learning_rate for group in others}):
        yield from _curves([group for group in others if group.learning_rate == rate], others, rate, look)
    yield from _refinement(others, look)
    sizes = sizes_figure(sized, look)
    if sizes is not None:
        caption = (
            "Means over seeds; vertical lines are 95% intervals. Each panel has a scale of its own. "
            "After Figures 2 and 3 of arXiv 2405.21040."
        )
        yield Drawn("sizes", "Number of pairs", caption, sizes)
    betas = sorted({group.beta for group in found if group.variant.loss in COEFFICIENT})
    if betas:
        caption = (
            "Left: the factor in DPO's gradient. Right: each loss's gradient with respect to the log-probability of "
            "the rejected response, while the chosen response is as likely as under the reference. MinorDPO's gradient "
            "is 0 below a log-ratio of 0. The two panels have different scales. After Figure 1 of arXiv 2408.09834."
        )
        yield Drawn("coefficient", "Coefficient", caption, coefficient_figure(betas))


def _scores(results: SweepResults, others: Sequence[Group], look: Look) -> Iterator[Drawn]:
    base = untrained_accuracy(results)
    swept, single = _on_several_betas(others, others)
    caption = (
        "Strict accuracy with Wilson's 95% interval for the number of problems of one run. Dots are seeds. "
        "After Figure 6 of arXiv 2408.09834."
    )
    for name, title, figure in (
        ("scores", "Accuracy", score_figure(swept, base, look)),
        ("scores_single", "Accuracy at one β", score_list_figure(single, base, look)),
    ):
        if figure is not None:
            yield Drawn(name, title, caption, figure)


def _curves(members: Sequence[Group], others: Sequence[Group], rate: float, look: Look) -> Iterator[Drawn]:
    """The rewards and the training at one learning rate."""
    swept, single = _on_several_betas(members, others)
    setting = f"learning rate {rate:g}"
    caption = (
        "Log-ratios to the reference in nats, without the factor β. Thin lines are seeds, thick lines their mean. {} "
        "After Figures 2 to 5 of arXiv 2408.09834."
    )
    rewards = reward_figure(swept, setting, look)
    if rewards is not None:
        scales = caption.format("The panels of a row share one scale; rows differ in theirs.")
        yield Drawn(f"rewards_lr{rate:g}", f"Normalized rewards, {setting}", scales, rewards)
    rewards = reward_list_figure(single, setting, look)
    if rewards is not None:
        scales = caption.format("All panels share one scale.")
        yield Drawn(f"rewards_lr{rate:g}_single", f"Normalized rewards at one β, {setting}", scales, rewards)
    training = training_figure(members, setting, look)
    if training is not None:
        scales = (
            "Thin lines are seeds, thick lines their mean. Training accuracy is the share of pairs with a margin above "
            "0. The panels of a row share one scale, which is logarithmic where values differ widely. Losses are not "
            "comparable between methods: compare their course, not their height."
        )
        yield Drawn(f"training_lr{rate:g}", f"Loss, gradient norm and accuracy, {setting}", scales, training)


def _on_several_betas(members: Sequence[Group], found: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The groups of methods that the sweep has on more than one beta, and the others.

    Args:
        members: what is divided.
        found: all groups, which decide.
    """
    betas: dict[Variant, set[float]] = {}
    for group in found:
        betas.setdefault(group.variant, set()).add(group.beta)
    swept = [group for group in members if len(betas[group.variant]) > 1]
    return swept, [group for group in members if len(betas[group.variant]) == 1]


def _refinement(found: Sequence[Group], look: Look) -> Iterator[Drawn]:
    logged = [group for group in found if any(cell.log_history for cell in group.cells)]
    refined = [group for group in logged if group.variant.loss in UNREFINED]
    caption = (
        "Margins, the share of pairs with a margin above 0, and margins under the augmented prompt, as means over "
        "seeds. Each panel has a scale of its own. After Figure 1 of arXiv 2405.21040."
    )
    for rate, beta in sorted({(group.learning_rate, group.beta) for group in refined}):
        members = [g for g in logged if (g.learning_rate, g.beta) == (rate, beta)]
        by_loss = {loss: [g for g in members if g.variant.loss == loss] for pair in UNREFINED.items() for loss in pair}
        families = [by_loss[plain] + by_loss[loss] for loss, plain in UNREFINED.items() if by_loss[loss]]
        yield Drawn(
            f"refinement_lr{rate:g}_beta{beta:g}",
            f"Self-refinement, learning rate {rate:g}, β = {beta:g}",
            caption,
            refinement_figure(families, look),
        )
