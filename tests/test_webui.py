"""The board's fields: what they send, and what comes back. `integration/test_board.py` looks at them in a browser."""

from __future__ import annotations

import json
import math
import os
import string
import subprocess
import sys
import threading
from pathlib import Path

import gradio as gr
import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from llamafactory.extras.constants import TRAINING_STAGES
from llamafactory.hparams import get_infer_args
from llamafactory.webui import common
from llamafactory.webui.engine import Engine
from llamafactory.webui.interface import create_ui
from llamafactory.webui.locales import LOCALES

from llamafactory_ext.losses import STOCK_LOSSES, lookup
from llamafactory_ext.recipe.arguments import SR_PROMPT, PreferenceArguments
from llamafactory_ext.recipe.keys import NUMBERS, OTHER_OWN_KEYS, OWN_KEYS, STOCK_KEYS, keys_not_taken
from llamafactory_ext.webui import errors, loss_texts, texts
from llamafactory_ext.webui.errors import BoardError
from llamafactory_ext.webui.fields import (
    FIELDS,
    RANGES,
    STAGE_FIELDS,
    alert,
    chosen_losses,
    gathered,
    is_shown,
    label,
    losses_of,
    reason,
    set_twice,
    spread,
    why_not,
)
from llamafactory_ext.webui.loss_files import FOLDERS, LossFiles, describe
from llamafactory_ext.webui.section import _Curves, about_run

LOSSES = {name: [loss] for name, loss in losses_of("DPO", "")[0].items()}
EMPTY = {key: field.empty for key, field in FIELDS.items()}
NUMBER = st.one_of(st.none(), st.integers(0, 99), st.floats(0, 99))
SET = {key: NUMBER for key, field in FIELDS.items() if field.kind is gr.Number} | {
    "sr_prompt": st.text(min_size=1, max_size=20).filter(str.strip),
    "ref_model": st.sampled_from(["", "org/model", "two words"]),
    "ipo_length_normalize": st.sampled_from(["auto", "true", "false"]),
    "pref_loss_args": st.sampled_from(["", '{"tau": 0.5}', "not JSON"]),
    "share_prefix": st.sampled_from(["auto", "true", "false"]),
    "precompute_ref_log_probs": st.sampled_from(["auto", "true", "false"]),
    "ref_log_probs_cache_dir": st.sampled_from(["", "/somewhere", "two words"]),
    "pref_loss_file": st.sampled_from(["", "losses.py"]),
    "pref_stop_on_degeneration": st.booleans(),
    "pref_wpo": st.booleans(),
    "ld_alpha_reference": st.booleans(),
    "f_divergence": st.sampled_from(["reverse_kl", "forward_kl", "js", "alpha"]),
    "pref_loss_weights": st.sampled_from(["", "1.0,0.1"]),
    "pref_weight_column": st.sampled_from(["", "weight"]),
    "pref_ranked_weights": st.sampled_from(["equal", "score_gap"]),
    "pref_margin_column": st.sampled_from(["", "gap", "chosen_score,rejected_score"]),
}


def test_every_key_of_the_plugin_has_a_field():
    of_losses = {*STOCK_KEYS, "ld_alpha", "pref_bco_weight", "ref_model"}
    assert set(FIELDS) == {*OWN_KEYS, *OTHER_OWN_KEYS, *of_losses} == set(SET)


def test_no_field_stands_on_the_board_twice(board):
    """LLaMA-Factory's board has some of the keys: none of the plugin's fields is for one of them."""
    stock = [elem for elem, each in board[0].manager.get_elem_iter() if elem in FIELDS]
    assert sorted(stock) == sorted(FIELDS)
    assert not set(FIELDS) & {"pref_beta", "pref_ftx", "pref_loss"}


def test_every_language_has_all_words():
    for words in (texts.FIELDS, loss_texts.LOSSES, errors.ALERTS, errors.RANGES):
        assert set(words) == set(LOCALES["pref_loss"])
        for lang, translated in words.items():
            assert set(translated) == set(words["en"]), lang
            assert lang == "en" or all(translated[name] != text for name, text in words["en"].items())
    # The board shows the first line of the docstring of others.
    assert set(loss_texts.LOSSES["en"]) <= {name for name in lookup.loss_names() if not lookup.get_loss(name).is_users}
    assert set(errors.QUOTES) == set(errors.ALERTS)
    for alerts in errors.ALERTS.values():
        for name, sentence in alerts.items():
            assert _names(sentence) == _names(errors.ALERTS["en"][name]), sentence
    assert LOCALES["dpop_lambda"]["zh"]["label"] == "DPOP lambda"
    assert loss_texts.about_loss("dpop", "a language of the future") == loss_texts.LOSSES["en"]["dpop"]


