"""The trainer: from a batch to `PairLogps`, a loss per pair and metrics; everything else is LLaMA-Factory's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import release_memory
from llamafactory.extras import logging
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RunningMoments

from ..errors import NOT_OUR_TRAINER
from ..losses.pairs import PairLogps
from ..losses.unpaired import bco
from .columns import SCORE_GAP, take_columns
from .head import head_output
from .layout import SHARED_NOISE, Layout, depends_on_batch, inner_model
from .logps import MICRO_BATCHES_AT_ONCE, ResponseLogps, response_logps, token_logps
from .metrics import MetricSums, refinement_metrics, response_metrics, reward_metrics
from .modes import ranks_wait_for_each_other, without_dropout
from .monitors import DEGENERATING, STOPPED, DegenerationMonitor, RewardPlot, problem
from .ranking import RANKING, RankedCollator, Ranking
from .reference.content import holds_media
from .reference.logps import (
    COLUMN,
    Pair,
    ReferenceCollator,
    ReferenceLogps,
    datasets_of,
    from_column,
    precomputed,
)
from .reference.model import PendingReference, half_dtype, kept_dtype, match_precision
from .refinement import AUGMENTED, is_joinable, joined, split_batch
from .sharing import MORE_THAN_TEXT, ROUTER_COUNTS, consider, ordinary_tokens
from .terms import CONTRAST, pair_weights, terms_of

if TYPE_CHECKING:
    from torch import Tensor

    from .logps import TokenTerm

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

BCO_STATE = "bco_running.json"


class TrainerCheck(TrainerCallback):
    """Fails if the trainer is not a `PreferenceTrainer`, which sets `trainer_is_ours` before it initializes.

    As a callback it reaches the trainer that is actually built, on every rank.
    """

    def __init__(self) -> None:
        self.trainer_is_ours = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer_is_ours:
            raise RuntimeError(NOT_OUR_TRAINER)


class BeforeTraining(TrainerCallback):
    """Calls a function before the first step, once models and optimizer are ready."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()


