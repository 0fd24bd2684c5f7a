"""The patches of LLaMA-Factory that training needs: one function per patch, and a table that says what and why.

The patches of the web UI are in webui/patches.py, those of the v1 engine in training/v1.py. Each patch is checked when
its module is loaded: if LLaMA-Factory lacks a name or a parameter that the plugin needs, the import fails and says what
to do, so nothing trains with only some of the patches.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from types import FrameType, ModuleType, TracebackType
from typing import Any

import wrapt

from . import __version__, patching
from .patching import Patch, replaced


def arm() -> None:
    """Register every patch; each is applied when its module is loaded."""
    from .training import v1
    from .webui import patches as board

    for patch in (*PATCHES, *board.PATCHES, *v1.PATCHES):
        patching.register(patch)
    sys.excepthook = functools.partial(_point_to_env, sys.excepthook)


def _point_to_env(
    shown: Callable[..., None], kind: type[BaseException], error: BaseException, at: TracebackType | None
) -> None:
    """Point to `llamafactory-ext env` if importing LLaMA-Factory failed: the traceback seldom names the cause."""
    shown(kind, error, at)
    if any(_is_import_of_llamafactory(frame) for frame, _ in traceback.walk_tb(at)):
        print("Run `llamafactory-ext env` to see which packages are incompatible and how to fix it.", file=sys.stderr)


def _is_import_of_llamafactory(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return frame.f_code.co_name == "<module>" and name.startswith("llamafactory.")


# --- the patches -------------------------------------------------------------------------------------------------


def _extend_arguments(module: ModuleType) -> None:
    from .recipe.arguments import extend

    module.FinetuningArguments = extend(module.FinetuningArguments)  # type: ignore[attr-defined]


def _keep_columns(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "DatasetAttr.join", _join)


def _join(stock: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Read an entry of dataset_info.json, with the columns of `answers` and `scores` (`training/answers.py`)."""
    stock(*args, **kwargs)
    (entry,) = (*args, *kwargs.values())
    columns = entry.get("columns") or {}
    instance.answers, instance.scores = columns.get("answers"), columns.get("scores")


def _train_ours(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "run_dpo", _run_dpo)