def _names(sentence):
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_sentences_name_fields_by_their_labels():
    assert "“Refinement prompt”" in alert("unused_prompt", "en")
    assert "«Промпт уточнения»" in alert("unused_prompt", "ru")
    assert label("pref_beta", "ja") == f"「{LOCALES['pref_beta']['ja']['label']}」"
    error = ValueError("`sr_prompt` is odd: write `pref_loss: dpop`, not pref_loss_file '/pref_loss/ld_alpha.py'.")
    assert reason(error, "en") == (
        "“Refinement prompt” is odd: write “Loss type”: dpop, not “Loss file” '/pref_loss/ld_alpha.py'."
    )
    assert str(BoardError("unread", file="'x.py'")).endswith("Press Enter in `pref_loss_file`.")


@pytest.mark.parametrize("key", NUMBERS)
def test_the_boards_ranges_are_the_arguments(key):
    tries = (-1, -0.1, 0, 0.2, 0.5, 1, 50)
    accepts = {
        "positive": lambda value: value > 0,
        "nonnegative": lambda value: value >= 0,
        "below_half": lambda value: 0 <= value < 0.5,
        "finite": lambda value: True,
        "count": lambda value: value in (1, 50),
        "hundred": lambda value: -100 <= value <= 100,
    }[RANGES.get(key, "nonnegative")]
    assert [accepts(value) for value in tries] == [NUMBERS[key][1](value) for value in tries]


def test_fields_are_the_stages_and_the_losses_own():
    shown = {name: {key for key in FIELDS if is_shown(key, "DPO", loss)} for name, loss in LOSSES.items()}
    common_to_all = {"share_prefix", "pref_loss_file", "pref_stop_on_degeneration"}
    ranked = {"pref_ranked_weights"}
    weighed = {"pref_wpo", "pref_weight_column"} | ranked
    with_reference = {"precompute_ref_log_probs", "ref_log_probs_cache_dir", "ref_model", "pref_bco_weight"}
    cached = common_to_all | with_reference | {"ld_alpha", "ld_alpha_reference"}
    in_scores, refined = {"f_divergence", "f_divergence_alpha"}, {"sr_lambda", "sr_prompt"}
    assert shown["sft"] == common_to_all | weighed | {"ld_alpha"}
    assert shown["rrhf"] == shown["sft"] | {"rrhf_weight"}
    assert shown["orpo"] == shown["sft"]
    assert shown["simpo"] == shown["orpo"] | {"simpo_gamma"}
    assert shown["kto_pair"] == cached | ranked
    assert shown["pl_dpo"] == cached | in_scores | {"pref_weight_column"}
    assert shown["hinge"] == cached | in_scores | weighed
    assert shown["discopop"] == shown["hinge"] | refined | {"discopop_tau"}
    assert shown["sigmoid"] == shown["hinge"] | refined | {"dpo_label_smoothing"}
    assert shown["odpo"] == shown["hinge"] | refined | {"odpo_alpha", "pref_margin_column"}
    assert shown["ipo"] == shown["hinge"] | {"ipo_length_normalize"}
    assert shown["minor_dpo"] == shown["sr_dpo"] == cached | refined | weighed
    assert shown["dpop"] == shown["minor_dpo"] | {"dpop_lambda"}
    assert shown["sr_ipo"] == shown["minor_dpo"] | {"ipo_length_normalize"}


def test_several_losses_have_the_fields_of_each():
    def of(name):
        return {key for key in FIELDS if is_shown(key, "DPO", chosen_losses(name, losses_of("DPO", "")[0]))}

    assert of("minor_dpo, hinge") == of("minor_dpo") | {"pref_loss_weights"}
    of_each = of("sigmoid") | of("dpop") | {"pref_loss_weights"}
    assert of("sigmoid,dpop") == of_each - {"f_divergence", "f_divergence_alpha"}
    assert of("sigmoid,rrhf") == of("sigmoid") | of("rrhf") | {"pref_loss_weights"}
    assert of("hinge,ipo") >= {"f_divergence", "f_divergence_alpha", "ipo_length_normalize", "pref_loss_weights"}
    assert of("minor_dpo,pl_dpo") == of("minor_dpo") - {"pref_wpo", "pref_ranked_weights"} | {"pref_loss_weights"}
    assert of("minor_dpo,nothing") == of("nothing") == set(STAGE_FIELDS)
    assert why_not("minor_dpo,sft", losses_of("DPO", "")[0], None, "en") is None
    assert "'nothing'" in why_not("minor_dpo,nothing", losses_of("DPO", "")[0], None, "en")


def test_other_stages_have_no_fields():
    for stage in set(TRAINING_STAGES) - {"DPO"}:
        assert not any(is_shown(key, stage, LOSSES["dpop"]) for key in FIELDS)


