"""Whether a training shares prefixes: what rules it out at once, and the trial before its first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.extras import logging

from ..errors import in_a_line, not_possible
from .attention import accept_prefix_trees
from .layout import Batch, Layout, Limits, inner_model, limits_of, obstacle, padded, shared_prefix
from .media import placeholders, text_of, trains_language_only
from .proof import SHORTEST, Proof, prove

if TYPE_CHECKING:
    from torch import Tensor

    from .ranking import Ranking

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

MORE_THAN_TEXT = "some pairs hold more than text"
ROUTER_COUNTS = "the router's loss (`moe_aux_loss_coef`) counts the tokens of both responses, each with its prompt"

Score = Callable[[Any, Layout], "Tensor"]


@dataclass
class PrefixSharing:
    """The layout of a training's batches.

    Args:
        wanted: the recipe's `share_prefix`.
        is_on: whether prefixes are shared; None until it has been tried.
        attention: the models' implementation, as for `shared_prefix`.
        limits: batches beyond them have a row per response.
        placeholders: as for `media.text_of`.
    """

    wanted: bool | None
    is_on: bool | None
    attention: str = "sdpa"
    limits: Limits = field(default_factory=Limits)
    placeholders: frozenset[int] = frozenset()

    def lay_out(self, batch: Batch, ranking: Ranking | None = None) -> Layout:
        """The batch with shared prefixes, unless sharing is off or the batch holds more than text."""
        if not self.is_on:
            return padded(batch, ranking)
        text = text_of(batch, self.placeholders)
        if text is not None:
            return shared_prefix(text, self.attention, self.limits, ranking)
        if self.wanted:
            raise not_possible("share_prefix", MORE_THAN_TEXT)
        logger.warning_rank0_once("Prefix sharing is off for batches that hold more than text.")
        return padded(batch, ranking)

    def switch_off(self, reason: str) -> None:
        """Log the reason.

        Raises:
            ValueError: with it, if the recipe says `share_prefix: true`.
        """
        if self.wanted:
            raise not_possible("share_prefix", reason)
        logger.info_rank0(f"Prefix sharing is off: {reason}.")
        self.is_on = False

    def try_on(
        self,
        models: Sequence[Any],
        score: Score,
        score_in_training: Score,
        tokens: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Let the models score made-up pairs in both layouts; all processes do this together.

        Args:
            models: policy and reference, wrapped as they are trained.
            score, score_in_training: the log-probabilities that a model gives a layout's tokens, as
                `logps.token_logps`, without dropout and in the mode of training.
            tokens: ids of ordinary tokens.
            device: of the models' inputs.
            dtype: in which they compute.
            gather: the values of all processes, shape `(processes * values,)`.

        Raises:
            ValueError: as `switch_off`.
        """
        inner = [inner_model(model) for model in models]
        undo = [accept_prefix_trees(model) for model in inner]
        self.attention = inner[0].config._attn_implementation
        try:
            proofs = [
                prove(
                    partial(score, model),
                    partial(score_in_training, model),
                    tokens,
                    attention=self.attention,
                    device=device,
                    dtype=dtype,
                    window=self.limits.sequence,
                )
                for model in models
            ]
        except Exception as error:  # whatever a model does with a mask that it does not expect
            reason = f"the model does not take packed rows ({in_a_line(error)})"
        else:
            proof = _worst(proofs, device, gather)
            if proof.holds:
                self.is_on = True
                logger.info_rank0(self._success(proof))
                return
            reason = _reason(proof)
        for each in undo:
            each()
        self.switch_off(reason)

    def _success(self, proof: Proof) -> str:
        sequence, row = self.limits.sequence, self.limits.row
        limit = "" if sequence is None else f" Batches with a sequence of over {sequence} tokens do without."
        limit += "" if row is None else f" Batches of over {row} tokens do without."
        return (
            f"Prefix sharing is on: log-probabilities of made-up pairs change by at most {proof.deviation:.1e} nats, "
            f"which is rounding (up to {proof.allowance:.1e}).{limit}"
        )


def consider(
    wanted: bool | None, models: Sequence[Any], reason: str | None, ranks_wait_for_each_other: bool
) -> PrefixSharing:
    """Prefix sharing for these models: off if something rules it out, else to be tried.

    Args:
        wanted: the recipe's `share_prefix`.
        models: policy and reference, wrapped or not; the policy first.
        reason: why the recipe or the data rule it out, or None.
        ranks_wait_for_each_other: whether all ranks must run the same layers.

    Raises:
        ValueError: as `PrefixSharing.switch_off`.
    """
    if wanted is False:
        logger.info_rank0("Prefix sharing is off: `share_prefix: false`.")
        return PrefixSharing(wanted, is_on=False)
    configs = [inner_model(model).config for model in models]
    reasons = [obstacle(model, config) for model, config in zip(models, configs, strict=True)]
    limits = limits_of(*configs)
    if len({config._attn_implementation for config in configs}) > 1:
        reasons.append("policy and reference use different attention implementations")
    if limits.sequence is not None and limits.sequence < SHORTEST:
        reasons.append(f"the model attends to {limits.sequence} tokens at a time")
    media = placeholders(models[0])
    if media and ranks_wait_for_each_other:
        reasons.append("all ranks must run the vision tower, for which every batch of text holds a blank picture")
    elif media and not trains_language_only(models[0]):
        reasons.append("more than the language model is trained, and every batch of text holds a blank picture")
    sharing = PrefixSharing(wanted, is_on=None, limits=limits, placeholders=media)
    reason = reason or next(filter(None, reasons), None)
    if reason is not None:
        sharing.switch_off(reason)
    return sharing


def _reason(proof: Proof) -> str:
    if proof.is_random:
        return "the model draws random numbers in training, which both responses would share"
    return (
        f"it would change log-probabilities of made-up pairs by {proof.deviation:.1e} nats, which is more than "
        f"rounding ({proof.allowance:.1e})"
    )


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """The ids of tokens that mean nothing but text."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [each for each in range(min(len(tokenizer), vocabulary)) if each not in special]


def _worst(proofs: Sequence[Proof], device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor]) -> Proof:
    """The proof that is furthest from holding, of all models and processes; a NaN comes first."""
    values = [list(astuple(each)) for each in proofs]
    found = gather(torch.tensor(values, dtype=torch.float64, device=device).flatten()).reshape(-1, len(values[0]))
    everywhere = [Proof(*each) for each in found.tolist()]
    return min(everywhere, key=lambda each: (each.holds, each.allowance - each.deviation))
