"""The only place where LLaMA-Factory is patched: one function per patch, one table that says what and why.

Each patch is applied the moment the module that it concerns has been loaded, before anyone can take a name out of it.
What the plugin needs of LLaMA-Factory is checked at that moment too: if a name or a parameter is gone, the import
fails and says what to do. There is no half-patched state to train in.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, ModuleType, TracebackType
from typing import Any, get_args, get_type_hints

import wrapt

from . import __version__


@dataclass(frozen=True)
class Patch:
    """What is done to a module once it is loaded.

    Args:
        module: its full name.
        why: the reason, for readers.
        needs: name in the module (dotted for a member) -> parameters that it must take.
        apply: the patch; None where the module is only relied upon.
    """

    module: str
    why: str
    needs: dict[str, tuple[str, ...]]
    apply: Callable[[ModuleType], None] | None = None


def arm() -> None:
    """Register every patch, to be applied when its module is loaded."""
    for patch in PATCHES:
        wrapt.register_post_import_hook(functools.partial(_apply, patch), patch.module)
    sys.excepthook = functools.partial(_tell_of_env, sys.excepthook)


def _tell_of_env(
    shown: Callable[..., None], kind: type[BaseException], error: BaseException, at: TracebackType | None
) -> None:
    """After the traceback of a failed import of LLaMA-Factory, which seldom names the package that is to blame."""
    shown(kind, error, at)
    if any(_is_import_of_llamafactory(frame) for frame, _ in traceback.walk_tb(at)):
        print("`llamafactory-ext env` names packages that do not go together, and what mends them.", file=sys.stderr)


def _is_import_of_llamafactory(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return frame.f_code.co_name == "<module>" and name.startswith("llamafactory.")


def _apply(patch: Patch, module: ModuleType) -> None:
    for name, parameters in patch.needs.items():
        _check(module, name, parameters)
    if patch.apply is not None:
        patch.apply(module)


def _check(module: ModuleType, name: str, parameters: tuple[str, ...]) -> None:
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise _misfit(f"{module.__name__}.{name} is missing")
        target = getattr(target, part)
    missing = [p for p in parameters if p not in inspect.signature(target).parameters]
    if missing:
        raise _misfit(f"{module.__name__}.{name} does not take {', '.join(missing)}")


def _misfit(what: str) -> ImportError:
    # Not the distribution's version: a source tree has none, and the development version goes by another name.
    upstream = getattr(sys.modules.get("llamafactory"), "__version__", "of unknown version")
    return ImportError(
        f"llamafactory_ext {__version__} does not fit LLaMA-Factory {upstream}: {what}. "
        "Install llamafactory>=0.9.4,<0.9.7, or set LLAMAFACTORY_EXT=0 to run LLaMA-Factory without the plugin."
    )


# --- the patches ---------------------------------------------------------------------------------------------------


def _extend_arguments(module: ModuleType) -> None:
    from .recipe.arguments import extend

    module.FinetuningArguments = extend(module.FinetuningArguments)  # type: ignore[attr-defined]


def _train_ours(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "run_dpo", _run_dpo)


def _run_dpo(stock: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call LLaMA-Factory's workflow with our trainer in the place where the workflow looks for its own."""
    from llamafactory.train.dpo import trainer as upstream
    from llamafactory.train.dpo import workflow

    from .training.pitfalls import check_recipe
    from .training.reference.model import PendingReference
    from .training.trainer import PreferenceTrainer, TrainerCheck

    arguments = inspect.signature(stock).bind(*args, **kwargs).arguments
    check_recipe(*(arguments[name] for name in ("model_args", "data_args", "training_args", "finetuning_args")))
    _announce(arguments["model_args"], arguments["training_args"], arguments["finetuning_args"])

    callbacks = arguments.get("callbacks") or []
    arguments["callbacks"] = [TrainerCheck(), *_metrics_in_trainer_log(callbacks), *callbacks]
    with contextlib.ExitStack() as replacements:
        replacements.enter_context(_replaced(upstream, "CustomDPOTrainer", PreferenceTrainer))
        # Not loaded yet: the trainer knows whether it is needed.
        pending = functools.partial(PendingReference, workflow.create_ref_model)
        replacements.enter_context(_replaced(workflow, "create_ref_model", pending))
        sr_prompt = arguments["finetuning_args"].refinement_prompt
        if sr_prompt is not None:
            for module, name, value in _augmenting(sr_prompt, arguments["model_args"]):
                replacements.enter_context(_replaced(module, name, value))
        stock(**arguments)