@pytest.mark.parametrize("name", LOSSES)
def test_fields_are_shown_where_the_arguments_take_them(name):
    keys = [key for key in FIELDS if not key.startswith("pref_loss_")]  # a loss file's losses are not among these
    divergence = [key for key in keys if key.startswith("f_divergence")]  # not with an sr_lambda
    for some in ([key for key in keys if key not in divergence], divergence):
        not_taken = keys_not_taken({"pref_loss": name} | dict.fromkeys(some, 0.1))
        assert not_taken == [key for key in some if not is_shown(key, "DPO", LOSSES[name])]


@given(st.fixed_dictionaries(SET), st.sampled_from(list(LOSSES)))
def test_what_is_set_comes_back(values, name):
    loss = LOSSES[name]
    extra_args = gathered('{"optim": "adamw_torch"}', values, "DPO", loss)
    others, returned = spread(extra_args, "DPO", loss)
    assert json.loads(others) == {"optim": "adamw_torch"}
    assert returned == {key: values[key] if is_shown(key, "DPO", loss) else EMPTY[key] for key in FIELDS}
    assert set_twice(extra_args, EMPTY, "DPO", loss) is None
    assert (set_twice(extra_args, values, "DPO", loss) is None) == (returned == EMPTY)


@pytest.mark.parametrize("extra_args", ['{"optim":   "sgd"}', "{not JSON", "[1]", "3"])
def test_extra_arguments_are_left_alone_where_nothing_is_set(extra_args):
    assert gathered(extra_args, EMPTY, "DPO", LOSSES["dpop"]) == extra_args
    assert spread(extra_args, "DPO", LOSSES["dpop"]) == (extra_args, EMPTY)


@pytest.mark.parametrize(
    ("stage", "loss"), [("KTO", None), ("KTO", "dpop"), ("DPO", "orpo"), ("DPO", None), ("PPO", None), ([], None)]
)
def test_extra_arguments_without_a_field_stay(stage, loss):
    """KTO and PPO take a reference model, too."""
    extra_args = '{"dpop_lambda": 7}' if loss is None and stage == "DPO" else '{"ref_model": "other"}'
    assert spread(extra_args, stage, LOSSES.get(loss, [])) == (extra_args, EMPTY)


@pytest.mark.parametrize("typed", [SR_PROMPT, "", "  \n"])
def test_the_default_prompt_stands_in_its_field_and_is_not_sent(typed):
    assert EMPTY["sr_prompt"] == SR_PROMPT
    assert gathered("{}", EMPTY | {"sr_prompt": typed}, "DPO", LOSSES["sr_dpo"]) == "{}"
    assert spread(json.dumps({"sr_prompt": typed}), "DPO", LOSSES["sr_dpo"]) == ("{}", EMPTY)


@pytest.mark.parametrize("extra_args", ["{not JSON", "[1]"])
def test_malformed_extra_arguments_are_left_to_the_board(extra_args):
    values = EMPTY | {"dpop_lambda": 5}
    assert gathered(extra_args, values, "DPO", LOSSES["dpop"]) == extra_args


def test_other_stages_send_nothing():
    values = EMPTY | {"dpop_lambda": 5, "share_prefix": "true"}
    assert gathered("{}", values, "KTO", LOSSES["dpop"]) == "{}"


@pytest.fixture
def loss_files(tmp_path, monkeypatch):
    """Those of a board that was started with one folder for them."""
    files = LossFiles(demo_mode=False)
    monkeypatch.setenv(FOLDERS, f"{tmp_path}")
    monkeypatch.setattr(lookup, "_load", files.load)
    return files


class Fork:
    """`describe` in a fork of this process, in place of a new process that spends two seconds on importing torch."""

    def __init__(self, command, stdin, stdout, **reading):
        begin, end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(end, 1)
                sys.stdout, sys.argv = os.fdopen(1, "w", closefd=False), ["-c", command[-1]]
                lookup.load_files_by(lookup._run_file)  # this process is no board
                describe()
            finally:
                os._exit(0)
        os.close(end)
        self.answer = os.fdopen(begin, **reading)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answer.close()
        os.waitpid(self.pid, 0)

    def communicate(self, timeout):
        return self.answer.read(), None


@pytest.fixture
def forks(monkeypatch):
    """Loss files are read in forks. What a test says of the process itself, it has to say of a real one."""
    monkeypatch.setattr(subprocess, "Popen", Fork)


MINE = """
from __future__ import annotations
import sys
from llamafactory_ext import register_loss

print("words of the file's own")

@register_loss("mine", needs_reference=False, needs_batch=True)
def mine(pairs, *, beta: float, tau: float = 1.0, kinds: tuple = (1, 2)):
    '''Mine.

    More of it.'''
    return pairs.margin
"""


