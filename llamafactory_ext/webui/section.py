"""What the board shows: the fields in its RLHF section, and reward curves below its loss."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from gradio.components import Component
from llamafactory.extras.constants import TRAINER_LOG
from llamafactory.extras.ploting import smooth
from llamafactory.webui.common import get_save_dir

from ..losses import STOCK_LOSSES
from ..plots import reward_figure
from ..recipe.keys import keys_of
from ..training.monitors import problem, read_trainer_log, stopped_at
from .errors import joined
from .fields import (
    FIELDS,
    LOSS_FIELDS,
    OBJECTIVE_FIELDS,
    STAGE_FIELDS,
    alert,
    chosen_losses,
    is_dpo,
    is_shown,
    losses_of,
    why_not,
)
from .loss_files import LossFiles
from .loss_texts import about_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Update = dict[Component, Component]
AT_ONCE = 4  # loss files being read, a process each; logs being drawn

# Browsers drop the comma of 0,5 from a number field in most languages, which leaves 05. What a number field shows and
# cannot give, such as 1e, would be sent as empty, and so as the default.
NUMBER_FIELDS = """() => {
  const isNumber = (event) => event.target.type === "number";
  document.addEventListener("beforeinput", (event) => {
    if (isNumber(event) && event.data?.includes(",")) {
      event.preventDefault();
      document.execCommand("insertText", false, event.data.replaceAll(",", "."));
    }
  }, true);
  document.addEventListener("focusout", (event) => {
    if (isNumber(event) && event.target.validity.badInput) event.target.value = "";
  });
}"""


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
    gr.on(None, None, js=NUMBER_FIELDS, show_api=False)  # when the page is loaded

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
        for group in (LOSS_FIELDS, OBJECTIVE_FIELDS, STAGE_FIELDS):
            with gr.Row():
                for key in group:
                    fields[key].render()

    def follow(self, lang: Any, stage: Any) -> None:
        """Show what belongs to the chosen stage and loss. The board sets its language when a page is loaded."""
        loss_file, prompt = self.fields["pref_loss_file"], self.fields["sr_prompt"]
        default = json.dumps(FIELDS["sr_prompt"].empty)
        prompt.blur(None, prompt, prompt, js=f"(text) => text.trim() ? text : {default}", show_api=False)
        hidden: dict[str, Any] = {"show_progress": "hidden", "show_api": False}
        # On its own, because it may take a minute, which would keep others from their answers.
        read = loss_file.submit(self.read, [loss_file], None, concurrency_limit=AT_ONCE, **hidden)
        # One after the other: on a busy machine, an answer to an earlier choice could come last, and hide fields.
        ordered = hidden | {"concurrency_limit": 1, "concurrency_id": "llamafactory_ext"}
        triggers, inputs = [lang.change, stage.change], [stage, self.pref_loss, loss_file]
        # Not the choices, when one of them was taken: new ones would close a list that is open again.
        gr.on(triggers, self.offer, inputs, [self.pref_loss], **ordered)
        read.then(self.take, inputs, [self.pref_loss], **ordered)
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
        losses, _ = losses_of(stage, loss_file)
        if not is_dpo(stage) and name not in losses:
            return gr.Dropdown(choices=list(losses), value=STOCK_LOSSES[0])
        return gr.Dropdown(choices=list(losses))

    def take(self, stage: str, name: str, loss_file: str) -> Component:
        """The same, with a loss of the file chosen that has been read."""
        offered = self.offer(stage, name, loss_file)
        losses, error = losses_of(stage, loss_file)
        is_taken = loss_file and error is None and not chosen_losses(name, losses)
        return gr.Dropdown(choices=list(losses), value=list(losses)[-1]) if is_taken else offered

    def show(self, lang: str, stage: str, name: str, loss_file: str) -> Update:
        """What the loss is or why it cannot be trained, and its fields."""
        refuse_unless_texts(lang, stage, name, loss_file)
        losses, error = losses_of(stage, loss_file)
        chosen = chosen_losses(name, losses)
        about = ""
        if is_dpo(stage):
            wrong = why_not(name, losses, error, lang)
            described = (about_loss(loss.name, lang) or loss.description.splitlines()[0] for loss in chosen)
            about = f"⚠️ {wrong}" if wrong else " + ".join(described)
        update: Update = {self.about: gr.Markdown(about, visible=bool(about))}
        defaults = {key: value for loss in reversed(chosen) for key, value in keys_of(loss).items()}
        for key, component in self.fields.items():
            shown: dict[str, Any] = {"visible": is_shown(key, stage, chosen)}
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
        if figure is not None:
            _smooth(figure)
        return {
            self.viewer: gr.Plot(figure, visible=figure is not None),
            self.warning: gr.Markdown(words, visible=bool(words)),
        }


def _smooth(figure: Figure) -> None:
    """Draw each curve smoothed, as the board does with its loss, above all of them as they were logged, in pale."""
    (axes,) = figure.axes
    curves = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]  # not the line at 0
    for curve in curves:
        steps, values = np.asarray(curve.get_data())
        if len(steps) < 2:  # a point
            return
        label, color = str(curve.get_label()), curve.get_color()
        curve.set(alpha=0.3, label=f"_{label}", zorder=1.5)
        axes.plot(steps, smooth(values.tolist()), color=color, label=label, zorder=2.5)
    # Not in the legend: a title as wide as this would stand on curves.
    axes.set_xlabel("step (dark: smoothed, pale: as logged)")
    axes.legend(frameon=False)


def about_run(logs: list[dict[str, Any]], lang: str) -> str:
    """What is wrong with a run, whether that has ended it, and what to try; empty if nothing is."""
    found, step = problem(logs), stopped_at(logs)
    if found is None:
        return ""
    sentences = [alert(found, lang), alert("remedies", lang)]
    if step is not None:
        sentences.insert(1, alert("stopped", lang, step=step, total=logs[-1].get("total_steps", "?")))
    return f"⚠️ {joined(sentences, lang)}"


def refuse_unless_texts(*values: Any) -> None:
    """End an event that sends what no text field or dropdown gives: whoever reaches the board can send anything."""
    if not all(value is None or isinstance(value, str) for value in values):
        raise gr.Error("The board's fields cannot give this value.", print_exception=False)


@lru_cache(maxsize=100)  # LLaMA-Factory warns of folders elsewhere than its own each time it is asked
def _folder(*names: str) -> Path:
    return Path(get_save_dir(*names))
