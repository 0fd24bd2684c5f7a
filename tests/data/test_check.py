"""The check sees what the training would: counts by hand, and ids against the tokenizer's own chat template."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import shutil

import pytest
import tiny
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.dpo import workflow
from rich.console import Console
from tiny_answers import make_answers
from transformers import AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from llamafactory_ext import patching
from llamafactory_ext.cli import app
from llamafactory_ext.data.check import SKIPPED, check_pairs, common_prefix, render
from llamafactory_ext.data.contamination import TestSet
from llamafactory_ext.errors import UserError
from llamafactory_ext.training import loading
from llamafactory_ext.training.ranking import responses_of
from llamafactory_ext.training.refinement import augmented_pair

# One token a byte, and ChatML around: <|im_start|>system\n … <|im_end|>\n and so on.
PROMPT = "<s>system\nAdd.<e>\n<s>user\n{}<e>\n<s>assistant\n"


def tokens(question):
    return len(PROMPT.format(question).replace("<s>", "s").replace("<e>", "e"))


def write(folder, rows):
    folder.mkdir(exist_ok=True)
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


def training_data(recipe):
    """The data set that a training of this recipe gets, by the workflow's own steps."""
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(dict(recipe))
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    with contextlib.ExitStack() as replaced:
        for module, name, value in loading.replacements(model_args, finetuning_args):
            replaced.enter_context(patching.replaced(module, name, value))
        made = workflow.get_dataset(template, model_args, data_args, training_args, stage="rm", **tokenizer_module)
    return made["train_dataset"]


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
        "rows at which the training stops": 0,
        "an empty side": 1,
        "identical sides": 1,
        f"identical after truncation at cutoff_len {cut}": 1,
        "the question is in the test set": 1,
    }
    assert report.notes == {
        "copies of another pair": 1,
        "further pairs for a question": 1,
        f"truncated at cutoff_len {cut}": 1,
        "13 words or 20 characters in common with a test question": 0,
    }
    assert report.first_rows == {
        "rows that LLaMA-Factory skips": [],
        "rows at which the training stops": [],
        "an empty side": [4],
        "identical sides": [5],
        f"identical after truncation at cutoff_len {cut}": [6],
        "the question is in the test set": [7],
        "copies of another pair": [2],
        "further pairs for a question": [3],
        f"truncated at cutoff_len {cut}": [6],
        "13 words or 20 characters in common with a test question": [],
    }
    assert report.found_problems


def test_the_first_rows_of_a_problem_are_shown(settings):
    rows = [row(f"{n} + 1?", "2", "2" if n % 2 else "3") for n in range(14)]
    report = check_pairs(settings(*rows))
    assert report.problems["identical sides"] == 7
    assert report.first_rows["identical sides"] == [2, 4, 6, 8, 10]
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in render(report):
        console.print(part)
    assert re.search(r"identical sides .* 7 .* 50\.0% .* 2, 4, 6, 8, 10 ", console.export_text())


def test_rows_that_llamafactory_skips(settings):
    report = check_pairs(settings(row("1 + 1?", "2", None), row("1 + 1?", "2", "3"), default_system=""))
    assert report.pairs == 1
    assert report.problems["rows that LLaMA-Factory skips"] == 1
    assert report.first_rows["rows that LLaMA-Factory skips"] == [1]
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
    recipe = settings(*(row(f"Is it {n}?", "yes " * n, "no " * n) for n in range(1, 40)), cutoff_len=90)
    report = check_pairs(recipe)
    made = training_data(recipe)
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


def with_system_column(folder):
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    info["pairs"]["columns"]["system"] = "system"
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def test_a_system_message_may_be_null(settings, tmp_path):
    """As training takes it, with the model's default in its place."""
    recipe = settings(row("1 + 1?", "2", "3") | {"system": None}, row("2 + 2?", "4", "5") | {"system": "Be brief."})
    with_system_column(tmp_path / "data")
    report = check_pairs(recipe)
    assert (report.pairs, report.found_problems) == (2, False)
    assert report.tokens["prompt"][0] < report.tokens["prompt"][-1]


# What Gemma's says, and other ways in which a template may end.
REFUSALS = {
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}": "System role",
    "{{ messages[0]['content']['text']['x'] }}": "has no attribute 'text'",
    "{% if %}": "Expected an expression",
    "{{ 1 // 0 }}": "by zero",
    "{{ tojson(messages) }}": "'tojson' is undefined",
}