def test_losses_of_a_file_are_this_sessions_own(tmp_path, loss_files, forks):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    assert "Press Enter in" in str(losses_of("DPO", str(path))[1])
    loss_files.read(str(path))
    losses, error = losses_of("DPO", str(path))
    assert error is None
    assert list(losses)[-1] == "mine"
    assert is_shown("pref_loss_args", "DPO", [losses["mine"]])
    assert "mine" not in losses_of("DPO", "")[0]
    other = tmp_path / "other.py"  # another session's, of the same name
    other.write_text(path.read_text())
    loss_files.read(str(other))
    assert "mine" in losses_of("DPO", str(other))[0]
    assert list(losses_of("KTO", str(path))[0]) == list(STOCK_LOSSES)
    loss_files.read(str(tmp_path / "nowhere.py"))
    losses, error = losses_of("DPO", str(tmp_path / "nowhere.py"))
    assert "is not a file" in str(error)
    assert set(losses) == set(losses_of("DPO", "")[0])


@pytest.mark.parametrize("default", ["", " = 3.0", " = None"])
def test_a_loss_of_ones_own_that_takes_the_plugins_keys(board, tmp_path, monkeypatch, forks, default):
    monkeypatch.setenv(FOLDERS, str(tmp_path))
    path = tmp_path / "mine.py"
    path.write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("mine")\n'
        f"def mine(pairs, *, beta: float, dpop_lambda: float{default}):\n"
        '    """Mine."""\n'
    )
    page = board[0].manager
    board[0].runner.loss_files.read(str(path))
    show = next(fn.fn for fn in board[2].fns.values() if fn.name == "show" and len(fn.outputs) > len(FIELDS))
    update = show("en", "DPO", "mine", str(path))
    shown = update[page.get_elem_by_id("train.dpop_lambda")].constructor_args
    assert shown == {"visible": True, "placeholder": {"": "(required)", " = 3.0": "3", " = None": "None"}[default]}


def test_enter_reads_a_file_again_though_only_what_it_needs_has_changed(tmp_path, loss_files, forks):
    path, needed = tmp_path / "needing.py", tmp_path / "needed.txt"
    path.write_text(MINE + "from pathlib import Path\nPath(__file__).with_name('needed.txt').read_text()\n")
    loss_files.read(str(path))
    assert "needed.txt" in str(losses_of("DPO", str(path))[1])
    needed.write_text("here")
    loss_files.read(str(path))  # as a start of a training does
    assert "needed.txt" in str(losses_of("DPO", str(path))[1])
    loss_files.read(str(path), again=True)
    assert losses_of("DPO", str(path))[1] is None


def test_what_is_known_of_a_loss_of_a_file(tmp_path, loss_files):
    path = tmp_path / "described.py"  # a name that no other test of this process has run
    path.write_text(MINE)
    loss_files.read(str(path))
    loss = losses_of("DPO", str(path))[0]["mine"]
    assert "llamafactory_ext_loss_file_described" not in sys.modules, "it was run in this process"
    assert (loss.needs_reference, loss.needs_batch, loss.description) == (False, True, "Mine.\nMore of it.")
    assert loss.defaults() == {"tau": 1.0, "kinds": "(1, 2)"}
    assert {name: each.annotation for name, each in loss.parameters.items()} == {
        "beta": "float",
        "tau": "float",
        "kinds": "tuple",
    }
    with pytest.raises(NotImplementedError, match="computes no loss"):
        loss(None)


ODD = """
from llamafactory_ext import register_loss
class Odd:
    def __repr__(self): raise RuntimeError("odd")
"""


# What a loss file may hold, and what is said of it.
NO_LOSSES = [
    ("import sys\nsys.exit(2)\n", "could not be run: SystemExit: 2"),
    ("import os\nos._exit(0)\n", "ended the process that imported it"),
    ("x = 1\n", "registers no loss"),
    ("from llamafactory_ext import register_loss\nregister_loss('dpop')(lambda pairs, *, beta: 0)\n", "is taken"),
    (ODD + "register_loss('odd')(lambda pairs, *, beta=Odd(): 0)\n", "cannot be shown: RuntimeError: odd"),
]


def error_of(content, loss_files, folder):
    path = folder / "script.py"
    path.write_text(content)
    loss_files.read(str(path))
    error = str(losses_of("DPO", "script.py")[1])
    assert str(path) not in error or "looked for" in error, "the path is named as it was written"
    return error


