"""Whoever reaches a board: its events are sent what no page sends, and files that were uploaded, over HTTP."""

from __future__ import annotations

import inspect
import itertools
import json
import os

import httpx
import psutil
import pytest
from llamafactory.webui.interface import create_ui

from llamafactory_ext.losses import lookup
from llamafactory_ext.webui.fields import FIELDS
from llamafactory_ext.webui.loss_files import FOLDERS

pytestmark = pytest.mark.slow

PAYLOAD = """
open({marker!r}, "w").close()
from llamafactory_ext import register_loss

@register_loss("planted")
def planted(pairs, *, beta: float):
    return pairs.margin
"""
PAGE = {
    "top.lang": "en",
    "top.model_name": "Custom",
    "top.model_path": "nowhere",
    "train.dataset": ["pairs"],
    "train.training_stage": "DPO",
    "train.output_dir": "run",
    "train.config_path": "mine.yaml",
}


class Board:
    """A board that is served, and a client that is nobody's browser."""

    def __init__(self, folder, demo_mode):
        self.page = create_ui(demo_mode=demo_mode)
        self.page.queue().launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
        self.client = httpx.Client(base_url=f"{self.page.local_url}gradio_api", timeout=120, trust_env=False)
        self.marker = folder / "was_run"
        sent = {"files": ("planted.py", PAYLOAD.format(marker=str(self.marker)))}
        (self.planted,) = self.client.post("/upload", files=sent).json()
        self.sessions = itertools.count()

    def close(self):
        self.client.close()
        self.page.close()

    def events(self, name):
        """Number and inputs of the events behind a function of the train tab."""
        return [(number, fn) for number, fn in self.page.fns.items() if fn.name == name]

    def send(self, number, data):
        """All that the event answers."""
        session = {"session_hash": f"attack{next(self.sessions)}"}
        body = json.dumps({"data": data, "fn_index": number, **session})  # with halves of characters, as they are
        joined = self.client.post("/queue/join", content=body, headers={"Content-Type": "application/json"})
        if joined.is_error:
            return joined.text
        try:
            answer = self.client.get("/queue/data", params=session).text
        except httpx.RemoteProtocolError:
            return "gradio cannot send half a character back"
        assert "process_completed" in answer, answer
        return answer

    def filled_in(self, inputs, **changes):
        """What a page sends with one of the train tab's buttons, some of it changed."""
        (_, fn), *_ = self.events("load_args")
        manager = fn.fn.__self__.manager
        values = PAGE | {f"train.{name}": value for name, value in changes.items()}
        named = {manager.get_elem_by_id(name): value for name, value in values.items()}
        return [named.get(each, each.value) for each in inputs]


@pytest.fixture(scope="module")
def board(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    load = lookup._load
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv(FOLDERS, raising=False)
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        served = Board(folder, request.param)
        yield served
        served.close()
    lookup.load_files_by(load)


def hostile(board):
    texts = [board.planted, "../../../../etc/passwd", "nul\0", "\ud800", "x" * 100_000, "[" * 50_000]
    return [None, True, -1, 10**400, ["DPO"], {"path": board.planted}, *texts]


def tracebacks_of_ours(capfd):
    """The last lines of tracebacks that went through the plugin's code."""
    tracebacks = capfd.readouterr().err.split("Traceback (most recent call last):")[1:]
    return {each.strip().splitlines()[-1][:200] for each in tracebacks if "/llamafactory_ext/" in each}


both = pytest.mark.parametrize("board", [False, True], ids=["board", "demo"], indirect=True)
values = pytest.mark.parametrize("board", [False], ids=["board"], indirect=True)


@values
def test_events_of_ours_refuse_what_no_field_gives(board, capfd):
    usual = {"lang": "en", "stage": "DPO", "name": "dpop"}
    refused = sent = 0
    for name in ("read", "offer", "show"):
        for number, fn in {fn.fn.__qualname__: (number, fn) for number, fn in board.events(name)}.values():
            data = [usual.get(name, "") for name in inspect.signature(fn.fn).parameters]
            for place, value in itertools.product(range(len(data)), hostile(board)):
                answer = board.send(number, [*data[:place], value, *data[place + 1 :]])
                refused += "cannot give" in answer
                sent += 1
    assert sent > 100
    assert refused >= 10
    assert not tracebacks_of_ours(capfd)
    assert not board.marker.exists()
    assert "planted" not in lookup.loss_names()


@values
def test_settings_of_ours_refuse_what_no_field_gives(board, capfd):
    for name in ("preview_train", "save_args"):
        ((number, fn),) = board.events(name)
        for key, value in itertools.product(FIELDS, hostile(board)):
            board.send(number, board.filled_in(fn.inputs, **{key: value}))
        for key in ("pref_loss", "extra_args"):
            board.send(number, board.filled_in(fn.inputs, **{key: board.planted}))
    assert not tracebacks_of_ours(capfd)
    assert not board.marker.exists()


@both
@pytest.mark.parametrize("way", ["field", "extra arguments", "other stage", "saved configuration"])
def test_no_path_that_a_page_sends_is_run_or_trained(board, way):
    changes = {"pref_loss": "planted", "pref_loss_file": board.planted}
    extra = {"pref_loss_file": board.planted}
    if way == "extra arguments":
        changes = {"pref_loss": "planted", "extra_args": json.dumps(extra)}
    if way == "other stage":
        changes = {"training_stage": "KTO", "extra_args": json.dumps(extra | {"stage": "dpo", "pref_loss": "planted"})}
    if way == "saved configuration":
        ((number, fn),) = board.events("save_args")
        board.send(number, board.filled_in(fn.inputs, **changes))
        ((number, fn),) = board.events("load_args")
        board.send(number, ["en", "mine.yaml"])
    children = psutil.Process().children()
    for name in ("preview_train", "run_train"):
        ((number, fn),) = board.events(name)
        answer = board.send(number, board.filled_in(fn.inputs, **changes))
        assert any(words in answer for words in (FOLDERS, "is a demo", "demo mode")), answer[-500:]
    assert psutil.Process().children() == children, "a training was started"
    assert not board.marker.exists()


@both
def test_extra_arguments_of_other_tabs_run_nothing(board):
    extra = {"stage": "dpo", "pref_loss": "planted", "pref_loss_file": board.planted}
    for name in ("load_model", "save_model"):
        for number, fn in board.events(name):
            data = board.filled_in(fn.inputs)
            texts = [place for place, each in enumerate(fn.inputs) if str(each.value).startswith("{")]
            for place in texts:
                data[place] = json.dumps(extra)
            board.send(number, data)
    assert not board.marker.exists()


@both
def test_a_named_folder_serves_its_files_and_no_others(board, tmp_path, monkeypatch):
    """What a board was started for goes on after all of the above."""
    monkeypatch.setenv(FOLDERS, f"{tmp_path}{os.pathsep}{os.path.dirname(board.planted)}")
    path = tmp_path / "mine.py"
    path.write_text(PAYLOAD.format(marker=str(tmp_path / "was_run")).replace("planted", "mine"))
    ((number, _),) = board.events("read")
    for each in (str(path), board.planted):
        board.send(number, [each])
    is_demo = next(fn.fn.__self__.demo_mode for _, fn in board.events("load_args"))
    assert (tmp_path / "was_run").exists() == (not is_demo)
    (number, _), *_ = board.events("offer")
    assert ('"mine"' in board.send(number, ["DPO", "sigmoid", str(path)])) == (not is_demo)
    assert not board.marker.exists()