def with_chat_template(model, folder, template):
    """The tokenizer of a model with another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    shutil.copy(model / "config.json", folder)
    return str(folder)


@pytest.mark.parametrize("template", REFUSALS)
def test_a_chat_template_that_refuses_the_messages_is_a_difference(template, model, settings, tmp_path):
    other = with_chat_template(model, tmp_path / "other", template)
    recipe = settings(row("1 + 1?", "2", "3") | {"system": "Add."}, model_name_or_path=other)
    with_system_column(tmp_path / "data")
    report = check_pairs(recipe)
    assert not report.found_problems
    assert re.search(rf"training: .*chat template: rejects the messages \(.*{REFUSALS[template]}", report.template)
    # Without `template`, LLaMA-Factory makes one of it, and cannot.
    with pytest.raises(UserError, match=r"the tokenizer of .* cannot be used: .*Write a `template`, as none is named"):
        check_pairs({key: value for key, value in recipe.items() if key != "template"})


@pytest.mark.parametrize("thinking", [True, False])
def test_a_chat_template_is_asked_to_think_as_the_recipe_does(thinking, model, settings, tmp_path):
    """Qwen3's adds an empty thought to the prompt if it is not to think; LLaMA-Factory's `qwen3` does so, too."""
    end = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    other = with_chat_template(model, tmp_path / "other", tiny.CHATML + end)
    changes = {"model_name_or_path": other, "template": "qwen3", "default_system": None, "enable_thinking": thinking}
    assert check_pairs(settings(row("1 + 1?", "2", "3"), **changes)).template == ""


GOOD = b'{"instruction": "a", "chosen": "b", "rejected": "c", "history": []}\n'
NO_PAIR = "LLaMA-Factory cannot make a pair from it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"instruction": "a", "chosen": 3}', "line 2: 'chosen' holds a number there, and text in line 1"),
        (GOOD + b'\n{"instruction": "a"\n', "line 3: not valid JSON"),
        (b'["a"]\n', "line 1: not a JSON object"),
        (GOOD + b'{"instruction": "\\ud83c", "chosen": "b"}', "line 2: 'instruction' holds half a character"),
        (b'{"instruction": "\\ud83c", "chosen": "b"}', "line 1: 'instruction' holds half a character"),
        (b'{"history": [["a", "b"], ["c", 3]]}', r"'history'\[\]\[\] holds a number there, and text in line 1"),
        (b'{"history": [["a", "b", "c"]], "instruction": "a"}', f"line 1: {NO_PAIR} .too many values"),
        (b'{"instruction": 3, "history": null, "chosen": "b"}', f"line 1: {NO_PAIR} .sequence item"),
        (
            b'{"prompt": "a", "history": [], "chosen": "b", "rejected": "c"}',
            "line 1: it has no column 'instruction', which",
        ),
        (GOOD + b'{"instruction": "a", "chosen": "b", "chosen": "c"}', "line 2: it has the key 'chosen' twice"),
        (b"", "holds no rows"),
        (b"\n", "holds no rows"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 3\n", "a Git LFS pointer"),
    ],
)
def test_data_that_cannot_be_loaded(content, message, settings, tmp_path):
    recipe = settings()
    (tmp_path / "data" / "pairs.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"the data sets pairs cannot be loaded: .*{message}") as raised:
        check_pairs(recipe)
    assert ".." not in str(raised.value).replace("://", "")


def test_data_that_is_not_marked_as_pairs(settings, tmp_path):
    recipe = settings(row("1 + 1?", "2", "3"))
    info = tmp_path / "data" / "dataset_info.json"
    described = json.loads(info.read_text())
    del described["pairs"]["ranking"]
    info.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r'pairs\.jsonl is not marked as pairs .*: write "ranking": true there'):
        check_pairs(recipe)


def test_pairs_for_evaluation_are_checked_too(settings, tmp_path):
    recipe = settings(row("1 + 1?", "2", "3"), row("2 + 2?", "4", "5"))
    info = tmp_path / "data" / "dataset_info.json"
    described = json.loads(info.read_text())
    described["held_out"] = described["pairs"] | {"file_name": "held_out.jsonl"}
    info.write_text(json.dumps(described))
    (tmp_path / "data" / "held_out.jsonl").write_text(json.dumps(row("3 + 3?", "6", "6")) + "\n")
    words = [f"{key}={value}" for key, value in recipe.items()]
    good = CliRunner().invoke(app, ["data", "check", *words])
    assert good.exit_code == 0, good.output
    bad = CliRunner().invoke(
        app, ["data", "check", *words, "eval_dataset=held_out", "--json", str(tmp_path / "a.json")]
    )
    assert bad.exit_code == 1
    assert "2 pairs in `dataset`" in bad.output
    assert "1 pairs in `eval_dataset`" in bad.output
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["problems"]["identical sides"] == 0
    assert written["eval_dataset"]["problems"]["identical sides"] == 1


def test_shares_are_of_all_rows(settings):
    report = check_pairs(settings(row("1 + 1?", "2", "3"), *[row("2 + 2?", "4", None)] * 3))
    table = next(iter(render(report)))
    shares = dict(zip(table.columns[0].cells, table.columns[2].cells, strict=True))
    assert shares["rows that LLaMA-Factory skips"] == "75.0%"


def test_a_model_without_a_tokenizer(settings, tmp_path):
    """From a folder with nothing but a configuration, transformers makes a tokenizer that knows no text."""
    GPT2Config().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="holds no tokenizer: add its files"):
        check_pairs(settings(row("1 + 1?", "2", "3"), model_name_or_path=str(tmp_path / "bare")))


@pytest.mark.parametrize("content", [{"data": [json.loads(GOOD)]}, {"version": "1.0", "data": [json.loads(GOOD)] * 2}])
def test_a_list_of_rows_in_an_object(content, settings, tmp_path):
    recipe = settings()
    info = (tmp_path / "data" / "dataset_info.json").read_text(encoding="utf-8")
    (tmp_path / "data" / "dataset_info.json").write_text(info.replace("pairs.jsonl", "pairs.json"), encoding="utf-8")
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"an object, not a list of rows: if 'data' holds the rows, write only that list"
    ):
        check_pairs(recipe)


def test_a_row_at_which_the_training_stops(settings):
    rows = [row("1 + 1?", "2", "3"), row("2 + 2?", "4", "5", [["Hi.", None]]), row("3?", "3", "4")]
    for workers in (None, 2):
        report = check_pairs(settings(*rows, preprocessing_num_workers=workers))
        assert report.pairs == 2
        assert report.problems["rows at which the training stops"] == 1
        assert report.stop == "row 2: Expected a string, got None"
        assert report.found_problems
        assert "The training stops at row 2: Expected" in "".join(map(str, render(report)))


def test_pairs_of_a_refinement_term_are_counted_as_trained(settings):
    """With the augmented pair, which may exceed cutoff_len by the text in front, but not the model's context."""
    prompt = "Rate 9 of 9: "
    rows = [row("1 + 1?", "It is 2.", "It is 34."), row("Long. " * 20, "yes", "no")]
    recipe = settings(*rows, cutoff_len=100, pref_loss="sr_dpo", sr_prompt=prompt)
    plain = check_pairs({key: value for key, value in recipe.items() if not key.startswith(("sr_", "pref_"))})
    report = check_pairs(recipe)
    cut = tokens("1 + 1?") + len("It is 34.e\n")
    assert report.tokens.pop("augmented") == [cut + len(prompt)] + [100 + len(prompt)] * 7
    assert report.tokens == plain.tokens
    assert report.problems == plain.problems
    assert report.stock_tokens == 2 * plain.stock_tokens + 2 * len(prompt)
    assert report.shared_tokens == 2 * plain.shared_tokens + len(prompt)

    made = training_data(recipe)
    ours = [len(pair["chosen_input_ids"]) + len(pair["rejected_input_ids"]) for pair in made]
    theirs = [augmented_pair(pair) for pair in made]
    theirs = [len(pair["chosen_input_ids"]) + len(pair["rejected_input_ids"]) for pair in theirs]
    assert report.stock_tokens == (sum(ours) + sum(theirs)) / 2

    longer = check_pairs(recipe | {"sr_prompt": "x" * 200})  # the tiny model takes 256 tokens
    assert longer.problems["rows at which the training stops"] == 1
    assert re.match(r"row 2: with `sr_prompt` in front, a pair has 300 tokens, more than the 256", longer.stop)