@pytest.mark.parametrize(("content", "words"), NO_LOSSES)
def test_a_loss_file_that_is_none_ends_nothing_but_itself(tmp_path, loss_files, forks, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_of(content, loss_files, tmp_path)
    path = tmp_path / "script.py"
    path.write_text(MINE)
    assert "Press Enter" in str(losses_of("DPO", str(path))[1]), "what was known is not so any more"
    loss_files.read(str(path))
    assert losses_of("DPO", str(path))[1] is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import os\nos._exit(0)\n", "ended the process that imported it"),
        ("import mine_too\n", "No module named 'mine_too'"),  # in the working directory, as in trainings
    ],
)
def test_the_same_in_a_process_that_is_no_fork(tmp_path, loss_files, monkeypatch, content, words):
    (tmp_path / "mine_too.py").touch()
    monkeypatch.chdir(tmp_path)
    assert words in error_of(content, loss_files, tmp_path)


def test_a_file_that_forks_answers_once(tmp_path, loss_files):
    path = tmp_path / "forks.py"
    path.write_text(f"{MINE}\nimport os\nos.fork()\n")
    loss_files.read(str(path))
    names, error = losses_of("DPO", str(path))
    assert error is None
    assert "mine" in names


def test_an_import_without_end_is_ended(tmp_path, loss_files, monkeypatch):
    monkeypatch.setattr("llamafactory_ext.webui.loss_files.SECONDS", 3)
    path = tmp_path / "endless.py"
    path.write_text(f"import subprocess\nsubprocess.run(['sleep', '1234{os.getpid()}'])\n")
    loss_files.read(str(path))
    assert "did not finish its import in 3 s" in str(losses_of("DPO", str(path))[1])
    assert not [each for each in psutil.process_iter(["cmdline"]) if f"1234{os.getpid()}" in str(each.info["cmdline"])]


def test_loss_files_are_read_from_named_folders_only(tmp_path, loss_files, monkeypatch, forks):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    was_run = f"open({str(tmp_path / 'was_run')!r}, 'w')\n"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "mine.py").write_text(MINE + was_run)
    (inside / "link.py").symlink_to(outside / "mine.py")
    uploads = inside / "uploads"
    uploads.mkdir()
    (uploads / "mine.py").write_text((inside / "mine.py").read_text())
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    demo = LossFiles(demo_mode=True)
    refused = [outside / "mine.py", inside / "link.py", inside / ".." / "outside" / "mine.py", uploads / "mine.py"]
    cases = [(loss_files, inside, path) for path in refused]
    cases += [(loss_files, "", inside / "mine.py"), (demo, inside, inside / "mine.py")]
    for files, folders, path in cases:
        monkeypatch.setenv(FOLDERS, str(folders))
        monkeypatch.setattr(lookup, "_load", files.load)
        files.read(str(path))
        error = str(losses_of("DPO", str(path))[1])
        assert ("is a demo" if files is demo else f"start it with {FOLDERS}=") in error
        assert not (tmp_path / "was_run").exists(), path
    monkeypatch.setenv(FOLDERS, f"/nowhere{os.pathsep}{inside}")
    monkeypatch.setattr(lookup, "_load", loss_files.load)
    loss_files.read(str(inside / "mine.py"))
    assert losses_of("DPO", str(inside / "mine.py"))[1] is None
    assert (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "path", ["/proc/self/exe", "~daemon/x.py", "~nosuch/x.py", "/proc/1/cwd", "loop.py", "a\0b", "x" * 5000]
)
def test_nothing_is_said_of_paths_outside_of_the_folders(path, tmp_path, loss_files, monkeypatch):
    """Neither where links lead, nor which files and users there are; links in a circle end, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    monkeypatch.setenv(FOLDERS, str(tmp_path / "none"))
    loss_files.read(path)
    error = losses_of("DPO", path)[1]
    assert str(error) == str(BoardError("forbidden", file=repr(path), variable=FOLDERS))


def test_several_events_for_one_file_read_it_together(tmp_path, loss_files, forks):
    path = tmp_path / "slow.py"
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\nimport time\ntime.sleep(1)\n"
    path.write_text(count + MINE.replace("from __future__ import annotations", ""))
    events = [threading.Thread(target=loss_files.read, args=(str(path), True)) for _ in range(6)]
    for event in events:
        event.start()
    for event in events:
        event.join()
    assert losses_of("DPO", str(path))[1] is None
    assert len((tmp_path / "runs").read_text()) <= 2, "one that had begun, and one for all that came meanwhile"
    assert not loss_files._locks


@pytest.mark.parametrize("written", [None, 5, [1], "[1]", "{"])
def test_a_saved_configuration_may_hold_anything(written):
    others, values = spread(written, "DPO", LOSSES["dpop"])
    assert others == written
    assert values["pref_loss_file"] == ""


def test_false_reaches_the_recipe_and_texts_the_shell():
    args = {"share_prefix": False, "precompute_ref_log_probs": None, "bf16": False, "sr_prompt": "Rate it: ", "x": 1}
    assert common._clean_cmd(args) == {"share_prefix": False, "sr_prompt": "Rate it: ", "x": 1}
    assert "--sr_prompt 'Rate it: ' " in common.gen_cmd(args)
    assert args["sr_prompt"] == "Rate it: "


# --- the runner, with the board's real components --------------------------------------------------------------------


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The engine of a whole board, and what a page sends when nothing has been touched."""
    engines = []
    init, load = Engine.__init__, lookup._load

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        engines.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", remember)
        patch.chdir(tmp_path_factory.mktemp("board"))  # it writes DeepSpeed settings
        page = create_ui()
    clicked = next(fn for fn in page.fns.values() if fn.name == "run_train")
    yield engines[0], {elem: elem.value for elem in clicked.inputs}, page
    lookup.load_files_by(load)  # for the tests of other files


