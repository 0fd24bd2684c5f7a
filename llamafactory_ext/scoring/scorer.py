"""Scores pairs offline: any model against any reference, with the numbers that a training would log, pair by pair.

The implicit reward of DPO (arXiv 2305.18290, section 4) is beta times the logratio: what is written are logratios and
margins in nats, free of beta, and what the recipe's loss makes of them. What is done is on disk: interrupted at any
moment, the same command resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..recipe.reading import Settings, data_sets, parse_recipe
from ..rows import SCORES, number
from .file import Row, ScoreFile, check_output, in_order
from .loading import device_of, fingerprints, load_model, rows_of

if TYPE_CHECKING:
    import torch

    from ..losses.objective import Objective
    from ..losses.pairs import PairLogps


@dataclass(frozen=True)
class Scorer:
    """Policy, reference and data of a recipe, ready to score."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    objective: Objective
    rows: Any  # pairs in LLaMA-Factory's standard format, in the order of the file
    processor: Any
    collator: Any
    data_scores: list[Row]  # per row, those of `SCORES` that the data has


def score_pairs(settings: Settings, output: Path, batch_size: int = 4) -> Iterator[tuple[int, int]]:
    """Score every pair of a recipe's data set into a file; yields (pairs done, pairs in all) as it goes.

    Args:
        settings: a recipe for stage dpo with one data set; `ref_model` is the reference, or with an adapter the model
            without it.
        output: a .jsonl or .parquet file, which appears when all pairs are scored.
        batch_size: pairs at a time.

    Raises:
        UserError: if the recipe is wrong, the output is refused, another process writes to it, or it was begun with
            other settings.
    """
    if settings.get("stage", "dpo") != "dpo":
        raise UserError(f"score reads recipes of stage dpo, not {settings['stage']!r}: write stage=dpo.")
    reference_settings = reference_of(settings)
    check_output(output)
    files = fingerprints(settings, [settings, reference_settings])
    file = ScoreFile(output, {"settings": settings, "reference": reference_settings, "files": files})
    file.check()
    scorer = load_scorer(settings, reference_settings)
    with file:
        yield from file.fill(len(scorer.rows), lambda batch: _score(scorer, batch), in_order(batch_size))


def reference_of(settings: Settings) -> Settings:
    """The settings that load the reference: those of `ref_model`, or of the model without its adapter.

    Raises:
        UserError: if the recipe names none of the two: every logratio would be 0.
    """
    plain = {key: value for key, value in settings.items() if key not in ("adapter_name_or_path", "quantization_bit")}
    if settings.get("ref_model") is not None:
        named = {
            "model_name_or_path": settings["ref_model"],
            "adapter_name_or_path": settings.get("ref_model_adapters"),
            "quantization_bit": settings.get("ref_model_quantization_bit"),
            "finetuning_type": "lora",  # as in training, so that the reference has its adapters
        }
        return plain | {key: value for key, value in named.items() if value is not None}
    if settings.get("adapter_name_or_path") is not None:
        return {key: value for key, value in settings.items() if key != "adapter_name_or_path"}
    raise UserError(
        "the model would be its own reference: name another one with ref_model=, or write adapter_name_or_path= to "
        "compare the model with this adapter to the model without it."
    )


# --- loading ---------------------------------------------------------------------------------------------------------


def load_scorer(settings: Settings, reference_settings: Settings) -> Scorer:
    """Load tokenizer, data and both models, by LLaMA-Factory's own functions.

    Raises:
        UserError: for a wrong recipe, and where a model or the data cannot be loaded.
    """
    from ..recipe.loading import load_pairs, load_tokenization
    from ..training.answers import AnswersProcessor
    from ..training.columns import CarryingProcessor, Columns, carrying_collator
    from ..training.loading import loaded_as_trained
    from ..training.ranking import RankedCollator
    from ..training.reference.model import match_precision
    from ..training.refinement import AugmentingCollator, AugmentingProcessor

    model_args, data_args, finetuning_args = parse_recipe({"stage": "dpo", **settings})
    if len(data_args.dataset or []) != 1:
        raise UserError("score takes one data set: write it as dataset=NAME.")
    objective, sr_prompt = finetuning_args.objective, finetuning_args.refinement_prompt
    if not objective.needs_reference:
        raise UserError(f"pref_loss {objective.name!r} has no reference to score against: write another pref_loss.")

    tools = load_tokenization(model_args, data_args)
    tokenization = {"template": tools.template, "tokenizer": tools.tokenizer, "processor": tools.processor}
    about = {**tokenization, "data_args": data_args}
    processor: Any = AnswersProcessor(**about)
    collator_class: type = RankedCollator
    if sr_prompt is not None:
        processor, collator_class = AugmentingProcessor(**about, sr_prompt=sr_prompt), AugmentingCollator
    columns = Columns.of_recipe(finetuning_args)
    if finetuning_args.data_columns:
        processor, collator_class = CarryingProcessor(processor), carrying_collator(collator_class, columns)
    with loaded_as_trained(finetuning_args):
        rows = load_pairs(model_args, data_args)
    policy, reference = (load_model(each, tools.tokenizer) for each in (settings, reference_settings))
    match_precision(reference, policy, kept=None)
    return Scorer(
        policy=policy,
        reference=reference,
        objective=objective,
        rows=rows,
        processor=processor,
        collator=collator_class(**tokenization, model=policy, pad_to_multiple_of=8, label_pad_token_id=-100),
        data_scores=_data_scores(data_args, len(rows)),
    )