def test_columns_that_the_recipe_names_are_read(settings):
    """As the training does: one that is missing or holds no number stops it."""
    rows = [row("1 + 1?", "2", "3") | {"weight": weight} for weight in (1, 0.5)]
    assert check_pairs(settings(*rows, pref_weight_column="weight")).pairs == 2
    with pytest.raises(UserError, match="names 'wight', but the data has the columns 'instruction'"):
        check_pairs(settings(*rows, pref_weight_column="wight"))
    rows[1]["weight"] = None
    with pytest.raises(UserError, match=r"column 'weight' .value None. of the row that begins with .* is no number"):
        check_pairs(settings(*rows, pref_weight_column="weight"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_samples": -1}, "max_samples is -1: write a whole number of at least 1"),
        ({"max_samples": "all"}, "max_samples is 'all': write a whole number"),
        ({"cutoff_len": 0}, "cutoff_len is 0: write"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers is 0: write"),
        ({"dataset": 3}, "dataset is 3: write names"),
        ({"dataset": [3, "pairs"]}, "dataset is 3, 'pairs': write names"),
        ({"stage": "sft"}, "stage 'sft' does not train on pairs"),
        ({"dataset": None}, "names no data set"),
        ({"dataset": "absent"}, "Undefined dataset absent"),
        ({"template": "qwen33"}, "'qwen33', which LLaMA-Factory does not have: correct it. Did you mean 'qwen3"),
        ({"model_name_or_path": "/no/model"}, "there is no /no/model: write an existing folder"),
        ({"adapter_name_or_path": "./none", "finetuning_type": "lora"}, "there is no ./none: write an existing folder"),
        ({"finetuning_type": "full", "adapter_name_or_path": "."}, "`finetuning_type: lora` only"),
        ({"cutof_len": 5}, "'cutof_len' is not a key.* Did you mean 'cutoff_len'"),
        ({"pref_loss": "minor_d"}, "Did you mean 'minor_dpo'"),
        ({"model_name_or_path": "no/such-model"}, "the tokenizer of 'no/such-model' cannot be used"),
    ],
)
def test_wrong_recipes(settings, changes, message):
    with pytest.raises(UserError, match=message):
        check_pairs(settings(row("1 + 1?", "2", "3"), **changes))


@pytest.mark.parametrize(("a", "b", "length"), [("abc", "abd", 2), ("ab", "abc", 2), ("", "a", 0), ("x", "y", 0)])
def test_common_prefix(a, b, length):
    assert common_prefix(a, b) == common_prefix(b, a) == length


def test_a_compressed_file_is_to_be_unpacked(settings, tmp_path):
    recipe = settings(row("1 + 1?", "2", "3"))
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    info["pairs"]["file_name"] = "pairs.jsonl.gz"
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "data" / "pairs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "data" / "pairs.jsonl").read_bytes()))
    with pytest.raises(UserError, match="is compressed, which LLaMA-Factory does not read: unpack it"):
        check_pairs(recipe)


@pytest.mark.parametrize("name", ["four", "turns", "rejected", "two"])
def test_answers_of_several_turns_and_more_than_two(name, model, data, tmp_path):
    """Counted as the training gets them: each row's responses, and the tokens of a tree that has each prefix once."""
    folder = make_answers(tmp_path / "data", data)
    recipe = tiny.recipe(model, folder, tmp_path / "out", dataset=name, cutoff_len=110)
    report = check_pairs(recipe)
    rows = [responses_of(row) for row in training_data(recipe)]
    assert report.pairs == len(rows) == 12
    assert report.stock_tokens == pytest.approx(sum(len(ids) for row in rows for ids, _ in row) / 12)
    prefixes = [len({tuple(ids[:end]) for ids, _ in row for end in range(1, len(ids) + 1)}) for row in rows]
    assert report.shared_tokens == pytest.approx(sum(prefixes) / 12)
    assert report.problems[SKIPPED] == 0


def test_rows_without_an_order_are_skipped(model, data, tmp_path):
    folder = make_answers(tmp_path / "data", data)
    lines = (folder / "four.jsonl").read_text().splitlines()
    same = json.loads(lines[2]) | {"scores": [1.0] * 4}
    (folder / "four.jsonl").write_text("\n".join([*lines[:2], json.dumps(same), *lines[3:]]) + "\n")
    report = check_pairs(tiny.recipe(model, folder, tmp_path / "out", dataset="four"))
    assert (report.pairs, report.problems[SKIPPED], report.first_rows[SKIPPED]) == (11, 1, [3])