@pytest.fixture
def filled_in(board, tmp_path, monkeypatch):
    """The runner, and a page's data with some of them changed."""
    monkeypatch.chdir(tmp_path)
    engine, data, _ = board
    setting = {
        "top.lang": "en",
        "top.model_name": "Custom",
        "top.model_path": "model",
        "train.dataset": ["pairs"],
        "train.training_stage": "DPO",
        "train.output_dir": "run",
        "train.config_path": "mine.yaml",
    }

    def fill_in(**changes):
        named = setting | {f"train.{name}": value for name, value in changes.items()}
        return engine.runner, data | {engine.manager.get_elem_by_id(name): value for name, value in named.items()}

    return fill_in


def settings_of(runner, data):
    args = runner._parse_train_args(data)
    return {key: args[key] for key in FIELDS if key in args}


def test_fields_become_settings(filled_in):
    runner, data = filled_in(pref_loss="dpop", dpop_lambda=5, share_prefix="false", ipo_length_normalize="true")
    assert runner._initialize(data, do_train=True, from_preview=True) == ""
    assert settings_of(runner, data) == {"dpop_lambda": 5, "share_prefix": False}  # and not what dpop does not take
    assert runner._parse_train_args(data)["optim"] == "adamw_torch"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pref_loss": "dpop", "dpop_lambda": -1}, "“DPOP lambda” is -1. Write a number of at least 0."),
        ({"pref_beta": 0}, "“Beta value” is 0. Write a number above 0."),
        ({"dpo_label_smoothing": 0.5}, "“Label smoothing” is 0.5. Write a number of at least 0 and below 0.5."),
        ({"pref_loss": "simpo", "extra_args": '{"simpo_gamma": Infinity}'}, "“SimPO gamma” is inf. Write a finite"),
        ({"pref_loss": "minordpo"}, "The loss 'minordpo' is not registered on this board."),
        ({"pref_loss_file": "nowhere.py"}, "This board may not read"),
        ({"extra_args": '{"pref_loss_file": "nowhere.py"}'}, "This board may not read"),
        ({"extra_args": '{"pref_loss_file": ["nowhere.py"]}'}, "write a value of type str"),
        ({"training_stage": "KTO", "extra_args": '{"stage": "dpo", "pref_loss_file": "x.py"}'}, "may not read"),
        ({"pref_loss": "sr_dpo", "sr_lambda": 0, "sr_prompt": "x: "}, "“Refinement prompt” has no effect"),
        ({"pref_loss": "dpop", "sr_prompt": "x: "}, "while “Refinement lambda” is 0"),
        ({"pref_loss": "sr_dpo", "sr_prompt": "Costs ${ 5"}, "“Refinement prompt” contains ${"),
        ({"extra_args": "{"}, "Invalid JSON schema"),
        ({"extra_args": "[]"}, "Invalid JSON schema"),
        ({"extra_args": '{"pref_loss_args": "{"}'}, "“Loss arguments” is not a JSON object."),
        ({"extra_args": '{"ld_alpha": 0.5}', "pref_loss": "dpop"}, "“LD alpha” weights the policy"),
        (
            {"extra_args": '{"sr_lambda": 1}', "pref_loss": "sr_dpo", "sr_lambda": 1},
            "“Refinement lambda” is set both in its field and in “Extra arguments”. Clear one of them.",
        ),
        ({"learning_rate": "fast"}, "“Learning rate” is 'fast'. Write a number such as 5e-5."),
        ({"learning_rate": "0,1", "training_stage": "KTO"}, "“Learning rate” is '0,1'."),
        ({"max_samples": "1e3"}, "“Max samples” is '1e3'. Write a number such as 100000."),
        ({"training_stage": "KTO", "extra_args": '{"dpop_lambda": 5}'}, "“DPOP lambda” belongs to `stage: dpo`"),
        ({"extra_args": '{"ref_model_quantization_bit": 3}'}, "4-bit or 8-bit"),
    ],
)
def test_wrong_settings_are_named(filled_in, changes, words):
    runner, data = filled_in(**changes)
    assert words in runner._initialize(data, do_train=True, from_preview=False)


