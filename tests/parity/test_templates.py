"""Answers of several turns beside the chat templates of models, as TRL ships them: the same text, or why not."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_answers import AT_ONCE, FOLLOWED_UP, PROMPT, TOOLS, TWO_CALLS, processor, tokenized
from test_answers import tokenizer as tokenizer

from llamafactory_ext.training.ranking import responses_of

PYTHON = os.environ.get("TRL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs TRL's environment: make test-trl")
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def templates():
    where = "import importlib.util; print(importlib.util.find_spec('trl').origin)"
    found = subprocess.run([str(PYTHON), "-c", where], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()).parent / "chat_templates"


def as_openai(message):
    if message["role"] == "observation":
        return {"role": "tool", "content": message["content"]}
    if message["role"] != "function":
        return message
    calls = [{"type": "function", "function": call} for call in json.loads(message["content"])]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def both(tokenizer, templates, template, file, answer, tools="", system="Add."):
    """The conversation as text: of our tokens, and by the model's own chat template."""
    made = processor(tokenizer, template)
    row = {"tools": tools, "system": system}
    ours = tokenizer.decode(responses_of(tokenized(made, answer, AT_ONCE, **row))[0][0])
    messages = [{"role": "system", "content": system}] * bool(system) + [as_openai(each) for each in [*PROMPT, *answer]]
    described = [{"type": "function", "function": tool} for tool in json.loads(tools)] if tools else None
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=(templates / f"{file}.jinja").read_text(), tools=described, tokenize=False
    )
    return ours, theirs


@pytest.mark.parametrize(
    ("template", "file", "answer", "tools", "system"),
    [
        ("qwen", "qwen2_5", FOLLOWED_UP, "", "Add."),
        ("qwen", "qwen2_5", TWO_CALLS, TOOLS, "Add."),
        ("llama3", "llama3", FOLLOWED_UP, "", "Add."),
        ("smollm2", "qwen2_5", FOLLOWED_UP, "", "Add."),
        ("gemma", "gemma", FOLLOWED_UP, "", ""),
    ],
    ids=["qwen", "qwen with tools", "llama3", "smollm2", "gemma"],
)
def test_the_text_is_the_models_own(tokenizer, templates, template, file, answer, tools, system):
    ours, theirs = both(tokenizer, templates, template, file, answer, tools, system)
    assert ours == theirs


@pytest.mark.parametrize(("answer", "tools"), [(FOLLOWED_UP, ""), (TWO_CALLS, TOOLS)], ids=["turns", "tools"])
def test_qwen3_has_a_thought_in_every_turn(tokenizer, templates, answer, tools):
    """Each turn is trained as the model is asked for it: with its thought, which later turns do not see in its place.

    Qwen3's template leaves the thoughts of earlier turns out, so one text cannot be both.
    """
    ours, theirs = both(tokenizer, templates, "qwen3", "qwen3", answer, tools)
    turns = sum(turn["role"] in ("assistant", "function") for turn in answer)
    assert ours.count(NO_THOUGHT) == turns
    assert ours.replace(NO_THOUGHT, "") == theirs.replace(NO_THOUGHT, "")
    without, theirs = both(tokenizer, templates, "qwen3_nothink", "qwen3", answer, tools)
    assert without == theirs.replace(NO_THOUGHT, "")
