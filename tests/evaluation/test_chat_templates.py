"""Chat templates that refuse, fail, or leave out what they are given, and the arguments that they take."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from engine_cases import QUESTIONS
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from llamafactory_ext.evaluation import answers, gsm8k
from llamafactory_ext.evaluation.chat_templates import (
    RESERVED,
    parse_chat_template_kwargs,
    prompt_ids,
    template_variables,
)
from llamafactory_ext.evaluation.models import load_tokenizer

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# Gemma's, which wants user and assistant in turns.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('One turn only.') }}{% endif %}"
# A template for images: turns are lists of parts.
PARTS = (
    "{% for m in messages %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %};{% endfor %}"
)
# Qwen3's: thinking is on, unless it is switched off.
THINKING = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
THINKING_OFF = ("--chat-template-kwargs", '{"enable_thinking": false}')


@pytest.fixture
def templated(model32, tmp_path):
    """The tiny model with another chat template."""

    def make(template: str | None) -> Path:
        folder = Path(shutil.copytree(model32, tmp_path / "templated", dirs_exist_ok=True))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make


def ask(model, data, output, *words, script=gsm8k):
    command = ("--engine", "hf", "--model", model, "--data", data, "--output", output, "--max-tokens", 4, *words)
    return CliRunner().invoke(script.app, [str(word) for word in command])


def refusal(result, output) -> str:
    """The one sentence that a command ends with."""
    assert result.exit_code == 2
    assert not output.exists()
    (line,) = result.output.strip().splitlines()
    assert re.match(r"main: ", line)
    return line


# --- templates that do not take a question ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", [NO_SYSTEM, ALTERNATING, ONE_TURN])
@pytest.mark.parametrize("script", [gsm8k, answers])
def test_a_template_without_system_turn(template, script, templated, data, tmp_path):
    model, output = templated(template + tiny.CHATML), tmp_path / "out"
    said = refusal(ask(model, data, output, "--system", "Brief", script=script), output)
    assert "does not accept a system turn (" in said
    assert "remove --system" in said
    assert ask(model, data, output, script=script).exit_code == 0


FAILING = {
    "{% if %}": "TemplateSyntaxError: Expected an expression",
    "{% for m in messages %}": "TemplateSyntaxError: Unexpected end of template",
    "{% generation %}": "TemplateSyntaxError",
    "{{ strftime('%d') }}": "UndefinedError: 'strftime' is undefined",
    "{{ messages[0].content.x.y }}": "UndefinedError",
    "{{ messages[7].content }}": "UndefinedError",
    "{{ messages | nothing }}": "TemplateAssertionError: No filter named 'nothing'",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ range(10000000) }}": "OverflowError",
    "{{ messages | tojson(indent='x', y=1) }}": "TypeError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{% include 'other.jinja' %}": "TypeError: no loader for this environment specified",
    "{{ raise_exception('Only a tool may speak.\nReally.') }}": "(Only a tool may speak.)",
    "{{ raise_exception() }}": "TypeError",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails(template, templated, data, tmp_path):
    output = tmp_path / "out"
    said = refusal(ask(templated(template), data, output, "--system", "Brief"), output)
    assert "templated fails on problem 1 (" in said
    assert FAILING[template] in said
    assert "correct it in chat_template.jinja" in said


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template: add a chat_template.jinja"),
        ("", "has no chat template"),
        ("\ufeff{# nothing #}", "leaves the question out"),
        ("{# nothing #}", "renders nothing for problem 1"),
        ("A prompt of its own.", "leaves the question out"),
        (PARTS, "leaves the question out"),
    ],
)
def test_a_template_that_asks_nothing(template, words, templated, data, tmp_path):
    output = tmp_path / "out"
    assert words in refusal(ask(templated(template), data, output), output)


def test_several_templates_and_none_to_take(templated, data, tmp_path):
    model, output = templated(None), tmp_path / "out"
    (model / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(tiny.CHATML)
    assert "has chat templates rag, tool_use, but no `default`" in refusal(ask(model, data, output), output)


def test_the_first_problem_that_a_template_refuses_is_named(templated, data, tmp_path):
    template = "{% if 'pens' in messages[0].content %}{{ raise_exception('No pens.') }}{% endif %}"
    output = tmp_path / "out"
    assert "fails on problem 2 (No pens.)" in refusal(ask(templated(template + tiny.CHATML), data, output), output)


def test_a_history_that_a_template_refuses(templated, tmp_path):
    rows = [{"question": "1 + 1?"}, {"question": "And 2 + 2?", "history": [["1 + 1?", "2"]]}]
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refusal(ask(templated(ONE_TURN + tiny.CHATML), data, output, script=answers), output)
    assert "does not accept the turns before the last question of problem 2 (One turn only.)" in said


def test_a_system_turn_that_a_template_leaves_out_is_told(templated, data, tmp_path):
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    result = ask(templated(users), data, tmp_path / "out", "--system", "Brief")
    assert result.exit_code == 0
    assert "the system turn has no effect" in result.output
    assert (
        "the system turn has no effect" not in ask(templated(tiny.CHATML), data, tmp_path / "2", "--system", "B").output
    )


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_that_do_not_load(file, templated, data, tmp_path):
    model, output = templated(tiny.CHATML), tmp_path / "out"
    (model / file).write_text("{")
    assert "templated" in refusal(ask(model, data, output), output)


# --- arguments of a template -----------------------------------------------------------------------------------------


def prompts(model, **arguments) -> list[str]:
    tokenizer = load_tokenizer(str(model))
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    return [tokenizer.decode(prompt_ids(tokenizer, chat, arguments)) for chat in chats]


def test_arguments_reach_the_template_and_the_manifest(templated, data, tmp_path):
    model, output = templated(tiny.CHATML + THINKING), tmp_path / "out"
    assert all(prompt.endswith("assistant\n") for prompt in prompts(model))
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts(model, enable_thinking=False))
    result = ask(model, data, output, *THINKING_OFF)
    assert result.exit_code == 0, result.output
    assert "Note" not in result.output
    kept = (output / "base" / "manifest.json", output / "base" / "generations.jsonl")
    assert json.loads(kept[0].read_text())["chat_template_kwargs"] == {"enable_thinking": False}
    assert ask(model, data, output, *THINKING_OFF).exit_code == 0
    another = ask(model, data, output)
    assert another.exit_code == 2
    assert 'belongs to another run: its chat_template_kwargs is {"enable_thinking": false}, not {}' in another.output
    assert ask(model, data, tmp_path / "plain").exit_code == 0
    plain = (tmp_path / "plain" / "base" / "generations.jsonl").read_text()
    assert kept[1].read_text() != plain


def test_an_argument_that_the_template_does_not_read_is_told(templated, data, tmp_path):
    words = ("--chat-template-kwargs", '{"enable_thinkin": false}')
    result = ask(templated(tiny.CHATML + THINKING), data, tmp_path / "out", *words)
    assert result.exit_code == 0
    assert "Note: `enable_thinkin` in --chat-template-kwargs has no effect" in result.output
    assert "reads enable_thinking." in result.output


def test_an_argument_that_the_template_does_not_take(templated, data, tmp_path):
    template = "{% if level is defined %}{{ raise_exception('No level ' ~ level) }}{% endif %}" + tiny.CHATML
    output = tmp_path / "out"
    said = refusal(ask(templated(template), data, output, "--chat-template-kwargs", '{"level": 3}'), output)
    assert 'does not accept {"level": 3} (No level 3): correct or remove --chat-template-kwargs' in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        ("enable_thinking=false", "is not valid JSON"),
        ("{enable_thinking: false}", "is not valid JSON"),
        ('{"enable_thinking": False}', "is not valid JSON"),
        ('{"a": NaN}', "is not valid JSON"),
        ('{"a": 1e999}', "is not valid JSON"),
        ('{"a": "\\ud800"}', "is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("false", "is not a JSON object"),
        ('"enable_thinking"', "is not a JSON object"),
        *((json.dumps({name: 1}), f"has `{name}`, which the evaluation sets itself") for name in sorted(RESERVED)),
    ],
)
@pytest.mark.parametrize("script", [gsm8k, answers])
def test_arguments_that_are_none(text, words, script, model32, data, tmp_path):
    output = tmp_path / "out"
    said = refusal(ask(model32, data, output, "--chat-template-kwargs", text, script=script), output)
    assert words in said
    assert len(said) < 400


def test_what_transformers_takes_for_itself_is_reserved():
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.values()
    assert {each.name for each in own if each.kind is not each.VAR_KEYWORD} <= RESERVED


NAMES = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(sorted(RESERVED))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(arguments=st.dictionaries(NAMES, st.none() | st.booleans() | NUMBERS | st.text(max_size=4), max_size=3))
@hypothesis_settings(max_examples=50, deadline=None)
def test_any_arguments_are_taken_as_they_are_or_refused(arguments):
    try:
        parsed = parse_chat_template_kwargs(json.dumps(arguments))
    except gsm8k.UserError:
        text = json.dumps(arguments)
        assert RESERVED & arguments.keys() or re.search(r"\\ud[89a-f]", text)
    else:
        assert parsed == arguments


def test_variables_of_a_template():
    assert template_variables(tiny.CHATML) == {"messages", "add_generation_prompt"}
    template = (
        "{% set x = x or y %}{% generation %}{{ z.a }}{%- endgeneration -%}{{ range(3) }}{{ raise_exception('') }}"
    )
    assert template_variables(template) == {"x", "y", "z"}