@pytest.mark.parametrize(
    ("lang", "words"),
    [
        ("ru", "«Лямбда DPOP»: значение -1 недопустимо. Введите число не меньше 0."),
        ("zh", "“DPOP lambda”的值为 -1。请填写不小于 0 的数。"),
        ("ko", "‘DPOP 람다’: -1은(는) 쓸 수 없습니다. 0 이상의 수를 입력하십시오."),
        ("ja", "「DPOP ラムダ」の値 -1 は使えません。0 以上の数を入力してください。"),
    ],
)
def test_wrong_settings_are_named_in_the_boards_language(filled_in, lang, words):
    runner, data = filled_in(pref_loss="dpop", dpop_lambda=-1)
    data[runner.manager.get_elem_by_id("top.lang")] = lang
    assert runner._initialize(data, do_train=True, from_preview=False) == words


def test_a_loss_file_that_is_missing_is_named_in_the_boards_language(loss_files, tmp_path):
    path = str(tmp_path / "nowhere.py")
    loss_files.read(path)
    words = why_not("sigmoid", *losses_of("DPO", path), "ja")
    assert words.startswith(f"「損失関数ファイル」の {path!r} はファイルではありません")


def test_sentences_of_chinese_and_japanese_follow_without_a_space():
    logs = [{"step": 1, "logps/chosen": math.nan, "logps/rejected": math.nan}]
    assert "数值。请尝试" in about_run(logs, "zh")
    assert "ました。MinorDPO" in about_run(logs, "ja")
    assert "numbers. Try" in about_run(logs, "en")


@pytest.mark.parametrize(
    "changes", [{"share_prefix": ["true"]}, {"pref_loss_file": {}}, {"dpop_lambda": "1"}, {"sr_prompt": 5}]
)
def test_what_no_field_can_give_is_refused(filled_in, changes):
    runner, data = filled_in(**changes)
    with pytest.raises(gr.Error, match="field cannot give"):
        runner._initialize(data, do_train=True, from_preview=False)
    with pytest.raises(gr.Error, match="field cannot give"):
        runner.save_args(data)


@pytest.mark.parametrize("tab", ["chat", "export"])
def test_other_tabs_run_no_loss_file(board, tmp_path, tab):
    """What their extra arguments hold goes to LLaMA-Factory's parser in the board's own process."""
    path = tmp_path / "mine.py"
    path.write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    args = {"stage": "dpo", "pref_loss": "mine", "pref_loss_file": str(path), "model_name_or_path": "nowhere"}
    with pytest.raises(ValueError, match="This board may not read"):
        get_infer_args({"template": "qwen", **args} | ({"export_dir": "nowhere"} if tab == "export" else {}))
    assert not (tmp_path / "was_run").exists()


def test_other_stages_are_not_checked_for_losses(filled_in):
    runner, data = filled_in(training_stage="Supervised Fine-Tuning", pref_beta=0, dpop_lambda=-1)
    assert runner._initialize(data, do_train=True, from_preview=True) == ""
    assert settings_of(runner, data) == {}


def test_a_configuration_holds_stock_names_only_and_comes_back(filled_in):
    runner, data = filled_in(pref_loss="sr_ipo", sr_lambda=0.5, sr_prompt="Rate: ", pref_stop_on_degeneration=True)
    runner.save_args(data)
    saved = yaml.safe_load(Path("llamaboard_config/mine.yaml").read_text())
    assert not {f"train.{key}" for key in FIELDS} & set(saved)
    update = runner.load_args("en", "mine.yaml")
    named = {runner.manager.get_id_by_elem(elem): value for elem, value in update.items()}
    assert {key: named[f"train.{key}"] for key in FIELDS} == EMPTY | {
        "sr_lambda": 0.5,
        "sr_prompt": "Rate: ",
        "pref_stop_on_degeneration": True,
    }
    assert json.loads(named["train.extra_args"]) == {"optim": "adamw_torch"}
    assert named["train.pref_loss"] == "sr_ipo"


def test_a_missing_configuration_changes_no_field(filled_in):
    runner, _ = filled_in()
    update = runner.load_args("en", "missing.yaml")
    assert [runner.manager.get_id_by_elem(elem) for elem in update] == ["train.output_box"]