def _augmenting(sr_prompt: str, model_args: Any) -> list[tuple[ModuleType, str, object]]:
    """What the workflow must find in place of its own, so that batches hold the augmented pairs too."""
    from llamafactory.data import loader
    from llamafactory.train.dpo import workflow

    from .training.refinement import AugmentingCollator, AugmentingProcessor, check_augmented, model_context

    @functools.wraps(workflow.get_dataset)
    def get_dataset(*args: Any, **kwargs: Any) -> Any:
        module = stock_get_dataset(*args, **kwargs)
        for dataset in module.values():
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                check_augmented(part, sr_prompt)
        return module

    stock_get_dataset = workflow.get_dataset
    processor = functools.partial(AugmentingProcessor, sr_prompt=sr_prompt, context=model_context(model_args))
    return [
        (loader, "PairwiseDatasetProcessor", processor),
        (workflow, "PairwiseDataCollatorWithPadding", AugmentingCollator),
        (workflow, "get_dataset", get_dataset),
    ]


class _replaced:  # noqa: N801  (reads as a verb)
    """An attribute of a module or an object, replaced for the time of a with block."""

    def __init__(self, module: Any, name: str, value: object) -> None:
        self.module, self.name, self.value = module, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.module, self.name)
        setattr(self.module, self.name, self.value)

    def __exit__(self, *exc_info: object) -> None:
        setattr(self.module, self.name, self.before)


