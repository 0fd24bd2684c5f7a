"""What takes the place of LLaMA-Factory's converter, processor and collator of pairs, for what a loss needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..patching import replaced
from .columns import CarryingConverter, CarryingProcessor, Columns, carrying_collator
from .refinement import AugmentingCollator, AugmentingProcessor, check_augmented, model_context

Replacement = tuple[ModuleType, str, object]  # module, name, value


def replacements(model_args: Any, finetuning_args: Any) -> list[Replacement]:
    """The replacements with which batches hold the augmented pairs, and the numbers of the data's columns."""
    from llamafactory.data import loader
    from llamafactory.train.dpo import workflow

    sr_prompt, columns = finetuning_args.refinement_prompt, Columns.of_recipe(finetuning_args)
    if sr_prompt is None and not finetuning_args.data_columns:
        return []
    processor, collator = loader.PairwiseDatasetProcessor, workflow.PairwiseDataCollatorWithPadding
    checks: list[Callable[[Any], None]] = []
    found: list[Replacement] = []
    if sr_prompt is not None:
        processor = functools.partial(AugmentingProcessor, sr_prompt=sr_prompt, context=model_context(model_args))
        collator = AugmentingCollator
        checks.append(functools.partial(check_augmented, sr_prompt=sr_prompt))
    if finetuning_args.data_columns:
        processor, collator = functools.partial(_carried, processor), carrying_collator(collator, columns)
        checks.append(columns.check)
        found.append(_carrying(columns))
    return [
        *found,
        (loader, "PairwiseDatasetProcessor", processor),
        (workflow, "PairwiseDataCollatorWithPadding", collator),
        (workflow, "get_dataset", _checked(workflow.get_dataset, checks)),
    ]


def _carried(make: Callable[..., Any], /, **about: Any) -> CarryingProcessor:
    return CarryingProcessor(make(**about))


@contextmanager
def columns_carried(finetuning_args: Any) -> Iterator[None]:
    """Inside the with block, pairs are loaded with the numbers of the columns that the recipe names, if any."""
    if not finetuning_args.data_columns:
        yield
        return
    with replaced(*_carrying(Columns.of_recipe(finetuning_args))):
        yield


def _carrying(columns: Columns) -> Replacement:
    """The replacement with which pairs in LLaMA-Factory's standard format have the numbers of the data's columns."""
    from llamafactory.data import converter

    stock = converter.get_dataset_converter

    @functools.wraps(stock)
    def get_dataset_converter(name: str, dataset_attr: Any, *args: Any, **kwargs: Any) -> CarryingConverter:
        return CarryingConverter(stock(name, dataset_attr, *args, **kwargs), columns, str(dataset_attr))

    return converter, "get_dataset_converter", get_dataset_converter


def _checked(get_dataset: Callable[..., Any], checks: list[Callable[[Any], None]]) -> Callable[..., Any]:
    """LLaMA-Factory's `get_dataset`, whose data may have been tokenized by another recipe (`tokenized_path`)."""

    @functools.wraps(get_dataset)
    def checked(*args: Any, **kwargs: Any) -> Any:
        module = get_dataset(*args, **kwargs)
        for dataset in module.values():
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                for check in checks:
                    check(part)
        return module

    return checked
