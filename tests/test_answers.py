"""Answers of several turns, and more than two: from the data's columns to the tokens of LLaMA-Factory's templates."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams.data_args import DataArguments

from llamafactory_ext.training.answers import CUT, STANDARD_SCORES, AnswersProcessor, answers_of, say_what_was_cut
from llamafactory_ext.training.ranking import LENGTHS, SCORES, responses_of

TOOLS = json.dumps([{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}])


def call(a, b):
    return {"role": "function", "content": json.dumps([{"name": "add", "arguments": {"a": a, "b": b}}])}


def said(text):
    return {"role": "assistant", "content": text}


def asked(text):
    return {"role": "user", "content": text}


def result(text):
    return {"role": "observation", "content": text}


PROMPT = [asked("What is 1 + 2 + 3?")]
TWO_CALLS = [call(1, 2), result("3"), call(3, 3), result("6"), said("It is 6.")]
AT_ONCE = [said("It is 7.")]
FOLLOWED_UP = [said("It is 5."), asked("Sure?"), said("No: 6.")]


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(model)
    loaded.bos_token = "<|im_start|>"
    return loaded


def processor(tokenizer, template="qwen", cutoff_len=100_000, kind=AnswersProcessor):
    made = copy.deepcopy(TEMPLATES[template])
    made.enable_thinking, made.preserve_thinking = True, False  # whatever another test has set for all
    return kind(made, tokenizer, None, DataArguments(cutoff_len=cutoff_len))


def row(*answers, prompt=PROMPT, scores=None, tools=TOOLS, system="Add."):
    return {
        "_prompt": [prompt],
        "_response": [[turn for answer in answers for turn in answer]],
        "_system": [system],
        "_tools": [tools],
        "_images": [None],
        "_videos": [None],
        "_audios": [None],
        STANDARD_SCORES: [scores or [float(len(answers) - at) for at in range(len(answers))]],
    }


def tokenized(made, *answers, **about):
    found = made.preprocess_dataset(row(*answers, **about))
    return {name: values[0] for name, values in found.items()}


# --- answers in a row ------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([TWO_CALLS, AT_ONCE, FOLLOWED_UP, [call(1, 1), result("2"), call(2, 2)]]), max_size=5))
def test_answers_are_found_in_the_standard_format(answers):
    assert answers_of([turn for answer in answers for turn in answer]) == answers


# --- tokens ----------------------------------------------------------------------------------------------------------


def decoded(tokenizer, response):
    """The text of a response, with what is trained in double brackets."""
    ids, labels = response
    text, open_ = "", False
    for at, label in zip(ids, labels, strict=True):
        if (label != -100) != open_:
            text += "]]" if open_ else "[["
            open_ = not open_
        text += tokenizer.decode([at])
    return text + ("]]" if open_ else "")


QWEN = (
    "<|im_start|>user\nWhat is 1 + 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    '[[<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n]]'
    "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    '[[<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 3}}\n</tool_call><|im_end|>\n]]'
    "<|im_start|>user\n<tool_response>\n6\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    "[[It is 6.<|im_end|>\n]]"
)


def test_only_the_assistants_turns_are_trained(tokenizer):
    found = tokenized(processor(tokenizer), TWO_CALLS, AT_ONCE)
    good, bad = (decoded(tokenizer, response) for response in responses_of(found))
    assert good.endswith(QWEN)
    assert bad.endswith("<|im_start|>assistant\n[[It is 7.<|im_end|>\n]]")


def by_llamafactory(made, answer):
    """The conversation as LLaMA-Factory's supervised stage tokenizes it, which trains every turn of the assistant."""
    from llamafactory.data.processor import SupervisedDatasetProcessor

    stage = SupervisedDatasetProcessor(made.template, made.tokenizer, None, made.data_args)
    ids, labels = stage._encode_data_example(PROMPT, answer, "Add.", TOOLS, [], [], [])
    return ids, labels


@pytest.mark.parametrize(
    "template", ["qwen", "qwen3", "qwen3_nothink", "llama3", "mistral", "gemma", "chatml", "default"]
)
@pytest.mark.parametrize("answer", [TWO_CALLS, FOLLOWED_UP, AT_ONCE], ids=["two calls", "followed up", "one turn"])
def test_templates_as_in_the_supervised_stage(tokenizer, template, answer):
    if template not in TEMPLATES:
        pytest.skip(f"this LLaMA-Factory has no template {template}")
    made = processor(tokenizer, template)
    found = tokenized(made, answer, AT_ONCE)
    assert responses_of(found)[0] == by_llamafactory(made, answer)


