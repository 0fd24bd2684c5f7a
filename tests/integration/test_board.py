"""LLaMA Board in a browser: the real board, Debian's Chromium, and no network but this machine's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import yaml
from tiny import make_data, make_model

from llamafactory_ext.recipe.arguments import SR_PROMPT

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
PATIENCE = 60_000  # milliseconds: machines that run tests are busy
expect.set_options(timeout=PATIENCE)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

# What LLaMA-Factory's own page asks other machines for: a web font, and a script for pages in frames.
STOCK_REQUESTS = {"fonts.googleapis.com", "cdnjs.cloudflare.com"}
LOSS_FILE = '''
from llamafactory_ext import register_loss

@register_loss("gentle")
def gentle(pairs, *, beta: float, tau: float = 0.5):
    """A loss for this test.

    Not shown.
    """
    return -tau * beta * pairs.margin
'''


@contextmanager
def running_board(folder: Path, plugin: bool = True):
    """The address of `llamafactory-cli webui` in a folder of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "BROWSER": "/bin/true",
        "LLAMAFACTORY_EXT": "1" if plugin else "0",
        "LLAMAFACTORY_EXT_LOSS_FOLDERS": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = folder / "board.log"
    with log.open("w") as output:
        board = subprocess.Popen(
            ["llamafactory-cli", "webui"],
            cwd=folder,
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert board.poll() is None, log.read_text()
            try:
                urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        board.terminate()
        board.wait(timeout=60)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Where a board runs, with a model, data and a loss file."""
    folder = tmp_path_factory.mktemp("board")
    make_model(folder / "model", seed=1, dtype="float32")
    make_data(folder / "data")
    (folder / "losses.py").write_text(LOSS_FILE)
    return folder


@pytest.fixture(scope="module")
def address(workspace):
    with running_board(workspace) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page in a session of its own, which reaches this machine only, and sees what it asks others for."""
    contexts = []
    asked: set[str | None] = set()

    def open_it(address: str):
        contexts.append(browser.new_context(viewport={"width": 1400, "height": 1600}))
        page = contexts[-1].new_page()

        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        expect(title(page, "Learning rate")).to_be_visible()  # components get their words last
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert asked <= {None, "127.0.0.1"} | STOCK_REQUESTS  # None: data that stands in the page itself


def dropdown(page, label):
    return page.get_by_role("listbox", name=label, exact=True).filter(visible=True)  # other tabs have some, too


def options(page, label):
    """What a dropdown offers."""
    dropdown(page, label).click()
    expect(page.get_by_role("option").first).to_be_visible()
    offered = [text.removeprefix("✓").strip() for text in page.get_by_role("option").all_inner_texts()]
    dropdown(page, label).blur()
    return offered


def choose(page, label, option):
    """Choices that arrive while gradio's list is open leave in it only what matches the field's text: then it is opened
    anew, as a user would."""
    for _ in range(10):
        dropdown(page, label).click()
        try:
            page.get_by_role("option", name=option, exact=True).click(timeout=PATIENCE / 10)
            return
        except playwright.TimeoutError:
            dropdown(page, label).blur()
    raise AssertionError(f"{label} does not offer {option}.")


def title(page, label):
    return page.get_by_test_id("block-info").get_by_text(label, exact=True)


def textbox(page, label):
    return page.locator("label").filter(has=title(page, label)).locator("input, textarea").filter(visible=True)


def type_in(page, label, text):
    field = textbox(page, label)
    field.fill(text)
    field.blur()


def set_beta(page, value):
    field = page.get_by_label("number input for Beta value")
    field.fill(value)
    field.blur()


def choose_loss(page, loss):
    choose(page, "Stage", "DPO")
    page.get_by_text("RLHF configurations").click()
    for _ in range(50):
        if loss in options(page, "Loss type"):
            break
        page.wait_for_timeout(200)
    choose(page, "Loss type", loss)


def fill_in_run(page, workspace, name, loss, **extra_args):
    """A run of the tiny model: full, float32."""
    choose_loss(page, loss)  # a new stage empties the choice of data
    choose(page, "Model name", "Custom")
    type_in(page, "Model path", str(workspace / "model"))
    choose(page, "Finetuning method", "full")
    choose(page, "Chat template", "smollm2")
    type_in(page, "Data dir", str(workspace / "data"))
    textbox(page, "Dataset").fill("pairs")
    textbox(page, "Dataset").press("Enter")
    choose(page, "Compute type", "fp32")
    page.get_by_text("Extra configurations").click()
    type_in(page, "Extra arguments", json.dumps({"optim": "adamw_torch", "logging_steps": 1, **extra_args}))
    dropdown(page, "Output dir").fill(name)
    dropdown(page, "Output dir").press("Enter")


def preview(page):
    page.get_by_role("button", name="Preview command").click()
    command = page.get_by_text("llamafactory-cli train")
    expect(command).to_be_visible()
    return command.inner_text()


def refused(page, button, words):
    """A click brings the board's warning."""
    page.get_by_role("button", name=button, exact=True).click()
    warning = page.get_by_test_id("toast-body").filter(has_text=words)
    expect(warning).to_be_visible()
    warning.get_by_test_id("toast-close").click()
    expect(warning).to_have_count(0)


# --- choosing and setting --------------------------------------------------------------------------------------------


def test_a_loss_and_its_settings_reach_the_command(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "unused", "dpop")
    expect(page.get_by_text("DPO-Positive: DPO with a penalty")).to_be_visible()
    type_in(page, "DPOP lambda", "5")

    command = preview(page)
    assert re.search(r"--pref_loss dpop\b", command)
    assert re.search(r"--dpop_lambda 5\b", command)
    assert "sr_lambda" not in command
    assert "share_prefix" not in command  # automatic
    assert not (workspace / "saves" / "Custom" / "full" / "unused").exists()


def test_each_loss_shows_its_own_fields(open_page, address):
    page = open_page(address)
    refined, of_reference = ["Refinement lambda", "Refinement prompt"], ["LD alpha", "BCO weight"]
    own = {
        "sigmoid": ["Label smoothing", "f-divergence", *refined, *of_reference],
        "ipo": ["Length normalization", "f-divergence", *of_reference],
        "simpo": ["SimPO gamma", "LD alpha"],
        "minor_dpo": [*refined, *of_reference],
        "dpop": ["DPOP lambda", *refined, *of_reference],
        "sr_ipo": ["Length normalization", *refined, *of_reference],
        "odpo": ["ODPO alpha", "Score columns", "f-divergence", *refined, *of_reference],
        "cringe": ["CRINGE top k", "LD alpha"],
        "pl_dpo": ["f-divergence", *of_reference],
    }
    choose_loss(page, "hinge")
    for loss, fields in own.items():
        choose(page, "Loss type", loss)
        for field in sorted({name for names in own.values() for name in names}):
            expect(title(page, field)).to_have_count(1 if field in fields else 0)
        for field in ("Reference model", "Reference cache"):
            expect(title(page, field)).to_have_count(0 if loss in ("simpo", "cringe") else 1)
        expect(title(page, "Ranked pair weights")).to_have_count(0 if loss == "pl_dpo" else 1)


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_nothing_is_cut_off(open_page, address, width):
    """The page is no wider than the screen, fields of the section stand within it, and a text shows from its start."""
    page = open_page(address)
    page.set_viewport_size({"width": width, "height": 1400})
    choose_loss(page, "dpop")
    prompt = textbox(page, "Refinement prompt")
    expect(prompt).to_have_value(SR_PROMPT)
    assert prompt.evaluate("text => text.scrollTop") == 0
    assert prompt.evaluate("text => text.scrollHeight <= text.clientHeight + 1 || text.style.overflowY !== 'hidden'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for label in ("DPOP lambda", "Refinement prompt", "Reference model", "Loss file"):
        box = textbox(page, label).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_numbers_step_by_tenths_and_take_a_comma(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "unused", "dpop")
    weight = textbox(page, "Refinement lambda")
    for _ in range(3):
        weight.press("ArrowUp")
    expect(weight).to_have_value("0.3")
    weight.fill("")
    weight.press_sequentially("0,5")
    expect(weight).to_have_value("0.5")
    weight.blur()
    bco = textbox(page, "BCO weight")
    bco.focus()
    page.keyboard.insert_text("0,25")  # as pasted
    expect(bco).to_have_value("0.25")
    beta = page.get_by_label("number input for Beta value")  # LLaMA-Factory's
    beta.fill("")
    beta.press_sequentially("0,2")
    beta.blur()
    penalty = textbox(page, "DPOP lambda")
    penalty.press_sequentially("1e")  # no number: it would be sent as the default, so it does not stay
    assert penalty.evaluate("field => field.validity.badInput")
    penalty.blur()
    assert not penalty.evaluate("field => field.validity.badInput")
    command = preview(page)
    assert re.search(r"--sr_lambda 0.5\b", command)
    assert re.search(r"--pref_bco_weight 0.25\b", command)
    assert re.search(r"--pref_beta 0.2\b", command)
    assert "dpop_lambda" not in command


def test_the_refinement_prompt_is_text_and_comes_back(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "unused", "sr_dpo")
    prompt = textbox(page, "Refinement prompt")
    expect(prompt).to_have_value(SR_PROMPT)
    assert "sr_prompt" not in preview(page)
    type_in(page, "Refinement prompt", "Rate it: ")
    page.get_by_role("button", name="Preview command").click()
    expect(page.get_by_text("--sr_prompt 'Rate it: '")).to_be_visible()
    type_in(page, "Refinement prompt", " ")
    expect(prompt).to_have_value(SR_PROMPT)
    page.get_by_role("button", name="Preview command").click()
    expect(page.get_by_text("--sr_prompt")).to_have_count(0)


def test_other_stages_have_none_of_it(open_page, address):
    page = open_page(address)
    choose_loss(page, "dpop")
    expect(textbox(page, "DPOP lambda")).to_be_visible()
    for stage in ("Supervised Fine-Tuning", "KTO"):
        choose(page, "Stage", stage)
        expect(textbox(page, "DPOP lambda")).to_have_count(0)
        expect(title(page, "Share prefix")).to_have_count(0)
        expect(page.get_by_text("DPO-Positive")).to_have_count(0)
        expect(dropdown(page, "Loss type")).to_have_value("sigmoid")
        assert "minor_dpo" not in options(page, "Loss type")


def test_false_and_text_survive_the_way(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "unused", "sr_dpo")
    choose(page, "Share prefix", "false")
    type_in(page, "Refinement prompt", "It's a good answer: ")
    command = preview(page)
    assert re.search(r"--share_prefix False\b", command)
    assert """--sr_prompt 'It'"'"'s a good answer: '""" in command  # as a shell takes it


def test_a_loss_of_ones_own(open_page, address, workspace):
    page, other = open_page(address), open_page(address)
    fill_in_run(page, workspace, "unused", "sigmoid")
    field = textbox(page, "Loss file")
    field.fill(str(workspace / "losses.py"))
    field.press("Enter")
    choose(page, "Loss type", "gentle")
    expect(page.get_by_text("A loss for this test.", exact=True)).to_be_visible()
    type_in(page, "Loss arguments", '{"tau": 2.0}')
    command = preview(page)
    assert f"--pref_loss_file {workspace / 'losses.py'}" in command
    assert "--pref_loss gentle" in command
    assert """--pref_loss_args '{"tau": 2.0}'""" in command

    choose_loss(other, "sigmoid")  # another session knows nothing of it
    assert "gentle" not in options(other, "Loss type")


def test_sessions_do_not_see_each_other(open_page, address, workspace):
    one, other = open_page(address), open_page(address)
    for page, value in ((one, "5"), (other, "7")):
        fill_in_run(page, workspace, "unused", "dpop")
        type_in(page, "DPOP lambda", value)
    assert "--dpop_lambda 5 " in preview(one)
    assert "--dpop_lambda 7 " in preview(other)


def test_the_board_speaks_the_users_language(open_page, address):
    page = open_page(address)
    choose_loss(page, "dpop")
    choose(page, "Language", "zh")
    expect(title(page, "共享前缀")).to_be_visible()
    expect(title(page, "修正项提示词")).to_be_visible()
    expect(page.get_by_text("在 DPO 上惩罚概率低于参考模型的被选回答")).to_be_visible()
    choose(page, "语言", "en")  # it is remembered for the other tests
    expect(title(page, "Share prefix")).to_be_visible()


def test_wrong_values_are_refused_before_anything_starts(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "refused", "dpop")
    type_in(page, "DPOP lambda", "-1")
    for button in ("Preview command", "Save arguments", "Start"):
        refused(page, button, "“DPOP lambda” is -1. Write a number of at least 0.")
    type_in(page, "DPOP lambda", "")
    set_beta(page, "0")
    refused(page, "Start", "“Beta value” is 0. Write a number above 0.")
    set_beta(page, "0.1")
    type_in(page, "Loss file", "nowhere.py")
    refused(page, "Start", "“Loss file” 'nowhere.py' is not a file")
    type_in(page, "Loss file", "")
    type_in(page, "Extra arguments", '{"dpop_lambda": 3')
    refused(page, "Start", "Invalid JSON schema")
    type_in(page, "Extra arguments", "[3]")
    refused(page, "Start", "Invalid JSON schema")
    type_in(page, "Extra arguments", '{"dpop_lambda": 3}')
    type_in(page, "DPOP lambda", "4")
    refused(page, "Start", "“DPOP lambda” is set both in its field and in “Extra arguments”.")
    type_in(page, "Extra arguments", "{}")
    type_in(page, "Learning rate", "0,1")
    refused(page, "Start", "“Learning rate” is '0,1'. Write a number such as 5e-5.")
    type_in(page, "Learning rate", "5e-5")
    type_in(page, "DPOP lambda", "-1")
    choose(page, "Language", "ja")
    try:
        refused(page, "コマンドをプレビュー", "「DPOP ラムダ」の値 -1 は使えません。0 以上の数を入力してください。")
    finally:
        choose(page, "言語", "en")  # it is remembered for the other tests
    assert not (workspace / "saves" / "Custom" / "full" / "refused").exists()


# --- saving and loading ----------------------------------------------------------------------------------------------


def save(page, name):
    dropdown(page, "Config path").fill(name)
    dropdown(page, "Config path").press("Enter")
    page.get_by_role("button", name="Save arguments").click()
    expect(page.get_by_text("Arguments have been saved at")).to_be_visible()


def load(page, name):
    dropdown(page, "Config path").fill(name)
    dropdown(page, "Config path").press("Enter")
    page.get_by_role("button", name="Load arguments").click()
    expect(page.get_by_text("Arguments have been restored")).to_be_visible()


def test_a_saved_configuration_comes_back(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "unused", "dpop")
    type_in(page, "DPOP lambda", "5")
    choose(page, "Reference cache", "false")
    page.get_by_label("Stop on degeneration").check()
    save(page, "mine.yaml")
    saved = yaml.safe_load((workspace / "llamaboard_config" / "mine.yaml").read_text())
    assert not any(key.startswith("train.dpop") for key in saved)  # LLaMA-Factory alone would not know it
    own = {"dpop_lambda": 5, "precompute_ref_log_probs": False, "pref_stop_on_degeneration": True}
    assert json.loads(saved["train.extra_args"]) == {"optim": "adamw_torch", "logging_steps": 1, **own}

    page = open_page(address)
    choose(page, "Model name", "Custom")
    load(page, "mine.yaml")
    page.get_by_text("RLHF configurations").click()
    expect(dropdown(page, "Loss type")).to_have_value("dpop")
    expect(textbox(page, "DPOP lambda")).to_have_value("5")
    expect(dropdown(page, "Reference cache")).to_have_value("false")
    expect(page.get_by_label("Stop on degeneration")).to_be_checked()
    page.get_by_text("Extra configurations").click()
    assert json.loads(textbox(page, "Extra arguments").input_value()) == {
        "optim": "adamw_torch",
        "logging_steps": 1,
    }


def test_configurations_go_between_boards_with_and_without_the_plugin(open_page, address, workspace):
    page = open_page(address)
    fill_in_run(page, workspace, "unused", "dpop")
    type_in(page, "DPOP lambda", "5")
    save(page, "ours.yaml")

    with running_board(workspace, plugin=False) as stock:
        page = open_page(stock)
        fill_in_run(page, workspace, "unused", "hinge")
        expect(title(page, "Share prefix")).to_have_count(0)
        assert "minor_dpo" not in options(page, "Loss type")
        save(page, "stock.yaml")
        load(page, "ours.yaml")
        assert json.loads(textbox(page, "Extra arguments").input_value())["dpop_lambda"] == 5

    saved = yaml.safe_load((workspace / "llamaboard_config" / "stock.yaml").read_text())
    newer = workspace / "llamaboard_config" / "newer.yaml"  # of a LLaMA-Factory that knows more losses
    newer.write_text(yaml.safe_dump(saved | {"train.pref_loss": "newer"}))
    page = open_page(address)
    choose_loss(page, "dpop")
    load(page, "newer.yaml")
    expect(dropdown(page, "Loss type")).to_have_value("newer")
    expect(page.get_by_text("The loss 'newer' is not registered on this board.")).to_be_visible()
    choose(page, "Loss type", "dpop")
    expect(page.get_by_text("is not registered on this board")).to_have_count(0)
    type_in(page, "DPOP lambda", "5")
    load(page, "stock.yaml")
    expect(dropdown(page, "Loss type")).to_have_value("hinge")
    choose(page, "Loss type", "dpop")
    expect(textbox(page, "DPOP lambda")).to_have_value("")  # not what was typed before


# --- training --------------------------------------------------------------------------------------------------------


def test_a_run_is_started_and_watched(open_page, address, workspace):
    page = open_page(address)
    cache = str(workspace / "references")
    steps = 150  # long enough to be seen
    fill_in_run(page, workspace, "healthy", "dpop", max_steps=steps, ref_log_probs_cache_dir=cache)
    type_in(page, "Learning rate", "1e-5")
    type_in(page, "DPOP lambda", "5")
    page.get_by_role("button", name="Start", exact=True).click()

    settings = workspace / "saves" / "Custom" / "full" / "healthy" / "training_args.yaml"
    for _ in range(600):
        if settings.is_file():
            break
        page.wait_for_timeout(200)
    assert settings.is_file(), "the run did not start"
    other = open_page(address)  # a page that is loaded while it runs shows its settings
    expect(dropdown(other, "Stage")).to_have_value("DPO")
    other.get_by_text("RLHF configurations").click()
    expect(dropdown(other, "Loss type")).to_have_value("dpop")
    expect(textbox(other, "DPOP lambda")).to_have_value("5")
    choose(other, "Loss type", "minor_dpo")
    expect(textbox(other, "DPOP lambda")).to_have_count(0)
    other.context.close()  # of two pages that watch a run, LLaMA-Factory tells only one when it ends

    expect(page.get_by_text(re.compile(rf"Running \d+/{steps}"))).to_be_visible(timeout=180_000)  # the board's own
    expect(page.locator("#reward_viewer img")).to_be_visible(timeout=60_000)
    expect(page.get_by_test_id("matplotlib").locator("img")).to_have_count(2)  # the loss, and ours
    expect(page.get_by_text("Finished.").first).to_be_visible(timeout=120_000)
    expect(page.get_by_text("Normalized rewards")).to_be_visible()
    expect(page.locator("#reward_warning")).to_be_hidden()

    output = workspace / "saves" / "Custom" / "full" / "healthy"
    settings = yaml.safe_load((output / "training_args.yaml").read_text())
    assert (settings["pref_loss"], settings["dpop_lambda"]) == ("dpop", 5)
    logs = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert [log["current_steps"] for log in logs if "loss" in log] == list(range(1, steps + 1))
    assert all("total_tokens" in log for log in logs if "loss" in log)  # the board's token counter
    assert "dpop_lambda=5" in (output / "running_log.txt").read_text()


def test_a_run_that_degenerates_is_named_and_stopped(open_page, address, workspace):
    page = open_page(address)
    cache = str(workspace / "references")
    fill_in_run(page, workspace, "degenerate", "sigmoid", max_steps=30, ref_log_probs_cache_dir=cache)
    type_in(page, "Learning rate", "0.3")
    page.get_by_label("Stop on degeneration").check()
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#reward_warning")).to_contain_text("The run degenerates", timeout=180_000)
    expect(page.locator("#reward_warning")).to_contain_text("Try MinorDPO or DPOP")
    expect(page.get_by_text("Finished.").first).to_be_visible(timeout=60_000)

    output = workspace / "saves" / "Custom" / "full" / "degenerate"
    state = json.loads((output / "trainer_state.json").read_text())
    ended = f"“Stop on degeneration” saved a checkpoint and ended the run at step {state['global_step']} of 30."
    expect(page.locator("#output_box, .prose").filter(has_text="Finished.").first).to_contain_text(ended)
    expect(page.locator("#reward_warning")).to_contain_text(ended)
    assert state["global_step"] < 30
    assert (output / f"checkpoint-{state['global_step']}").is_dir()
    assert "The run is degenerating" in (output / "running_log.txt").read_text()

    page = open_page(address)  # the folder of a run that has ended
    choose(page, "Model name", "Custom")
    choose(page, "Finetuning method", "full")
    expect(page.locator("#reward_viewer")).to_be_hidden()
    dropdown(page, "Output dir").fill("degenerate")
    dropdown(page, "Output dir").press("Enter")
    expect(page.locator("#reward_viewer img")).to_be_visible()
    expect(page.locator("#reward_warning")).to_contain_text("The run degenerates")
    page.get_by_text("RLHF configurations").click()
    expect(page.get_by_label("Stop on degeneration")).to_be_checked()  # its settings are back, too
