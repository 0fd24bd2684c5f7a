"""What scoring loads: models as a training loads them, pairs as it tokenizes them; and the fingerprints of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import hashes
from ..errors import UserError, in_a_line
from ..recipe.reading import Settings, data_sets, parse_recipe
from .file import Row

if TYPE_CHECKING:
    import torch


def load_model(settings: Settings, tokenizer: Any) -> torch.nn.Module:
    """The model of a recipe, with its adapter, in evaluation mode.

    Raises:
        UserError: if it cannot be loaded, or would get new random weights.
    """
    from llamafactory.model import load_config
    from llamafactory.model import load_model as load

    from ..training.reference.model import ADDING_TOKENS, random_weight_keys

    model_args, _, finetuning_args = parse_recipe({"stage": "dpo", **settings})
    model_args.device_map = "auto"
    drawn = random_weight_keys(model_args)
    try:
        size = load_config(model_args).get_text_config().vocab_size
        model: Any = load(tokenizer, model_args, finetuning_args, is_trainable=False).eval()
    except Exception as error:  # whatever transformers, peft and the readers of weights raise
        adapters = f" with {', '.join(model_args.adapter_name_or_path)}" if model_args.adapter_name_or_path else ""
        name = f"{model_args.model_name_or_path!r}{adapters}"
        raise UserError(f"the model {name} cannot be loaded: {in_a_line(error)}") from error
    if drawn and (not set(drawn) <= ADDING_TOKENS or model.config.get_text_config().vocab_size != size):
        raise UserError(
            f"{' and '.join(drawn)}: {model_args.model_name_or_path!r} would be given new random weights, on which its "
            "scores would depend. Put them into a copy first, with `llamafactory-cli export`, and name that copy."
        )
    if model_args.infer_dtype != "auto" and getattr(model, "quantization_method", None) is None:
        model.to(model_args.compute_dtype)  # LLaMA-Factory leaves a half-precision checkpoint as it is
    return model  # type: ignore[no-any-return]


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model expects its inputs."""
    return next(model.parameters()).device


def encode(processor: Any, row: Row, index: int) -> dict[str, list[Any]]:
    """A pair in LLaMA-Factory's tokens, as a batch of one; empty if LLaMA-Factory skips it.

    Args:
        processor: LLaMA-Factory's, or one that takes its place.
        row: a pair in LLaMA-Factory's standard format.
        index: of the row, from 0.

    Raises:
        UserError: if it cannot be tokenized, or has more than two answers.
    """
    from ..training.ranking import has_several

    try:
        encoded: dict[str, list[Any]] = processor.preprocess_dataset({name: [value] for name, value in row.items()})
    except Exception as error:  # whatever the tokenizer, the template or a picture's file raises
        raise UserError(f"row {index + 1} cannot be tokenized: {in_a_line(error)}; correct or remove it") from error
    if not encoded.get("chosen_input_ids"):
        return {}
    if has_several({name: values[0] for name, values in encoded.items()}):
        raise UserError(f"row {index + 1} has more than two answers, and only pairs are scored: write it as pairs.")
    return encoded


def rows_of(
    indices: Sequence[int], rows: Any, processor: Any, collator: Any, measure: Callable[[Any], dict[str, list[Any]]]
) -> list[Row]:
    """The results of some pairs; one that LLaMA-Factory skips has only its index and says so.

    Args:
        indices: of the pairs.
        rows: pairs in LLaMA-Factory's standard format.
        processor: as for `encode`.
        collator: LLaMA-Factory's, or one that takes its place.
        measure: from a batch to columns with a value per pair.

    Raises:
        UserError: if a pair cannot be tokenized.
    """
    encoded = {index: encode(processor, rows[index], index) for index in indices}
    scored = [index for index in indices if encoded[index]]
    results: list[Row] = [{"index": index, "skipped": True} for index in indices if not encoded[index]]
    if scored:
        features = [{name: values[0] for name, values in encoded[index].items()} for index in scored]
        columns = measure(collator(features))
        for position, index in enumerate(scored):
            values = {name: values[position] for name, values in columns.items()}
            results.append({"index": index, "skipped": False, **values})
    return results


def fingerprints(settings: Settings, models: Sequence[Settings]) -> dict[str, Any]:
    """Fingerprints of the local data and models, so that a file is not resumed after one of them has changed.

    Args:
        settings: the recipe that names the data.
        models: the recipes that name the models.
    """
    _, data_args, _ = parse_recipe({"stage": "dpo", **settings})
    data = {}
    for about in data_sets(data_args.dataset, data_args.dataset_dir):
        path = Path(data_args.dataset_dir, about.dataset_name)
        is_there = about.load_from == "file" and path.exists()
        data[about.dataset_name] = [hashes.of_value(vars(about)), hashes.of_data(path) if is_there else None]
    return {"data": data, "named": hashes.of_named(models)}
