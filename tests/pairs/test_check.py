"""The check sees what the training would: counts by hand, and ids against the tokenizer's own chat template."""

from __future__ import annotations

import json

import pytest
import tiny
from rich.console import Console

from llamafactory_ext.errors import UserError
from llamafactory_ext.pairs.check import check_pairs, common_prefix, render
from llamafactory_ext.pairs.contamination import TestSet

# One token a byte, and ChatML around: <|im_start|>system\n … <|im_end|>\n and so on.
PROMPT = "<s>system\nAdd.<e>\n<s>user\n{}<e>\n<s>assistant\n"


def tokens(question):
    return len(PROMPT.format(question).replace("<s>", "s").replace("<e>", "e"))


def write(folder, rows):
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"prompt": "instruction", "history": "history", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def row(question, chosen, rejected, history=()):
    return {"instruction": question, "history": list(history), "chosen": chosen, "rejected": rejected}


@pytest.fixture
def settings(model, tmp_path):
    def make(*rows, **changes):
        return tiny.recipe(model, write(tmp_path / "data", rows), tmp_path / "out", **changes)

    return make


def test_counts(settings):
    cut = 100
    shared = "Long. " * 30
    rows = [
        row("How much is 3 + 4?", "7", "8"),
        row("How much is 3 + 4?", "7", "8"),  # a copy
        row("How much is 3 + 4?", "7.", "8"),  # the same question again
        row("Name a colour.", "", "red"),
        row("Name a number.", "3", "3"),
        row("Say a lot.", shared + "a", shared + "b"),  # the difference is cut off
        row("In the test set, this one?", "yes", "no"),
        row("Then?", "two", "2", [["First?", "one"]]),
    ]
    report = check_pairs(settings(*rows, cutoff_len=cut), TestSet(["in the test set this one"]))
    assert report.pairs == 8
    assert report.problems == {
        "rows that LLaMA-Factory skips": 0,
        "an empty side": 1,
        "identical sides": 1,
        f"identical after truncation at cutoff_len {cut}": 1,
        "the question is in the test set": 1,
    }
    assert report.notes == {
        "copies of another pair": 1,
        "further pairs for a question": 1,
        f"truncated at cutoff_len {cut}": 1,
        "13 words in common with a test question": 0,
    }
    assert report.found_problems


def test_rows_that_llamafactory_skips(settings):
    report = check_pairs(settings(row("1 + 1?", "2", None), row("1 + 1?", "2", "3"), default_system=""))
    assert report.pairs == 1
    assert report.problems["rows that LLaMA-Factory skips"] == 1
    assert report.found_problems
    assert report.template == ""


def test_tokens_by_hand(settings):
    report = check_pairs(settings(row("1 + 1?", "It is 2.", "It is 34."), cutoff_len=200))
    prompt = tokens("1 + 1?")
    chosen, rejected = len("It is 2.e\n"), len("It is 34.e\n")
    assert {name: values[0] for name, values in report.tokens.items()} == {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "longer": prompt + rejected,
    }
    assert report.stock_tokens == 2 * prompt + chosen + rejected
    assert report.shared_tokens == report.stock_tokens - prompt - len("It is ")
    assert not report.found_problems


def test_tokens_are_what_training_gets(settings):
    """The lengths against the data set that LLaMA-Factory itself makes for the training."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    recipe = settings(*(row(f"Is it {n}?", "yes " * n, "no " * n) for n in range(1, 40)), cutoff_len=90)
    report = check_pairs(recipe)
    model_args, data_args, training_args, *_ = get_train_args(dict(recipe))
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    made = get_dataset(template, model_args, data_args, training_args, stage="rm", tokenizer=tokenizer)["train_dataset"]
    totals = [len(c) + len(r) for c, r in zip(made["chosen_input_ids"], made["rejected_input_ids"], strict=True)]
    assert report.stock_tokens == pytest.approx(sum(totals) / len(totals))
    assert report.notes["truncated at cutoff_len 90"] > 10


def test_a_template_that_evaluations_do_not_use_is_shown(settings):
    """The tiny model's chat template adds no system text; LLaMA-Factory's smollm2 does unless it is told not to."""
    report = check_pairs(settings(row("1 + 1?", "2", "3"), default_system=None))
    assert "training: " in report.template
    assert "chat template: " in report.template
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in render(report):
        console.print(part)
    assert "which evaluations use" in console.export_text()


def test_prompts_of_the_chat_template_are_recognised(settings):
    rows = [row("1 + 1?", "2", "3"), row("And 2 + 2?", "4", "5", [["1 + 1?", "2"]])]
    assert check_pairs(settings(*rows, default_system="")).template == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sft"}, "stage 'sft' does not train on pairs"),
        ({"dataset": None}, "names no data set"),
        ({"dataset": "absent"}, "Undefined dataset absent"),
        ({"template": "no_such"}, "cannot be used"),
        ({"cutof_len": 5}, "'cutof_len' is not a key.* Did you mean 'cutoff_len'"),
        ({"pref_loss": "minor"}, "Did you mean 'minor_dpo'"),
        ({"model_name_or_path": "no/such-model"}, "the tokenizer of 'no/such-model' cannot be used"),
    ],
)
def test_wrong_recipes(settings, changes, message):
    with pytest.raises(UserError, match=message):
        check_pairs(settings(row("1 + 1?", "2", "3"), **changes))


@pytest.mark.parametrize(("a", "b", "length"), [("abc", "abd", 2), ("ab", "abc", 2), ("", "a", 0), ("x", "y", 0)])
def test_common_prefix(a, b, length):
    assert common_prefix(a, b) == common_prefix(b, a) == length