def test_a_configuration_brings_back_what_its_stage_and_loss_have_fields_for(filled_in):
    """A run of KTO with a reference model, and a board whose LLaMA-Factory knows a loss that this one does not."""
    runner, data = filled_in(training_stage="KTO", extra_args='{"ref_model": "other"}')
    runner.save_args(data)
    named = {runner.manager.get_id_by_elem(elem): each for elem, each in runner.load_args("en", "mine.yaml").items()}
    assert (named["train.extra_args"], named["train.ref_model"]) == ('{"ref_model": "other"}', "")
    saved = yaml.safe_load(Path("llamaboard_config/mine.yaml").read_text())
    extra_args = '{"ref_model": "other", "tau": 1}'
    changed = saved | {"train.training_stage": "DPO", "train.pref_loss": "newer", "train.extra_args": extra_args}
    Path("llamaboard_config/mine.yaml").write_text(yaml.safe_dump(changed))
    named = {runner.manager.get_id_by_elem(elem): each for elem, each in runner.load_args("en", "mine.yaml").items()}
    assert (named["train.extra_args"], named["train.ref_model"]) == ('{"tau": 1}', "other")


def test_keys_typed_by_hand_move_to_their_fields(tmp_path, loss_files, forks):
    assert spread('{"dpop_lambda": 7, "share_prefix": true}', "DPO", LOSSES["dpop"])[1] == EMPTY | {
        "dpop_lambda": 7,
        "share_prefix": "true",
    }
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    loss_files.read(str(path))
    mine = [losses_of("DPO", str(path))[0]["mine"]]
    assert spread('{"pref_loss_args": {"tau": 1}}', "DPO", mine)[1] == EMPTY | {"pref_loss_args": '{"tau": 1}'}


def test_a_loss_that_is_not_registered_says_why(tmp_path, loss_files, forks):
    losses, error = losses_of("DPO", "")
    assert why_not("dpop", losses, error, "en") is None
    assert why_not("gentle", losses, error, "en") == (
        "The loss 'gentle' is not registered on this board. Choose another one in “Loss type”, or name the Python file "
        "that registers it in “Loss file”."
    )
    assert "「損失関数ファイル」" in why_not("gentle", losses, error, "ja")
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    assert "Press Enter in “Loss file”" in why_not("gentle", *losses_of("DPO", str(path)), "en")
    loss_files.read(str(path))
    of_file = losses_of("DPO", str(path))
    assert why_not("mine", *of_file, "en") is None
    for other in ("gentle", "sigmoid"):  # the run would be refused
        assert "Choose mine in “Loss type”" in why_not(other, *of_file, "en")


def test_the_smoothed_curves_stand_above_the_raw_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "saves" / "Custom" / "full" / "run"
    run.mkdir(parents=True)
    rewards = [
        {f"normalized_rewards/{curve}": (-1) ** step for curve in ("chosen", "rejected", "margins")}
        for step in range(9)
    ]

    def lines(count):
        logs = [{"loss": 1.0, "current_steps": step + 1, **rewards[step]} for step in range(count)]
        (run / "trainer_log.jsonl").write_text("".join(f"{json.dumps(log)}\n" for log in logs))
        with gr.Blocks():
            curves = _Curves()
        figure = curves.show("en", "Custom", "full", "run")[curves.viewer].constructor_args["value"]
        (axes,) = figure.axes
        named = [text.get_text() for text in axes.get_legend().get_texts()]
        return [line for line in axes.get_lines() if len(line.get_xdata()) == count], named

    drawn, named = lines(9)
    raw = [line for line in drawn if list(line.get_ydata()) == [(-1) ** step for step in range(9)]]
    smoothed = [line for line in drawn if line not in raw]
    assert named == ["chosen", "rejected", "margin"] == [line.get_label() for line in smoothed]
    assert len(raw) == 3
    assert max(line.get_zorder() for line in raw) < min(line.get_zorder() for line in smoothed)
    assert [line.get_color() for line in raw] == [line.get_color() for line in smoothed]
    assert all(max(abs(line.get_ydata()[1:])) < 1 for line in smoothed)
    points, named = lines(1)
    assert named == ["chosen", "rejected", "margin"] == [line.get_label() for line in points]
    assert all(line.get_alpha() is None for line in points), "a point is not pale"


def test_fields_follow_the_arguments():
    """A key of the plugin must have a value on the board that the arguments take for `not set`."""
    defaults = {name: field.default for name, field in PreferenceArguments.__dataclass_fields__.items()}
    assert all(defaults[key] is None for key in FIELDS if key in defaults)
    assert all(field.to_yaml(field.empty) is None for field in FIELDS.values())
    assert all(
        field.properties["step"] < 1 or key in ("dpop_lambda", "rrhf_weight") or key.startswith("cringe_")
        for key, field in FIELDS.items()
        if "step" in field.properties
    )