def _announce(model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    from llamafactory.extras import logging

    logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI
    logger.info_rank0(f"llamafactory_ext {__version__} is active and trains {finetuning_args.describe_loss()}.")
    continues_adapter = model_args.adapter_name_or_path is not None and not finetuning_args.create_new_adapter
    reference_is_base = finetuning_args.use_ref_model and finetuning_args.ref_model is None
    if training_args.do_train and continues_adapter and reference_is_base:
        logger.warning_rank0(
            "The reference is the base model, without the adapter that training continues: to compare with that "
            "adapter, set create_new_adapter: true, or name it with ref_model and ref_model_adapters."
        )


def _metrics_in_trainer_log(callbacks: list[Any]) -> list[Any]:
    """A callback for each of LLaMA-Factory's `LogCallback`s, whose lines hold a fixed choice of metrics otherwise."""
    from llamafactory.train.callbacks import LogCallback
    from transformers import TrainerCallback

    class MetricsInTrainerLog(TrainerCallback):
        def __init__(self, log_callback: Any) -> None:
            self.log_callback = log_callback

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The line is written by a thread, later: the metrics must be bound to it now.
            metrics = {name: value for name, value in state.log_history[-1].items() if "/" in name}
            write = functools.partial(type(self.log_callback)._write_log, self.log_callback)
            self.log_callback._write_log = lambda output_dir, logs: write(output_dir, {**logs, **metrics})

    return [MetricsInTrainerLog(callback) for callback in callbacks if isinstance(callback, LogCallback)]


def _refuse_in_v1(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "launch", _launch_v1)


def _launch_v1(stock: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a loss that the engine lacks: it would train another one, or find out once the weights are loaded."""
    from omegaconf import OmegaConf

    files = [word for word in sys.argv[1:] if word.endswith((".yaml", ".yml", ".json")) and os.path.isfile(word)]
    recipe = OmegaConf.merge(OmegaConf.create(), *map(OmegaConf.load, files), OmegaConf.from_cli(sys.argv[1:]))
    loss = OmegaConf.select(recipe, "pref_loss")
    if loss is not None and loss not in (known := _losses_of_v1()):
        has = f"only the preference losses {', '.join(known)}" if known else "no preference losses"
        raise ValueError(
            f"pref_loss {loss!r} cannot be trained with USE_V1: the v1 engine of this LLaMA-Factory has {has}. "
            "Unset USE_V1."
        )
    stock(*args, **kwargs)


def _losses_of_v1() -> tuple[str, ...]:
    """None in LLaMA-Factory 0.9.5, whose v1 engine has no such key; later versions list them in its type."""
    from llamafactory.v1.config.training_args import TrainingArguments

    return get_args(get_type_hints(TrainingArguments).get("pref_loss"))


def _add_words(module: ModuleType) -> None:
    from .webui.texts import locales

    module.LOCALES.update(locales(module.LOCALES["pref_loss"]))


def _keep_settings(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "_clean_cmd", _clean_cmd)
    wrapt.wrap_function_wrapper(module, "gen_cmd", _gen_cmd)


def _clean_cmd(stock: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Also keep keys of ours that are false: left out, they would mean `where that is exact`."""
    from .webui.fields import FLAGS

    (settings,) = args
    return stock(settings) | {key: settings[key] for key in FLAGS if settings.get(key) is False}


def _gen_cmd(stock: Callable[..., str], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Quote texts of ours, so that the command can be pasted into a shell."""
    from .webui.fields import TEXT_KEYS

    (settings,) = args
    texts = {key: shlex.quote(settings[key]) for key in TEXT_KEYS if isinstance(settings.get(key), str)}
    return stock(settings | texts)


def _run_with_fields(module: ModuleType) -> None:
    from .webui.runner import PreferenceRunner

    module.Runner = PreferenceRunner  # type: ignore[attr-defined]


def _add_fields(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "create_train_tab", _create_train_tab)


def _create_train_tab(stock: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from .webui.section import extend_train_tab, make_fields

    (engine,) = args
    # What the tab's buttons hand over must be there before they are made; the place for it, only afterwards.
    fields, base = make_fields(), engine.manager.get_base_elems
    with _replaced(engine.manager, "get_base_elems", lambda: base() | set(fields.values())):
        elems = stock(engine)
    return extend_train_tab(engine, elems, fields)


PATCHES = (
    Patch(
        "llamafactory.hparams.finetuning_args",
        "YAML, command line and web UI know the plugin's keys, and wrong values stop before anything is loaded.",
        {"FinetuningArguments": ("stage", "pref_loss", "pref_beta", "pref_ftx", "pref_bco_weight", "ld_alpha")},
        _extend_arguments,
    ),
    Patch(
        "llamafactory.train.dpo.workflow",
        "Stage dpo trains the loss that the YAML names, and says which.",
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
        "PreferenceTrainer is a subclass of it.",
        {
            "CustomDPOTrainer.__init__": ("model", "ref_model", "finetuning_args", "kwargs"),
            "CustomDPOTrainer.get_batch_loss_metrics": ("model", "batch", "train_eval"),
            "CustomDPOTrainer.log": ("logs",),
        },
    ),
    Patch(
        "llamafactory.data.loader",
        "The refinement term puts a processor of ours in the place of this one, for the time of a run.",
        {"PairwiseDatasetProcessor": ("template", "tokenizer", "processor", "data_args")},
    ),
    Patch(
        "llamafactory.train.trainer_utils",
        "logps.py sums the log-probabilities with it.",
        {"get_batch_logps": ("logits", "labels", "ld_alpha"), "nested_detach": ("tensors", "clone")},
    ),
    Patch(
        "llamafactory.train.callbacks",
        "Its lines in trainer_log.jsonl are given the preference metrics.",
        {"LogCallback._write_log": ("output_dir", "logs"), "LogCallback.on_log": ("args", "state", "control")},
    ),
    Patch(
        "llamafactory.webui.locales",
        "The board's components take their words from it.",
        {"LOCALES": (), "ALERTS": ()},
        _add_words,
    ),
    Patch(
        "llamafactory.webui.common",
        "The board drops what is false, and does not quote, on the way to a command.",
        {"_clean_cmd": ("args",), "gen_cmd": ("args",), "get_save_dir": ("paths",)},
        _keep_settings,
    ),
    Patch(
        "llamafactory.webui.runner",
        "PreferenceRunner is a subclass of it.",
        {
            "Runner._initialize": ("data", "do_train", "from_preview"),
            "Runner._parse_train_args": ("data",),
            "Runner._build_config_dict": ("data",),
            "Runner.load_args": ("lang", "config_path"),
            "Runner.check_output_dir": ("output_dir",),
        },
    ),
    Patch(
        "llamafactory.webui.engine",
        "The board runs what its fields say.",
        {"Runner": (), "Engine": ("demo_mode",)},
        _run_with_fields,
    ),
    Patch(
        "llamafactory.webui.interface",
        "The board's train tab gains fields and curves.",
        {"create_train_tab": ("engine",)},
        _add_fields,
    ),
    Patch(
        "llamafactory.v1.launcher",
        "The v1 engine knows few preference losses, or none, and none of the plugin's.",
        {"launch": ()},
        _refuse_in_v1,
    ),
)