def _data_scores(data_args: Any, count: int) -> list[Row]:
    """What the data says of its answers; LLaMA-Factory drops the columns that it does not know, but keeps the order."""
    from ..recipe.loading import source_rows
    from ..rows import BadRow

    (about,) = data_sets(data_args.dataset, data_args.dataset_dir)
    if about.num_samples is not None:
        return [{}] * count  # a random choice, whose order is not the file's
    scores = []
    with suppress(UserError):  # what LLaMA-Factory has loaded, but this package does not read
        for row, _ in zip(source_rows(about, data_args.dataset_dir), range(count), strict=False):
            fields = {} if isinstance(row.fields, BadRow) else row.fields
            scores.append({name: number(fields[name]) for name in SCORES if name in fields})
    return scores if len(scores) == count else [{}] * count


# --- scoring ---------------------------------------------------------------------------------------------------------


def _score(scorer: Scorer, indices: list[int]) -> list[Row]:
    """The results of some pairs; one that LLaMA-Factory skips has only its index and says so."""
    results = rows_of(indices, scorer.rows, scorer.processor, scorer.collator, lambda batch: _columns(scorer, batch))
    return [row if row["skipped"] else {**row, **scorer.data_scores[row["index"]]} for row in results]


def _columns(scorer: Scorer, batch: Any) -> dict[str, list[Any]]:
    import torch

    from ..training.columns import SCORE_GAP, WEIGHT, take_columns
    from ..training.refinement import split_batch

    base, augmented_batch = split_batch(dict(batch))
    objective, numbers = scorer.objective, take_columns(base)
    with torch.inference_mode():
        pairs = replace(_pair_logps(scorer, base), score_gap=numbers.get(SCORE_GAP))
        columns = {
            "chosen_logp": pairs.policy_chosen,
            "rejected_logp": pairs.policy_rejected,
            "chosen_tokens": pairs.chosen_length,
            "rejected_tokens": pairs.rejected_length,
            "chosen_logratio": pairs.chosen_logratio,
            "rejected_logratio": pairs.rejected_logratio,
            "margin": pairs.margin,
        }
        augmented = _pair_logps(scorer, augmented_batch) if augmented_batch else None
        if augmented is not None and objective.refined is not None:
            refined = objective.seen_by(objective.refined, pairs, augmented)
            assert refined.refinement is not None
            columns |= {"augmented_margin": augmented.margin, "refinement": refined.refinement}
        values = objective.values_alone(pairs, augmented)
        columns["loss"] = objective.sum_of(values)
        if len(values) > 1:
            columns |= {f"loss/{name}": of_one for name, of_one in values.items()}
        columns |= objective.measure(pairs, augmented)
        columns |= {name: numbers[name] for name in (WEIGHT, SCORE_GAP) if name in numbers}
    return {name: values.tolist() for name, values in columns.items()}


def _pair_logps(scorer: Scorer, batch: Any) -> PairLogps:
    from ..losses.pairs import PairLogps
    from ..training.layout import padded
    from ..training.logps import response_logps
    from ..training.terms import CONTRAST, terms_of

    terms = terms_of(scorer.objective, is_weighted=False)
    policy, reference = (
        response_logps(
            model, padded({name: values.to(device_of(model)) for name, values in batch.items()}), terms=needed
        )
        for model, needed in ((scorer.policy, terms), (scorer.reference, None))
    )
    return PairLogps(
        policy.chosen,
        policy.rejected,
        reference.chosen.to(policy.chosen.device),
        reference.rejected.to(policy.chosen.device),
        policy.chosen_length,
        policy.rejected_length,
        contrast=policy.sums[CONTRAST][1] if terms else None,
    )
