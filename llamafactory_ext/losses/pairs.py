"""The input of a loss: the log-probabilities of a batch of pairs, and the refinement term of arXiv 2405.21040."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of preference pairs, in nats; every field is a tensor of shape `(batch,)`.

    Args:
        policy_chosen: log pi(y_w | x), summed over the tokens of the chosen response, with gradient.
        policy_rejected: the same for the rejected response.
        reference_chosen: log pi_ref(y_w | x), summed likewise, without gradient; None for a loss without reference.
        reference_rejected: the same for the rejected response.
        chosen_length: number of tokens in the chosen response, int64.
        rejected_length: the same for the rejected response.
        refinement: Delta = beta (D_w' - D_l') (arXiv 2405.21040, Eq. 12), without gradient; the primed log-ratios are
            those of the same responses under the augmented prompt. None if the loss has no refinement term.
        score_gap: r_w - r_l, the difference of the scores that the data gives the responses (`pref_margin_column`, or
            the scores of more than two), in the data's unit; None if it gives none.
        winner: in rows of more than two responses, the number of the chosen one in the batch, int64: pairs with the
            same number compare one response with several. None: every pair has its own responses.
        group: the number of the data row that the pair is from, int64; None as for `winner`.
        contrast: sum over the rejected response's tokens of log(1 + e^(s - s*)): s is the logit of the token, s* that
            of another one, drawn from the policy's most likely (`logps.Contrast`). With gradient; None if the loss
            does not need it.

    With LLaMA-Factory's `ld_alpha`, the policy's sums weight the tokens beyond the length of the shorter response by
    it, and with `ld_alpha_reference` the reference's do, too.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_length: Tensor
    rejected_length: Tensor
    refinement: Tensor | None = None
    score_gap: Tensor | None = None
    contrast: Tensor | None = None
    winner: Tensor | None = None
    group: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """D_w = log pi(y_w | x) - log pi_ref(y_w | x), in nats, shape `(batch,)`.

        Raises:
            ValueError: if the pairs carry no reference log-probabilities.
        """
        return self.policy_chosen - _present(self.reference_chosen)

    @property
    def rejected_logratio(self) -> Tensor:
        """D_l = log pi(y_l | x) - log pi_ref(y_l | x), in nats, shape `(batch,)`; raises like `chosen_logratio`."""
        return self.policy_rejected - _present(self.reference_rejected)

    @property
    def margin(self) -> Tensor:
        """D_w - D_l, in nats, shape `(batch,)`; raises like `chosen_logratio`."""
        return self.chosen_logratio - self.rejected_logratio

    def split(self, sizes: Sequence[int]) -> list[PairLogps]:
        """The pairs, split into consecutive batches of these sizes."""
        columns = [getattr(self, field.name) for field in fields(self)]
        parts = [[None] * len(sizes) if column is None else column.split(list(sizes)) for column in columns]
        return [PairLogps(*part) for part in zip(*parts, strict=True)]

    def per_token(self) -> PairLogps:
        """The same pairs with means per token in place of sums; every length is then 1.

        The mean of an empty response is 0.
        """

        def mean(total: Tensor | None, length: Tensor) -> Any:
            return None if total is None else total / length.clamp(min=1)

        return replace(
            self,
            policy_chosen=mean(self.policy_chosen, self.chosen_length),
            policy_rejected=mean(self.policy_rejected, self.rejected_length),
            reference_chosen=mean(self.reference_chosen, self.chosen_length),
            reference_rejected=mean(self.reference_rejected, self.rejected_length),
            chosen_length=self.chosen_length.new_ones(self.chosen_length.shape),
            rejected_length=self.rejected_length.new_ones(self.rejected_length.shape),
            contrast=mean(self.contrast, self.rejected_length),
        )


def _present(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError(
            "these pairs carry no reference log-probabilities: register the loss with needs_reference=True."
        )
    return reference


def delta(augmented: PairLogps, *, beta: float, on_means: bool) -> Tensor:
    """Delta = beta (D_w' - D_l') (arXiv 2405.21040, Eq. 12), shape `(batch,)`, without gradient.

    Args:
        augmented: the same responses under the augmented prompts.
        beta: `pref_beta`.
        on_means: whether the loss compares means per token, not sums.
    """
    return (beta * (augmented.per_token() if on_means else augmented).margin).detach()


def refinement_term(pairs: PairLogps, *, sr_lambda: float) -> Tensor | float:
    """lambda sg[Delta], shape `(batch,)` (arXiv 2405.21040, Eq. 13); 0.0 if lambda is 0, even if the pairs carry none.

    Raises:
        ValueError: if lambda is not 0 and the pairs carry no refinement.
    """
    if sr_lambda == 0:
        return 0.0
    if pairs.refinement is None:
        raise ValueError("these pairs carry no refinement term: set `refinement`, or call the loss with sr_lambda=0.")
    return sr_lambda * pairs.refinement.detach()
