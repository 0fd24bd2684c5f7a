"""What takes the place of LLaMA-Factory's converter, processor and collator of pairs, for what a loss needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from ..patching import replaced
from .answers import AnswersProcessor, aligned_with_answers, say_what_was_cut
from .columns import CarryingConverter, CarryingProcessor, Columns, carrying_collator
from .ranking import RankedCollator, check_ranking
from .refinement import AugmentingCollator, AugmentingProcessor, check_augmented, model_context

Replacement = tuple[ModuleType, str, object]  # module, name, value


def replacements(model_args: Any, finetuning_args: Any) -> list[Replacement]:
    """The replacements with which batches hold more than LLaMA-Factory's pairs.

    Answers of several turns, more than two of them, the augmented pairs, and the numbers of the data's columns.
    """
    from llamafactory.data import loader
    from llamafactory.train.dpo import workflow

    sr_prompt, columns = finetuning_args.refinement_prompt, Columns.of_recipe(finetuning_args)
    processor: Callable[..., Any] = AnswersProcessor
    collator: type = RankedCollator
    checks: list[Callable[[Any], None]] = [functools.partial(check_ranking, finetuning_args), say_what_was_cut]
    if sr_prompt is not None:
        processor = functools.partial(AugmentingProcessor, sr_prompt=sr_prompt, context=model_context(model_args))
        collator = AugmentingCollator
        checks.append(functools.partial(check_augmented, sr_prompt=sr_prompt))
    if finetuning_args.data_columns:
        processor, collator = functools.partial(_carried, processor), carrying_collator(collator, columns)
        checks.append(columns.check)
    return [
        *_in_loading(finetuning_args),
        (loader, "PairwiseDatasetProcessor", processor),
        (workflow, "PairwiseDataCollatorWithPadding", collator),
        (workflow, "get_dataset", _checked(workflow.get_dataset, checks)),
    ]


def _carried(make: Callable[..., Any], /, **about: Any) -> CarryingProcessor:
    return CarryingProcessor(make(**about))


@contextmanager
def loaded_as_trained(finetuning_args: Any) -> Iterator[None]:
    """Inside the with block, pairs are loaded as a training of the recipe loads them, into the standard format."""
    with ExitStack() as replacements:
        for module, name, value in _in_loading(finetuning_args):
            replacements.enter_context(replaced(module, name, value))
        yield


def _in_loading(finetuning_args: Any) -> list[Replacement]:
    from llamafactory.data import loader

    found: list[Replacement] = [(loader, "align_dataset", aligned_with_answers(loader.align_dataset))]
    if finetuning_args.data_columns:
        found.append(_carrying(Columns.of_recipe(finetuning_args)))
    return found


def _carrying(columns: Columns) -> Replacement:
    """The replacement with which pairs in LLaMA-Factory's standard format have the numbers of the data's columns."""
    from llamafactory.data import converter

    stock = converter.get_dataset_converter

    @functools.wraps(stock)
    def get_dataset_converter(name: str, dataset_attr: Any, *args: Any, **kwargs: Any) -> CarryingConverter:
        ranked_by = getattr(dataset_attr, "scores", None)
        return CarryingConverter(stock(name, dataset_attr, *args, **kwargs), columns, str(dataset_attr), ranked_by)

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
