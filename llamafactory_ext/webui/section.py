"""What the board shows: the fields in its RLHF section, and reward curves below its loss."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import TRAINER_LOG
from llamafactory.webui.common import get_save_dir

from ..losses import STOCK_LOSSES
from ..plots import reward_figure
from ..recipe.arguments import keys_of
from ..training.monitors import problem, read_trainer_log, stopped_at
from . import texts
from .fields import FIELDS, LOSS_FIELDS, STAGE_FIELDS, is_dpo, is_shown, losses_of
from .loss_files import LossFiles

Update = dict[Component, Component]
AT_ONCE = 4  # loss files being read, a process each; logs being drawn


def make_fields() -> dict[str, Any]:
    """The fields' components by key, not standing anywhere yet."""
    return {key: field.kind(**field.properties, visible=False, render=False) for key, field in FIELDS.items()}


def extend_train_tab(engine: Any, elems: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The board's train tab with the plugin's fields and curves in their places: its components by name.

    Args:
        engine: the board's.
        elems: the tab's components, by name.
        fields: of `make_fields`.
    """
    lang = engine.manager.get_elem_by_id("top.lang")
    _take_any_loss(elems["pref_loss"])
    with elems["rlhf_tab"]:
        section = _Section(elems["pref_loss"], fields, engine.runner.loss_files)
    section.follow(lang, elems["training_stage"])

    column = elems["loss_viewer"].parent
    with column.parent, column:
        curves = _Curves()
    chosen = [engine.manager.get_elem_by_id(f"top.{name}") for name in ("model_name", "finetuning_type")]
    if not engine.demo_mode:  # which trains nothing, and whose visitors have no business with runs on the machine
        # The board writes into its output box whenever it has read a run's log, and when a run's folder is chosen.
        curves.follow([elems["output_box"], elems["output_dir"], lang], [lang, *chosen, elems["output_dir"]])
    return elems | fields | {"reward_viewer": curves.viewer}


def _take_any_loss(pref_loss: Any) -> None:
    """Let the dropdown hold losses that a page has not been told of yet: of a loaded configuration, or of a run that
    goes on while the page is loaded. Settings are checked before anything starts."""
    pref_loss.allow_custom_value = True
    pref_loss.constructor_args["allow_custom_value"] = True  # gradio makes a session's own from these


class _Section:
    """The fields, and a line about the chosen loss; to be made where they are to stand."""

    def __init__(self, pref_loss: Any, fields: dict[str, Any], loss_files: LossFiles) -> None:
        self.pref_loss, self.fields, self.loss_files = pref_loss, fields, loss_files
        self.about = gr.Markdown(visible=False, elem_id="about_loss")
        for group in (LOSS_FIELDS, STAGE_FIELDS):
            with gr.Row():
                for key in group:
                    fields[key].render()

    def follow(self, lang: Any, stage: Any) -> None:
        """Show what belongs to the chosen stage and loss. The board sets its language when a page is loaded."""
        loss_file = self.fields["pref_loss_file"]
        hidden: dict[str, Any] = {"show_progress": "hidden", "show_api": False}
        # On its own, because it may take a minute, which would keep others from their answers.
        read = loss_file.submit(self.read, [loss_file], None, concurrency_limit=AT_ONCE, **hidden)
        # One after the other: on a busy machine, an answer to an earlier choice could come last, and hide fields.
        ordered = hidden | {"concurrency_limit": 1, "concurrency_id": "llamafactory_ext"}
        triggers, inputs = [lang.change, stage.change], [stage, self.pref_loss, loss_file]
        # Not the choices, when one of them was taken: new ones would close a list that is open again.
        for event in (partial(gr.on, triggers), read.then):
            event(self.offer, inputs, [self.pref_loss], **ordered)
        outputs = [self.about, *self.fields.values()]
        for event in (partial(gr.on, [*triggers, self.pref_loss.change]), read.then):
            event(self.show, [lang, *inputs], outputs, **ordered)

    def read(self, loss_file: str) -> None:
        """Find out what a loss file registers."""
        refuse_unless_texts(loss_file)
        self.loss_files.read(loss_file, again=True)

    def offer(self, stage: str, name: str, loss_file: str) -> Component:
        """The losses that the stage can train."""
        refuse_unless_texts(stage, name, loss_file)
        losses, error = losses_of(stage, loss_file)
        offered: dict[str, Any] = {"choices": list(losses)}
        if not is_dpo(stage) and name not in losses:
            offered["value"] = STOCK_LOSSES[0]
        elif loss_file and error is None and name not in losses:
            offered["value"] = list(losses)[-1]  # the file's; a loss that was renamed there is gone
        return gr.Dropdown(**offered)

    def show(self, lang: str, stage: str, name: str, loss_file: str) -> Update:
        """What the loss is, and its fields."""
        refuse_unless_texts(lang, stage, name, loss_file)
        losses, error = losses_of(stage, loss_file)
        loss = losses.get(name)
        about = error or (loss and (texts.about_loss(name, lang) or loss.description.splitlines()[0])) or ""
        update: Update = {self.about: gr.Markdown(about, visible=is_dpo(stage) and bool(about))}
        defaults = keys_of(loss) if loss else {}
        for key, component in self.fields.items():
            shown: dict[str, Any] = {"visible": is_shown(key, stage, loss)}
            if isinstance(component, gr.Number) and key in defaults:
                default = defaults[key]
                shown["placeholder"] = f"{default:g}" if isinstance(default, (int, float)) else str(default)
            update[component] = component.__class__(**shown)
        return update


class _Curves:
    """The normalized rewards of the run in the chosen folder; to be made where they are to stand."""

    def __init__(self) -> None:
        self.viewer = gr.Plot(visible=False, elem_id="reward_viewer")
        self.warning = gr.Markdown(visible=False, elem_id="reward_warning")

    def follow(self, sources: list[Any], inputs: list[Any]) -> None:
        """Draw whenever one of the sources changes."""
        gr.on(
            [source.change for source in sources],
            self.show,
            inputs,
            [self.viewer, self.warning],
            show_progress="hidden",
            show_api=False,
            concurrency_limit=AT_ONCE,
        )

    def show(self, lang: str, model_name: str | None, finetuning_type: str, output_dir: str | None) -> Update:
        refuse_unless_texts(lang, model_name, finetuning_type, output_dir)
        logs: list[dict[str, Any]] = []
        if model_name and output_dir:
            folder = _folder(model_name, finetuning_type or "", output_dir)
            logs = read_trainer_log(folder / TRAINER_LOG)
        figure, words = reward_figure(logs), about_run(logs, lang)
        return {
            self.viewer: gr.Plot(figure, visible=figure is not None),
            self.warning: gr.Markdown(words, visible=bool(words)),
        }


def about_run(logs: list[dict[str, Any]], lang: str) -> str:
    """What is wrong with a run, whether that has ended it, and what to try; empty if nothing is."""
    found, step = problem(logs), stopped_at(logs)
    if found is None:
        return ""
    sentences = [texts.alert(found, lang), texts.alert("remedies", lang)]
    if step is not None:
        sentences.insert(1, texts.alert("stopped", lang).format(step=step, total=logs[-1].get("total_steps", "?")))
    return f"⚠️ {' '.join(sentences)}"


def refuse_unless_texts(*values: Any) -> None:
    """End an event that sends what no text field or dropdown gives: whoever reaches the board can send anything."""
    if not all(value is None or isinstance(value, str) for value in values):
        raise gr.Error("This is what the board's fields cannot give.", print_exception=False)


@lru_cache(maxsize=100)  # LLaMA-Factory warns of folders elsewhere than its own each time it is asked
def _folder(*names: str) -> Path:
    return Path(get_save_dir(*names))