@pytest.mark.parametrize("template", ["glm4", "falcon"])
def test_a_template_whose_next_turn_ends_the_one_before(tokenizer, template):
    """`efficient_eos`: where the user's turn begins, the model learns to stop."""
    made = processor(tokenizer, template)
    ids, labels = responses_of(tokenized(made, FOLLOWED_UP, AT_ONCE))[0]
    assert (ids, labels) == by_llamafactory(made, FOLLOWED_UP)
    assert sum(label == tokenizer.eos_token_id for label in labels) >= 2


THINKING = "<think>\nOne and two.\n</think>\n\n"


def test_thoughts_of_the_prompt_go_and_those_of_the_answer_stay(tokenizer):
    made = processor(tokenizer, "qwen3")
    prompt = [asked("Hi"), said(f"{THINKING}Hello."), asked("What is 1 + 2?")]
    answer = [said(f"{THINKING}3."), asked("Sure?"), said(f"{THINKING}Yes.")]
    text = decoded(tokenizer, responses_of(tokenized(made, answer, AT_ONCE, prompt=prompt, tools=""))[0])
    assert "<|im_start|>assistant\nHello.<|im_end|>" in text
    assert text.count("[[<think>\nOne and two.") == 2


@pytest.mark.parametrize("template", ["qwen", "qwen3", "llama3", "glm4"])
@pytest.mark.parametrize("cutoff_len", [100_000, 150, 60, 25, 4])
@given(chosen=st.text(min_size=1, max_size=60), rejected=st.text(min_size=1, max_size=60), asks=st.text(max_size=80))
@settings(max_examples=15, deadline=None)
def test_a_message_on_each_side_is_llamafactorys_pair(tokenizer, template, cutoff_len, chosen, rejected, asks):
    made, stock = (
        processor(tokenizer, template, cutoff_len, kind) for kind in (AnswersProcessor, PairwiseDatasetProcessor)
    )
    examples = row([said(chosen)], [said(rejected)], prompt=[asked(asks)])
    expected = stock.preprocess_dataset({name: values for name, values in examples.items() if name != STANDARD_SCORES})
    found = made.preprocess_dataset(examples)
    assert {name: found[name] for name in expected} == dict(expected)
    assert [len(each) for each in found[LENGTHS]] == [0]


@pytest.mark.parametrize("cutoff_len", range(4, 200, 13))
def test_what_is_cut(tokenizer, cutoff_len):
    """No sequence is longer, each keeps something to train and nothing else at its end, and the rest is counted."""
    whole = responses_of(tokenized(processor(tokenizer), TWO_CALLS, FOLLOWED_UP, AT_ONCE))
    found = tokenized(processor(tokenizer, cutoff_len=cutoff_len), TWO_CALLS, FOLLOWED_UP, AT_ONCE)
    prompts = []
    for ids, labels in responses_of(found):
        assert len(ids) <= cutoff_len
        assert labels[-1] != -100
        prompts.append(next(at for at, label in enumerate(labels) if label != -100))
    assert len(set(prompts)) == 1
    prompt = next(at for at, label in enumerate(whole[0][1]) if label != -100)
    kept = sum(len(ids) - prompts[0] for ids, _ in responses_of(found))
    assert found[CUT] == [prompt - prompts[0], sum(len(ids) - prompt for ids, _ in whole) - kept]


def test_several_answers_in_their_order(tokenizer):
    answers = [[said(text)] for text in ("a", "b", "c", "d")]
    found = tokenized(processor(tokenizer), *answers, scores=[3.0, 2.0, 2.0, 1.0])
    assert [decoded(tokenizer, each).split("assistant\n")[-1] for each in responses_of(found)] == [
        f"[[{text}<|im_end|>\n]]" for text in "abcd"
    ]
    assert found[SCORES] == [3.0, 2.0, 2.0, 1.0]


def test_rows_that_are_no_pair_are_skipped(tokenizer):
    made = processor(tokenizer)
    assert made.preprocess_dataset(row(AT_ONCE)) == {}
    assert made.preprocess_dataset(row(AT_ONCE, AT_ONCE, prompt=[])) == {}


def test_what_was_cut_is_said(tokenizer, caplog):
    found = processor(tokenizer, cutoff_len=60).preprocess_dataset(row(TWO_CALLS, AT_ONCE))
    prompts, responses = found[CUT][0]
    dataset = datasets.Dataset.from_dict(dict(found))
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    say_what_was_cut(dataset)
    logger.removeHandler(caplog.handler)
    assert responses > 0
    assert f"`cutoff_len` cut 1 of 1 rows: {prompts} tokens of prompts, {responses} of answers." in caplog.text


# --- columns ---------------------------------------------------------------------------------------------------------


