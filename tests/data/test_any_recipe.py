"""Whatever rows, chat template and recipe hold: the check says what a training makes of it, and in sentences."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_check import training_data
from transformers import AutoTokenizer

from llamafactory_ext.data.check import check_pairs
from llamafactory_ext.errors import UserError

COLUMNS = ("instruction", "input", "history", "system", "tools", "chosen", "rejected")
NAMES = {column: column for column in COLUMNS[2:]} | {"prompt": "instruction", "query": "input"}
INFO = {"file_name": "pairs.jsonl", "ranking": True, "columns": NAMES}
GOOD = {"instruction": "1 + 1?", "input": "", "history": [], "system": "", "tools": "", "chosen": "2", "rejected": "3"}
TEXT = st.sampled_from(["", " ", "2", "é", "\0", "<|im_end|>", "<image>", "{{content}}", "\ud83c", "a" * 300])
ODD = st.none() | st.just(3) | st.just(True) | st.just([]) | st.just({}) | st.just(["a"]) | st.just([["a", "b"]]) | TEXT
HISTORY = st.lists(st.lists(TEXT | st.none(), min_size=1, max_size=3), max_size=2)
ROWS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={name: ODD if name != "history" else ODD | HISTORY for name in COLUMNS},
    ).map(lambda fields: GOOD | fields),
    min_size=1,
    max_size=3,
)


def recipe_for(model, folder, content, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_bytes(content)
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": INFO}), encoding="utf-8")
    return tiny.recipe(model, folder, folder / "out", **changes)


def outcome(recipe):
    """Whether a training could begin: as the check says."""
    try:
        report = check_pairs(recipe)
    except UserError:
        return False
    return report.pairs > 0 and not report.stop


@given(rows=ROWS, sr_prompt=st.sampled_from([None, "Rate: "]))
@example(rows=[GOOD | {"system": None}, GOOD | {"system": "Be."}], sr_prompt=None)
@example(rows=[GOOD, GOOD | {"chosen": 3}], sr_prompt=None)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_check_passes_what_the_training_takes(rows, sr_prompt, model, tmp_path):
    changes = {"pref_loss": "sr_dpo", "sr_prompt": sr_prompt} if sr_prompt else {}
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    recipe = recipe_for(model, tmp_path / "data", content, **changes)
    checked = outcome(recipe)
    try:
        trains = len(training_data(recipe)) > 0
    except Exception:
        trains = False
    assert checked == trains


@given(content=st.binary(max_size=60) | st.integers(1, 200).map(lambda cut: (json.dumps(GOOD) * 2).encode()[:cut]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_end_in_a_sentence_or_a_report(content, model, tmp_path):
    outcome(recipe_for(model, tmp_path / "data", content))


PARTS = st.sampled_from(
    [
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.role }}",
        "{{ m['content'] }}",
        "{% if m.role == 'system' %}{{ raise_exception('No system.') }}{% endif %}",
        "{{ messages[0].content[0].text.x }}",
        "{{ bos_token + 1 }}",
        "{% generation %}",
        "<|im_start|>",
        "{{",
        "%}",
    ]
)


@given(template=st.lists(PARTS, max_size=6).map("".join), named=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chat_template_is_compared_or_refused(template, named, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "other")
    shutil.copy(model / "config.json", tmp_path / "other")
    content = json.dumps(GOOD | {"system": "Be."}).encode()
    recipe = recipe_for(tmp_path / "other", tmp_path / "data", content, template="smollm2" if named else None)
    assert outcome(recipe) or not named


VALUES = st.none() | st.booleans() | st.integers(-2, 3) | st.just("x") | st.just([]) | st.just(["pairs"]) | st.just({})
KEYS = st.sampled_from(
    ["max_samples", "cutoff_len", "preprocessing_num_workers", "dataset", "template", "default_system", "val_size",
     "mix_strategy", "tool_format", "streaming", "train_on_prompt", "use_fast_tokenizer", "model_revision", "sr_prompt",
     "pref_loss", "dataset_dir", "media_dir", "preprocessing_batch_size", "new_special_tokens", "split_special_tokens"]
)  # fmt: skip


@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=2))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_end_in_a_sentence_or_a_report(changes, model, tmp_path):
    outcome(recipe_for(model, tmp_path / "data", json.dumps(GOOD).encode(), **changes))


def test_a_recipe_that_is_fine_is_found_to_be(model, tmp_path):
    """Otherwise nothing above would be worth much."""
    assert outcome(recipe_for(model, tmp_path / "data", json.dumps(GOOD).encode()))
    with pytest.raises(UserError):
        check_pairs(recipe_for(model, tmp_path / "data", b"{"))