class PreferenceTrainer(CustomDPOTrainer):
    """LLaMA-Factory's DPO trainer with the loss that `pref_loss` names.

    Per step: the policy's forward pass and the reference's log-probabilities (precomputed, or from a second pass) give
    `PairLogps`; the loss maps them to one value per pair; `pref_bco_weight` and `pref_ftx` add their terms as in
    LLaMA-Factory.
    """

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, **kwargs: Any) -> None:
        for callback in kwargs.get("callbacks") or []:
            if isinstance(callback, TrainerCheck):
                callback.trainer_is_ours = True

        self.is_own_reference = ref_model is model
        self.ref_model: Any = None
        self._metric_sums = {"train": MetricSums(), "eval": MetricSums()}
        self._evaluated = "eval"
        args, collator = kwargs["args"], kwargs["data_collator"]
        # Otherwise a NaN loss is logged as 0, and each micro-batch waits for the GPU to check.
        args.logging_nan_inf_filter = False
        self.references: ReferenceLogps | None = None
        if isinstance(ref_model, PendingReference):
            self.references = precomputed(ref_model, model, kwargs)
            is_needed = self.references is None or (self.references.missing and not ref_model.starts_as_policy(args))
            ref_model = ref_model.load() if is_needed else None
        if self.references is not None:
            kwargs["data_collator"] = ReferenceCollator(collator, self.references)
        # ZeRO-3 has sharded both models already, in the precision of its configuration.
        if ref_model is not None and not self.is_own_reference and not is_deepspeed_zero3_enabled():
            match_precision(ref_model, model, kept_dtype(args))

        models = (model, ref_model) if ref_model is not None else (model,)
        self.batch_dependence = next(filter(None, (depends_on_batch(m.config, collator) for m in models)), None)
        super().__init__(model=model, ref_model=ref_model, finetuning_args=finetuning_args, **kwargs)
        self.reference_ld_alpha = self.ld_alpha if finetuning_args.ld_alpha_reference else None
        self.terms = terms_of(finetuning_args.objective, bool(finetuning_args.pref_wpo))
        noise = SHARED_NOISE if args.neftune_noise_alpha is not None else None
        reason = noise or self.batch_dependence or (ROUTER_COUNTS if finetuning_args.router_loss_weight else None)
        if finetuning_args.share_prefix and any(holds_media(each) for each in datasets_of(kwargs)):
            reason = reason or MORE_THAN_TEXT
        self.sharing = consider(finetuning_args.share_prefix, models, reason, ranks_wait_for_each_other())
        if self.references is not None:
            self.add_callback(BeforeTraining(self.compute_reference_logps))
        self.add_callback(DegenerationMonitor())
        if finetuning_args.plot_loss:
            self.add_callback(RewardPlot())

    # --- a batch becomes a loss ------------------------------------------------------------------------------------

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the batch (a scalar) and its metrics, shape `(batch,)` each."""
        batch, augmented_batch = split_batch(batch)
        augmented = batch.pop(AUGMENTED, None)  # in evaluation, not scored yet
        if augmented_batch:
            augmented = self._augmented_logps(model, augmented_batch)
        about_pairs, ranking = take_columns(batch), batch.get(RANKING)
        policy, pairs = self._pair_logps(model, batch, ld_alpha=self.ld_alpha, terms=self.terms)
        contrast = policy.sums[CONTRAST][1] if CONTRAST in policy.sums else None
        pairs = replace(pairs, score_gap=about_pairs.get(SCORE_GAP), contrast=contrast)
        if ranking is not None:
            about_pairs = {name: ranking.of_pairs(values) for name, values in about_pairs.items()}
            pairs = replace(pairs, **ranking.comparison(pairs.policy_chosen.device))
        objective = self.finetuning_args.objective
        values = objective.values(pairs, augmented)
        losses = objective.sum_of(values)

        if self.bco_gemma > 1e-6 and pairs.reference_chosen is not None:
            losses = (losses + self.bco_gemma * self._bco_losses(pairs, train_eval)) / (1 + self.bco_gemma)
        sft_losses = -pairs.per_token().policy_chosen
        if self.ftx_gamma > 1e-6:
            losses = losses + self.ftx_gamma * sft_losses

        metrics = self._metrics(pairs, policy, augmented)
        if len(values) > 1:
            metrics |= {f"loss/{name}": of_one for name, of_one in values.items()}
        weights = pair_weights(policy, about_pairs)
        metrics |= {f"weights/{name}": each for name, each in weights.items()}
        if self.loss_type == "orpo":
            metrics["sft_loss"] = sft_losses
            metrics["odds_ratio_loss"] = (losses - sft_losses) / self.beta

        for each in weights.values():
            losses = losses * each
        loss, router_loss = self._mean(losses, ranking), self._router_loss(model, policy)
        if router_loss is not None:
            loss = loss + self.finetuning_args.router_loss_weight * router_loss
            metrics["router/loss"] = router_loss
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{name}": values.detach() for name, values in metrics.items()}

    def _mean(self, losses: Tensor, ranking: Ranking | None) -> Tensor:
        """The mean over data rows; that of a row with several pairs is their mean, weighted as the recipe says."""
        if ranking is None:
            return losses.mean()
        return (losses * ranking.shares(self.finetuning_args.weights_by_gap, losses.device)).sum()

    def _router_loss(self, model: Any, policy: ResponseLogps) -> Tensor | None:
        """The load-balancing loss of a mixture of experts, which LLaMA-Factory drops; None if it is not asked for."""
        if not self.finetuning_args.router_loss_weight:
            return None
        if policy.router_loss is None:
            why = f"{type(inner_model(model)).__name__} returns no loss of a router"
            logger.warning_rank0_once(f"`moe_aux_loss_coef` has no effect: {why}.")
        return policy.router_loss

    def _lay_out(self, batch: dict[str, Any]) -> Layout:
        """The layout of a batch, which may hold a `Ranking`."""
        if self.sharing.is_on is None:
            self._try_sharing()
        return self.sharing.lay_out({k: v for k, v in batch.items() if k != RANKING}, batch.get(RANKING))

    def _try_sharing(self) -> None:
        """Before the first batch, with the models as they are trained."""
        config = inner_model(self.model).config

        def score(model: Any, layout: Layout) -> Tensor:
            with without_dropout(model):
                return score_in_training(model, layout)

        def score_in_training(model: Any, layout: Layout) -> Tensor:
            with self.compute_loss_context_manager():
                return token_logps(model, layout)

        self.sharing.try_on(
            [self.model_wrapped] if self.ref_model is None else [self.model_wrapped, self.ref_model],
            score,
            score_in_training,
            ordinary_tokens(self.processing_class, config.get_text_config().vocab_size),
            self.args.device,
            half_dtype(self.args) or inner_model(self.model).dtype,
            self.accelerator.gather,
        )

    def _pair_logps(
        self,
        model: Any,
        batch: dict[str, Any],
        ld_alpha: float | None = None,
        terms: Mapping[str, TokenTerm] | None = None,
    ) -> tuple[ResponseLogps, PairLogps]:
        known = batch.get(COLUMN)
        layout = self._lay_out({name: values for name, values in batch.items() if name != COLUMN})
        policy = response_logps(model, layout, ld_alpha, terms)
        if not self.finetuning_args.use_ref_model:
            reference_chosen = reference_rejected = None
        elif known is not None:
            logps = from_column(known)
            reference_chosen, reference_rejected = layout.sides(logps) if layout.ranking else logps.unbind(dim=1)
        elif self.is_own_reference:
            reference_chosen, reference_rejected = policy.chosen.detach(), policy.rejected.detach()
        else:
            reference_chosen, reference_rejected = layout.sides(self._reference_logps(model, layout))
        pairs = PairLogps(
            policy.chosen,
            policy.rejected,
            reference_chosen,
            reference_rejected,
            policy.chosen_length,
            policy.rejected_length,
        )
        return policy, pairs

    def _reference_logps(self, model: Any, layout: Layout) -> Tensor:
        """Of each response in the batch: from the reference model, or from the policy, without its adapter or as it is
        before the first step.

        Computed without dropout and NEFTune noise, so they do not depend on when.
        """
        has_adapter = self.finetuning_args.finetuning_type == "lora"
        if self.ref_model is None and has_adapter:
            context = self.accelerator.unwrap_model(model).disable_adapter()
        else:
            context = nullcontext()
        scorer = model if self.ref_model is None else self.ref_model
        with torch.no_grad(), context, without_dropout(scorer):
            return response_logps(scorer, layout, self.reference_ld_alpha).responses

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of an optimizer step, with their augmented pairs already scored.

        The policy is the same for all of them, so several are scored in one pass if they can be joined: without
        gradients no activations are kept, so more pairs fit into memory, and ZeRO-3 and FSDP gather weights less often.
        """
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.finetuning_args.refinement_prompt is None:
            return batches, count

        parts = [split_batch(self._prepare_inputs(batch)) for batch in batches]
        can_join = self.batch_dependence is None and all(is_joinable(augmented, [COLUMN]) for _, augmented in parts)
        at_once = self._micro_batches_at_once() if can_join else 1
        scored: list[PairLogps] = []
        for start in range(0, len(parts), at_once):
            group = [augmented for _, augmented in parts[start : start + at_once]]
            with self.compute_loss_context_manager():
                together = self._augmented_logps(self.model_wrapped, group[0] if at_once == 1 else joined(group))
            sizes = [len(augmented["labels"]) // 2 for augmented in group]
            scored += [together] if at_once == 1 else together.split(sizes)
        return [{**batch, AUGMENTED: pairs} for (batch, _), pairs in zip(parts, scored, strict=True)], count

    def _micro_batches_at_once(self) -> int:
        """Micro-batches in one pass without gradient; 1 if that pass holds all logits."""
        return MICRO_BATCHES_AT_ONCE if head_output(self.model_wrapped, self.args.device) is not None else 1

    def _augmented_logps(self, model: Any, batch: dict[str, Any]) -> PairLogps:
        """The same responses under the augmented prompts: no gradient, no dropout; the policy keeps its adapter."""
        with torch.no_grad(), without_dropout(model):
            return self._pair_logps(model, batch, self.reference_ld_alpha)[1]

    # --- the reference before the first step -------------------------------------------------------------------------

    def compute_reference_logps(self) -> None:
        """Compute the reference log-probabilities that are not cached, then free the reference model."""
        assert self.references is not None
        if self.references.missing:
            pairs = self._micro_batches_at_once() * self.args.train_batch_size
            self.references.fill(self._score, tokens=2 * pairs * self.references.longest)
        reference, self.ref_model = self.ref_model, None
        if hasattr(reference, "destroy"):  # DeepSpeed's engine
            reference.destroy()
        del reference
        if hasattr(self.model_wrapped, "empty_partition_cache"):  # ZeRO-3 has fetched for other passes than the next
            self.model_wrapped.empty_partition_cache()
        release_memory()  # also collects reference cycles, such as a prepared model

    def _score(self, pairs: list[Pair]) -> Tensor:
        assert isinstance(self.data_collator, ReferenceCollator)
        # Without the columns that our own collators add.
        batch = RankedCollator.__call__(self.data_collator.collator, pairs)
        layout = self._lay_out(self._prepare_inputs(batch))
        with self.compute_loss_context_manager():
            logps = self._reference_logps(self.model_wrapped, layout)
        return logps if layout.ranking else torch.stack(logps.chunk(2), dim=1).flatten()

    # --- on the scale that LLaMA-Factory reports ---------------------------------------------------------------------

    def _reported(self, pairs: PairLogps) -> PairLogps:
        """The pairs on the scale that LLaMA-Factory reports: means per token for losses that use them, else sums."""
        return pairs.per_token() if self.finetuning_args.objective.reports_means else pairs

    def _bco_losses(self, pairs: PairLogps, train_eval: str) -> Tensor:
        scored = self._reported(pairs)
        if train_eval == "train":  # evaluation must not change the baseline of training
            rewards = self.beta * torch.cat([scored.chosen_logratio, scored.rejected_logratio])
            self.running.update(rewards.mean().detach())
        return bco(scored, beta=self.beta, baseline=self.running.mean)

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _metrics(self, pairs: PairLogps, policy: ResponseLogps, augmented: PairLogps | None) -> dict[str, Tensor]:
        objective, scored = self.finetuning_args.objective, self._reported(pairs)
        metrics = response_metrics(scored, policy)
        if self.is_own_reference:  # every reward would be 0
            return metrics
        metrics |= reward_metrics(pairs, scored, self.beta) | objective.measure(pairs, augmented)
        if augmented is not None:
            metrics |= refinement_metrics(objective.seen_by(objective.refined, pairs, augmented), augmented)
        return metrics

    def store_metrics(self, metrics: dict[str, Tensor], train_eval: str = "train") -> None:
        self._metric_sums[train_eval].add(metrics)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, and remember the metrics' prefix: with `eval_on_each_dataset` each data set has its own."""
        self._evaluated = metric_key_prefix
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the metrics stored since the last log and whether the run degenerates."""
        is_training = "loss" in logs
        means = self._metric_sums["train" if is_training else "eval"].take_means(self.accelerator)
        logs |= means if is_training else _renamed(means, self._evaluated)
        if means and is_training:
            logs[DEGENERATING] = float(problem([*self.state.log_history, logs]) is not None)
            if self.finetuning_args.pref_stop_on_degeneration:
                is_last = self.state.global_step >= self.state.max_steps
                logs[STOPPED] = 0.0 if is_last else logs[DEGENERATING]
        Trainer.log(self, logs, *args, **kwargs)

    # --- the baseline of pref_bco_weight is part of a checkpoint -----------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if hasattr(self, "running"):
            folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.running.save_to_json(os.path.join(folder, BCO_STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and hasattr(self, "running"):
            path = os.path.join(checkpoint, BCO_STATE)
            if not os.path.isfile(path):
                raise ValueError(
                    f"{checkpoint} was saved without `pref_bco_weight`: resume with the settings that the run was "
                    "started with."
                )
            self.running = RunningMoments.load_from_json(self.accelerator, path)


def _renamed(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of an evaluation, `eval_…`, under the prefix of its data set."""
    return {prefix + name.removeprefix("eval"): value for name, value in metrics.items()}