def _run_dpo(stock: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run LLaMA-Factory's workflow with `PreferenceTrainer` in place of its own trainer."""
    from llamafactory.train.dpo import trainer as upstream
    from llamafactory.train.dpo import workflow

    from .training import loading
    from .training.pitfalls import check_recipe, data_errors_in_words, router_loss_weight
    from .training.reference.model import PendingReference
    from .training.trainer import PreferenceTrainer, TrainerCheck

    arguments = inspect.signature(stock).bind(*args, **kwargs).arguments
    arguments["finetuning_args"].router_loss_weight = router_loss_weight(arguments["model_args"])
    check_recipe(*(arguments[name] for name in ("model_args", "data_args", "training_args", "finetuning_args")))
    _announce(arguments["model_args"], arguments["training_args"], arguments["finetuning_args"])
    if arguments["data_args"].streaming:  # accelerate would join the batches of all ranks, whose lengths differ
        arguments["training_args"].accelerator_config.dispatch_batches = False

    callbacks = arguments.get("callbacks") or []
    arguments["callbacks"] = [TrainerCheck(), *_metrics_in_trainer_log(callbacks), *callbacks]
    with data_errors_in_words(), contextlib.ExitStack() as replacements:
        replacements.enter_context(replaced(upstream, "CustomDPOTrainer", PreferenceTrainer))
        # Loaded later: only the trainer knows whether it is needed.
        pending = functools.partial(PendingReference, workflow.create_ref_model)
        replacements.enter_context(replaced(workflow, "create_ref_model", pending))
        for module, name, value in loading.replacements(arguments["model_args"], arguments["finetuning_args"]):
            replacements.enter_context(replaced(module, name, value))
        stock(**arguments)


def _announce(model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    from llamafactory.extras import logging

    logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI
    logger.info_rank0(f"llamafactory_ext {__version__} is active and trains {finetuning_args.described}.")
    continues_adapter = model_args.adapter_name_or_path is not None and not finetuning_args.create_new_adapter
    reference_is_base = finetuning_args.use_ref_model and finetuning_args.ref_model is None
    if training_args.do_train and continues_adapter and reference_is_base:
        logger.warning_rank0(
            "The reference is the base model without the adapter that this run continues to train. To include the "
            "adapter in the reference, set `create_new_adapter: true`, or `ref_model` and `ref_model_adapters`."
        )


def _is_ours(name: str) -> bool:
    """A metric of pairs, or the loss of one of several evaluation sets: LLaMA-Factory writes neither."""
    return "/" in name or (name.startswith("eval_") and name.endswith("_loss"))


def _metrics_in_trainer_log(callbacks: list[Any]) -> list[Any]:
    """A callback for each of LLaMA-Factory's `LogCallback`s that adds our metrics to their fixed selection."""
    from llamafactory.train.callbacks import LogCallback
    from transformers import TrainerCallback

    class MetricsInTrainerLog(TrainerCallback):
        def __init__(self, log_callback: Any) -> None:
            self.log_callback = log_callback

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # A thread writes the line later, so the metrics are bound now.
            metrics = {name: value for name, value in state.log_history[-1].items() if _is_ours(name)}
            write = functools.partial(type(self.log_callback)._write_log, self.log_callback)
            self.log_callback._write_log = lambda output_dir, logs: write(output_dir, {**logs, **metrics})

    return [MetricsInTrainerLog(callback) for callback in callbacks if isinstance(callback, LogCallback)]


PATCHES = (
    Patch(
        "llamafactory.hparams.finetuning_args",
        "YAML, command line and web UI accept the plugin's keys; wrong values are refused before anything is loaded.",
        {"FinetuningArguments": ("stage", "pref_loss", "pref_beta", "pref_ftx", "pref_bco_weight", "ld_alpha")},
        _extend_arguments,
    ),
    Patch(
        "llamafactory.train.dpo.workflow",
        "Stage dpo trains the loss that the YAML names, and logs which.",
        {
            "run_dpo": ("model_args", "data_args", "training_args", "finetuning_args", "callbacks"),
            "get_dataset": (),
            "PairwiseDataCollatorWithPadding": (),
            "create_ref_model": ("model_args", "finetuning_args"),
        },
        _train_ours,
    ),
    Patch(
        "llamafactory.train.dpo.trainer",
        "PreferenceTrainer is a subclass of its trainer.",
        {
            "CustomDPOTrainer.__init__": ("model", "ref_model", "finetuning_args", "kwargs"),
            "CustomDPOTrainer.get_batch_loss_metrics": ("model", "batch", "train_eval"),
            "CustomDPOTrainer.log": ("logs",),
        },
    ),
    Patch(
        "llamafactory.data.parser",
        "dataset_info.json may name the columns of more than two answers and of their scores.",
        {"DatasetAttr.join": ("attr",)},
        _keep_columns,
    ),
    Patch(
        "llamafactory.data.loader",
        "Answers of several turns, the refinement term and columns of the data wrap its processor; `check` and `score` "
        "load pairs with it.",
        {
            "PairwiseDatasetProcessor": ("template", "tokenizer", "processor", "data_args"),
            "align_dataset": ("dataset", "dataset_attr", "data_args"),
            "_get_merged_dataset": ("dataset_names", "model_args", "data_args", "training_args", "stage"),
        },
    ),
    Patch(
        "llamafactory.data.converter",
        "Weights and scores of the data travel with the pairs.",
        {"get_dataset_converter": ("dataset_attr", "data_args")},
    ),
    Patch(
        "llamafactory.train.trainer_utils",
        "logps.py sums the log-probabilities with it.",
        {"get_batch_logps": ("logits", "labels", "ld_alpha"), "nested_detach": ("tensors", "clone")},
    ),
    Patch(
        "llamafactory.train.callbacks",
        "Its lines in trainer_log.jsonl also get the preference metrics.",
        {"LogCallback._write_log": ("output_dir", "logs"), "LogCallback.on_log": ("args", "state", "control")},
    ),
)
