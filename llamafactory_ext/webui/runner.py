"""The board's runner, to which the plugin's fields are a part of the extra arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from llamafactory.extras.constants import TRAINER_LOG
from llamafactory.hparams import FinetuningArguments
from llamafactory.webui.common import get_save_dir
from llamafactory.webui.locales import ALERTS
from llamafactory.webui.runner import Runner

from ..losses.lookup import forgotten_afterwards, load_files_by
from ..losses.registry import Loss
from ..training.monitors import read_trainer_log, stopped_at
from .fields import (
    FIELDS,
    alert,
    chosen_losses,
    gathered,
    is_dpo,
    label,
    losses_of,
    reason,
    set_twice,
    spread,
    why_not,
    wrong_value,
)
from .loss_files import LossFiles
from .section import about_run

TOP = ("lang", "model_name", "finetuning_type")
# LLaMA-Factory's text fields whose number it reads without naming the field in its error.
NUMBERS_AS_TEXT = {"learning_rate": float, "num_train_epochs": float, "max_grad_norm": float, "max_samples": int}
Data = dict[Any, Any]  # component -> what it holds


class PreferenceRunner(Runner):
    """LLaMA-Factory's runner, with the plugin's fields in what it is handed and in what it hands back.

    A process that has one serves a board, and runs no loss file itself any more: a path is what a page has sent, in the
    field or in the extra arguments of any tab.
    """

    def __init__(self, manager: Any, demo_mode: bool = False) -> None:
        super().__init__(manager, demo_mode)
        self.loss_files = LossFiles(demo_mode)
        load_files_by(self.loss_files.load)

    # --- from the page: to the command, the saved configuration, the training -----------------------------------------

    def _initialize(self, data: Data, do_train: bool, from_preview: bool) -> str:
        """What is wrong with the settings, or an empty text."""
        error = super()._initialize(data, do_train, from_preview)
        return error or (self._wrong_setting(data) if do_train else "")

    def _parse_train_args(self, data: Data) -> dict[str, Any]:
        return dict(super()._parse_train_args(self._gathered(data)))

    def _build_config_dict(self, data: Data) -> dict[str, Any]:
        is_training = self._elem("extra_args") in data
        return dict(super()._build_config_dict(self._gathered(data) if is_training else data))

    def _gathered(self, data: Data) -> Data:
        """The board's own components, with what the fields hold in the extra arguments."""
        others = {elem: value for elem, value in data.items() if elem not in self._fields().values()}
        extra_args = gathered(data[self._elem("extra_args")], *self._chosen(data))
        return others | {self._elem("extra_args"): extra_args}

    def _wrong_setting(self, data: Data) -> str:
        lang = data[self.manager.get_elem_by_id("top.lang")]
        extra_args = data[self._elem("extra_args")]
        if not isinstance(json.loads(extra_args), dict):
            return str(ALERTS["err_json_schema"][lang])
        no_number = next((name for name in NUMBERS_AS_TEXT if not self._holds_number(name, data)), None)
        if no_number is not None:
            elem = self._elem(no_number)
            return alert("no_number", lang, field=label(no_number, lang), value=data[elem], like=elem.value)
        values, stage, chosen = self._chosen(data)
        twice = set_twice(extra_args, values, stage, chosen)
        if twice is not None:
            return alert("twice", lang, field=label(twice, lang))
        try:
            args = self._parse_train_args(data)
            wrong = self._wrong_preference(args, stage, lang)
            if wrong is None:
                names = {field.name for field in dataclasses.fields(FinetuningArguments) if field.init}
                with forgotten_afterwards():
                    FinetuningArguments(**{name: value for name, value in args.items() if name in names})
            return wrong or ""
        except (AssertionError, TypeError, ValueError) as error:
            return reason(error, lang)

    def _holds_number(self, name: str, data: Data) -> bool:
        try:
            NUMBERS_AS_TEXT[name](data[self._elem(name)])
        except (TypeError, ValueError):
            return False
        return True

    def _wrong_preference(self, args: dict[str, Any], stage: str, lang: str) -> str | None:
        """What the board has words for; extra arguments of other types are left to LLaMA-Factory's own check."""
        name, file = args.get("pref_loss"), args.get("pref_loss_file") or ""
        losses, error = self._losses_of(stage, file)
        if not (is_dpo(stage) and args["stage"] == "dpo" and isinstance(name, str) and isinstance(file, str)):
            return None
        return why_not(name, losses, error, lang) or wrong_value(args, chosen_losses(name, losses), lang)

    def _losses_of(self, stage: Any, loss_file: Any) -> tuple[dict[str, Loss], ValueError | None]:
        """As `losses_of`, of the file as it is now."""
        self.loss_files.read(loss_file)
        return losses_of(stage, loss_file if isinstance(loss_file, str) else "")

    def _chosen(self, data: Data) -> tuple[dict[str, Any], str, list[Loss]]:
        """What the fields hold, the stage, and the losses, as `fields` takes them."""
        values = {key: data[elem] for key, elem in self._fields().items()}
        wrong = next((key for key, value in values.items() if not FIELDS[key].can_give(value)), None)
        if wrong is not None:
            raise gr.Error(f"`{wrong}` has a value that its field cannot give.", print_exception=False)
        stage = data[self._elem("training_stage")]
        losses, _ = self._losses_of(stage, values["pref_loss_file"])  # `_wrong_setting` says what is wrong with a file
        return values, stage, chosen_losses(data[self._elem("pref_loss")], losses)

    # --- to the page: how a training goes -----------------------------------------------------------------------------

    def monitor(self) -> Iterator[Data]:
        """LLaMA-Factory's, which calls a training finished also where pref_stop_on_degeneration has ended it."""
        if not self.running_data:  # nothing runs, and LLaMA-Factory would wait for it
            return
        lang, *names = (self.running_data[self.manager.get_elem_by_id(f"top.{name}")] for name in TOP)
        is_training = self.do_train
        output = self.running_data.get(self._elem("output_dir")) if is_training else None
        update: Data = {}
        for update in super().monitor():
            yield update
        logs = read_trainer_log(Path(get_save_dir(*names, output), TRAINER_LOG)) if output else []
        if stopped_at(logs) is not None:
            box = self._elem("output_box")
            yield {**update, box: f"{about_run(logs, lang)}\n\n{update[box]}"}

    # --- to the page: a configuration is loaded, or a run's folder is chosen ------------------------------------------

    def load_args(self, lang: str, config_path: str) -> Data:
        return self._spread(super().load_args(lang, config_path))

    def check_output_dir(self, *args: Any) -> Data:
        return self._spread(super().check_output_dir(*args))

    def _spread(self, update: Data) -> Data:
        extra_args = self._elem("extra_args")
        if extra_args not in update:
            return update
        stage, name = update.get(self._elem("training_stage")), update.get(self._elem("pref_loss"))
        _, of_stage = spread(update[extra_args], stage, [])
        losses, _ = self._losses_of(stage, of_stage["pref_loss_file"])
        others, values = spread(update[extra_args], stage, chosen_losses(name, losses))
        return update | {extra_args: others} | {elem: values[key] for key, elem in self._fields().items()}

    def _fields(self) -> dict[str, Any]:
        return {key: self._elem(key) for key in FIELDS}

    def _elem(self, name: str) -> Any:
        return self.manager.get_elem_by_id(f"train.{name}")