def convert(rows, entry, **about):
    """Rows of a file as a training loads them, into the standard format."""
    from llamafactory.data import loader
    from llamafactory.data.parser import DatasetAttr

    from llamafactory_ext.training.answers import aligned_with_answers

    attr = DatasetAttr("file", dataset_name="mine.jsonl")
    attr.join({"ranking": True, **entry})
    align = aligned_with_answers(loader.align_dataset)
    data_args = DataArguments(overwrite_cache=True, **about)
    return list(align(datasets.Dataset.from_list(rows), attr, data_args, SimpleNamespace(local_process_index=0)))


OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected", "tools": "tools"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "tool_calls",
        "system_tag": "system",
    },
}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


def test_messages_of_openais_layout():
    chosen = [
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "3", "tool_calls": None},
        {"role": "assistant", "content": "3.", "tool_calls": None},
    ]
    rejected = [{"role": "assistant", "content": "4.", "tool_calls": None}]
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2?"}]
    (found,) = convert([{"messages": messages, "chosen": chosen, "rejected": rejected, "tools": TOOLS}], OPENAI)
    assert found["_prompt"] == [asked("1 + 2?")]
    assert answers_of(found["_response"]) == [
        [
            {"role": "function", "content": json.dumps([{"name": "add", "arguments": '{"a": 1}'}])},
            result("3"),
            said("3."),
        ],
        [said("4.")],
    ]
    assert found["_system"].startswith("Add.")
    assert found[STANDARD_SCORES] == [1.0, 0.0]


SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}


def turn(speaker, text):
    return {"from": speaker, "value": text}


@pytest.mark.parametrize("has_column", [True, False])
@pytest.mark.parametrize("is_named", [True, False])
def test_a_prompt_within_the_answers(has_column, is_named):
    """As hubs have them: both sides are whole conversations."""
    start = [turn("human", "Hi"), turn("gpt", "Hello"), turn("human", "1 + 2?")]
    rows = [
        {
            "chosen": [*start, turn("gpt", "3")],
            "rejected": [*start, turn("gpt", "4"), turn("human", "?"), turn("gpt", "3")],
        }
    ]
    if has_column:
        rows[0]["conversations"] = []
    columns = {name: column for name, column in SHAREGPT["columns"].items() if is_named or name != "messages"}
    (found,) = convert(rows, {**SHAREGPT, "columns": columns})
    assert found["_prompt"] == [asked("Hi"), said("Hello"), asked("1 + 2?")]
    assert answers_of(found["_response"]) == [[said("3")], [said("4"), asked("?"), said("3")]]


def test_several_rejected_answers():
    prompt = [turn("human", "1 + 2?")]
    rejected = [[turn("gpt", "4")], [turn("gpt", "5"), turn("human", "?"), turn("gpt", "6")]]
    (found,) = convert([{"conversations": prompt, "chosen": [turn("gpt", "3")], "rejected": rejected}], SHAREGPT)
    assert answers_of(found["_response"]) == [[said("3")], [said("4")], [said("5"), asked("?"), said("6")]]
    assert found[STANDARD_SCORES] == [1.0, 0.0, 0.0]


ALPACA = {"columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}
RANKED = {"columns": {"prompt": "q", "answers": "said", "scores": "marks"}}


def test_texts_of_alpacas_layout():
    (found,) = convert([{"q": "1 + 2?", "good": "3", "bad": ["4", "5"]}], ALPACA)
    assert found["_prompt"] == [asked("1 + 2?")]
    assert answers_of(found["_response"]) == [[said("3")], [said("4")], [said("5")]]
    (ranked,) = convert([{"q": "1 + 2?", "said": ["5", "3", "4"], "marks": [-1, 2, 0.5]}], RANKED)
    assert answers_of(ranked["_response"]) == [[said("3")], [said("4")], [said("5")]]
    assert ranked[STANDARD_SCORES] == [2.0, 0.5, -1.0]


def test_llamafactorys_own_rows_are_converted_as_ever():
    rows = [{"q": "1 + 2?", "good": "3", "bad": "4"}]
    (found,) = convert(rows, ALPACA)
    assert STANDARD_SCORES not in found
    assert found["_response"] == [said("3"), said("4")]


@pytest.mark.parametrize(
    "rows",
    [
        [{"q": "?", "said": ["a"], "marks": [1.0]}],
        [{"q": "?", "said": ["a", "b"], "marks": [1.0, 1.0]}],
        [{"q": "?", "said": ["a", "b"], "marks": [1e-50, 0.0]}],
        [{"q": "?", "said": ["a", ""], "marks": [1.0, 1.0]}],
    ],
)
def test_rows_with_nothing_to_compare_have_no_answers(rows):
    (found,) = convert(rows, RANKED)
    assert len(answers_of(found["_response"])) == 1


@pytest.mark.parametrize(
    ("rows", "entry", "message"),
    [
        ([{"q": "?", "said": ["a", "b"], "marks": [1.0]}], RANKED, "2 answers and 1 scores: write a score for each"),
        (
            [{"q": "?", "said": "a", "marks": [1.0]}],
            RANKED,
            "column 'said' of the row that begins with '.' is 'a': write a list",
        ),
        ([{"q": "?", "said": ["a", "b"], "marks": None}], RANKED, "column 'marks' .* is None: write a list"),
        (
            [{"q": "?", "said": ["a", "b"], "marks": [1.0, float("nan")]}],
            RANKED,
            "a score of .* is nan: write a number",
        ),
        ([{"q": "?", "said": ["a", "b"], "marks": [1e308, 0.0]}], RANKED, "is 1e.308: write one from -1e.30 to 1e.30"),
        ([{"q": "?", "said": ["a", "b"]}], RANKED, "names the column 'marks', but the data has 'q', 'said': write one"),
        ([{"q": "?", "good": "a"}], {"columns": {"prompt": "q"}}, "names no column of answers: write .chosen. and"),
        (
            [{"prompt": "?", "chosen": [turn("gpt", "a")], "rejected": [turn("gpt", "b")]}],
            {**SHAREGPT, "columns": {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}},
            'column .prompt. of .* is no list of messages: if the answers begin .*, remove "messages"',
        ),
        ([{"q": "?", "said": [["a"], ["b"]], "marks": [1.0, 2.0]}], RANKED, "an answer of .* is not a text"),
        (
            [{"q": "?", "said": ["a"]}],
            {"columns": {"prompt": "q", "answers": "said"}},
            'names a column of answers: name one of "scores", too',
        ),
        (
            [
                {
                    "conversations": [turn("human", "?")],
                    "chosen": turn("gpt", "a"),
                    "rejected": [turn("gpt", "b"), turn("gpt", "c")],
                }
            ],
            SHAREGPT,
            "two turns of the assistant follow one another: if they are several answers, write each as a list",
        ),
        (
            [{"conversations": [turn("human", "?")], "chosen": [turn("gpt", None)], "rejected": [turn("gpt", "b")]}],
            SHAREGPT,
            "a turn in an answer of .* has no text: write one",
        ),
    ],
)
def test_refused_rows(rows, entry, message):
    with pytest.raises(ValueError, match=f"data set mine.jsonl: .*{message}"):
        convert(rows, entry)


def test_a_conversation_that_does_not_alternate_has_no_answers():
    rows = [
        {
            "conversations": [turn("human", "?")],
            "chosen": [turn("gpt", "a"), turn("human", "b")],
            "rejected": [turn("gpt", "c")],
        }
    ]
    (found,) = convert(rows, SHAREGPT)
    assert len(answers_of(found["_response"])) == 1


@pytest.mark.parametrize("rejected", [[], [None], ["b", None]])
def test_answers_that_are_missing_are_no_answers(rejected):
    rows = [{"q": "?", "good": "a", "bad": rejected}, {"q": "?", "good": "a", "bad": ["b", "c"]}]
    first, second = convert(rows, ALPACA)
    assert len(answers_of(first["_response"])) == max(1, 1 + len([each for each in rejected if each]))
    assert answers_of(second["_response"]) == [[said("a")], [said("b")], [said("c")]]


def test_a_result_at_the_end_ends_no_answer():
    chosen = [{"role": "assistant", "content": None, "tool_calls": CALLS}, {"role": "tool", "content": "3"}]
    messages = [{"role": "user", "content": "1 + 2?"}]
    rejected = [{"role": "assistant", "content": "4.", "tool_calls": None}]
    (found,) = convert([{"messages": messages, "chosen": chosen, "rejected": rejected, "tools": TOOLS}], OPENAI)
    assert len(answers_of(found["_response"])) == 1


def test_no_answers_and_no_column_of_messages_is_skipped():
    entry = {**SHAREGPT, "columns": {"messages": "m", "answers": "said", "scores": "marks"}}
    rows = [
        {"said": [[turn("human", "?"), turn("gpt", text)] for text in "ab"], "marks": [1.0, 2.0]},
        {"said": [], "marks": []},
    ]
    first, second = convert(rows, entry)
    assert answers_of(first["_response"]) == [[said("b")], [said("a")]]
    assert len(answers_of(second["_response"])) == 1


def test_lists_are_found_behind_any_number_of_nulls():
    rows = [{"q": "?", "good": "a", "bad": None}] * 150 + [{"q": "?", "good": "a", "bad": ["b", "c"]}]
    assert len(answers_of(convert(rows, ALPACA)[-1]["_response"])) == 3
