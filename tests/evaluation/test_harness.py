"""`eval harness` on a tiny model and tasks of one's own, against numbers that transformers gives without lm_eval."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import pytest
import tiny
from engine_cases import needs_vllm
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="lm_eval is in vLLM's environment: make test-eval")

from llamafactory_ext.evaluation import harness
from llamafactory_ext.evaluation.harness_results import compare_tasks, interval_95, read_harness
from llamafactory_ext.evaluation.harness_tasks import find_tasks, parse_tasks

SEED = 1234
CHOICE = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {train: TRAIN, test: TEST}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
"""
WORDS = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: letter, filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]}
"""
GROUP = """\
group: both
task: [sums, more_sums]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 2}
"""


def question(a: int, b: int) -> dict:
    """With choices of several lengths; the right one is in another place each time, and long every third time."""
    sums = [a + b + more for more in (0, 1, 10, -2)]
    texts = [str(each) if (n + a + b) % 3 else f"it is {each}" for n, each in enumerate(sums)]
    place = (a * b) % 4
    return {
        "question": f"What is {a} + {b}?",
        "choices": [*texts[1:][:place], texts[0], *texts[1:][place:]],
        "answer": place,
    }


QUESTIONS = [question(a, b) for a, b in tiny.SUMS]
TRAIN, TEST, MORE = QUESTIONS[:8], QUESTIONS[8:28], QUESTIONS[28:35]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def weights(model32):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model32, dtype=torch.float64)
    return model, AutoTokenizer.from_pretrained(model32)


def replies(weights, texts) -> list[str]:
    """Four tokens after each text, greedily."""
    import torch

    model, tokenizer = weights
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(4):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        found.append(tokenizer.decode(ids[0, start:]))
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, weights):
    """A folder with a task of choices, one of words, and a group; `words` is right in every second example."""
    folder, data = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("data")
    train, test, more = (
        write_rows(data / f"{name}.jsonl", rows) for name, rows in {"train": TRAIN, "test": TEST, "more": MORE}.items()
    )
    (folder / "sums.yaml").write_text(CHOICE.replace("TRAIN", train).replace("TEST", test))
    (folder / "more.yaml").write_text(
        f"include: sums.yaml\ntask: more_sums\ndataset_kwargs: {{data_files: {{train: {train}, test: {more}}}}}\n"
    )
    texts = [f"Say {n}:" for n in range(6)]
    said = replies(weights, texts)
    rows = [
        {"question": text, "answer": reply if n % 2 else "another"}
        for n, (text, reply) in enumerate(zip(texts, said, strict=True))
    ]
    (folder / "words.yaml").write_text(WORDS.replace("TEST", write_rows(data / "words.jsonl", rows)))
    (folder / "both.yaml").write_text(GROUP)
    return folder


def words(model, tasks, output, *more: object, engine="hf") -> list[str]:
    own = ("--engine", engine, "--model", model, "--include-path", tasks, "--output", output)
    return [str(word) for word in (*own, *more)]


def invoke(*arguments: object):
    return CliRunner().invoke(harness.app, [str(word) for word in arguments])


def score(*arguments: object):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def log_likelihood(weights, context: str, reply: str) -> float:
    """log p(reply | context), in float64."""
    import torch

    model, tokenizer = weights
    start, ids = (tokenizer(text)["input_ids"] for text in (context, context + reply))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(len(start), len(ids)))


def prompt_of(row, shots=()) -> str:
    solved = "".join(f"Q: {each['question']}\nA: {each['choices'][each['answer']]}\n\n" for each in shots)
    return f"{solved}Q: {row['question']}\nA:"


def accuracies(weights, rows, shots: int) -> tuple[list[float], list[float]]:
    """By example: whether the right choice is the likeliest, and so per character (acc_norm)."""
    drawn = random.Random(SEED)
    plain, per_character = [], []
    for row in rows:
        prompt = prompt_of(row, drawn.sample(TRAIN, shots) if shots else ())
        scores = [log_likelihood(weights, prompt, f" {choice}") for choice in row["choices"]]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        plain.append(float(scores.index(max(scores)) == row["answer"]))
        per_character.append(float(by_length.index(max(by_length)) == row["answer"]))
    return plain, per_character


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_scored_as_by_hand(model32, tasks, weights, tmp_path, shots):
    plain, per_character = accuracies(weights, TEST, shots)
    assert 0 < sum(plain) < len(TEST)
    assert 0 < sum(per_character) < len(TEST)
    assert plain != per_character
    for metric, expected in {"acc": plain, "acc_norm": per_character}.items():
        score(*words(model32, tasks, tmp_path / metric, "--tasks", f"sums:{shots}:{metric}"))
        found = read_harness(tmp_path / metric / "base").tasks["sums"]
        assert dict(found.rows) == {str(n): value for n, value in enumerate(expected)}
        assert (found.metric, found.shots, found.version) == (metric, shots, 1.5)
        assert found.value == pytest.approx(sum(expected) / len(TEST))
        assert found.interval == pytest.approx(interval_95(expected))


def test_words_are_generated_and_read(model32, tasks, tmp_path):
    """The first metric and filter of the definition, and another filter, which reads single letters: never right."""
    score(*words(model32, tasks, tmp_path / "whole", "--tasks", "words"))
    whole = read_harness(tmp_path / "whole" / "base").tasks["words"]
    assert list(whole.rows.values()) == [0.0, 1.0] * 3
    assert (whole.metric, whole.shots) == ("exact_match", 0)
    score(*words(model32, tasks, tmp_path / "letter", "--tasks", "words::exact_match:letter"))
    letter = read_harness(tmp_path / "letter" / "base").tasks["words"]
    assert letter.value == 0.0
    assert letter.hash != whole.hash


def test_a_groups_examples_are_pooled_as_lm_eval_does(model32, tasks, weights, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    score(*words(model32, tasks, tmp_path, "--tasks", "both,words", "--shots", 0))
    found = read_harness(tmp_path / "base")
    both = found.tasks["both"]
    first, second = (accuracies(weights, rows, 0)[0] for rows in (TEST, MORE))
    expected = {f"sums:{n}": value for n, value in enumerate(first)}
    expected |= {f"more_sums:{n}": value for n, value in enumerate(second)}
    assert dict(both.rows) == expected
    assert found.average == pytest.approx((both.value + 0.5) / 2)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"pretrained": str(model32), "device": "cpu"}
    theirs = lm_eval.simple_evaluate("hf", arguments, tasks=["both"], num_fewshot=0, task_manager=manager)
    assert both.value == pytest.approx(theirs["results"]["both"]["acc,none"])


def test_a_limit_is_of_each_task(model32, tasks, tmp_path):
    score(*words(model32, tasks, tmp_path, "--tasks", "both", "--limit", 3))
    assert list(read_harness(tmp_path / "base").tasks["both"].rows) == [
        *(f"more_sums:{n}" for n in range(3)),
        *(f"sums:{n}" for n in range(3)),
    ]


def test_adapters_are_scored_in_one_load(model32, adapters, tasks, tmp_path):
    """As alone, and unlike each other; the base model as without adapters."""
    given = ["--adapter", f"one={adapters['one']}", "--adapter", f"two={adapters['two']}"]
    score(*words(model32, tasks, tmp_path / "all", "--tasks", "sums:0:acc_norm", *given))
    score(*words(model32, tasks, tmp_path / "alone", "--tasks", "sums:0:acc_norm"))
    score(*words(model32, tasks, tmp_path / "alone", "--tasks", "sums:0:acc_norm", *given[2:], "--skip-base"))
    together = {name: read_harness(tmp_path / "all" / name) for name in ("base", "one", "two")}
    for name in ("base", "two"):
        alone = read_harness(tmp_path / "alone" / name)
        assert alone.tasks == together[name].tasks
    assert len({tuple(run.tasks["sums"].rows.values()) for run in together.values()}) == 3
    compared = compare_tasks(together["base"], together["one"])["sums"]
    assert compared.better - compared.worse == pytest.approx(compared.difference * len(TEST))
    summary = json.loads((tmp_path / "all" / "results.json").read_text())
    assert list(summary) == ["base", "one", "two"]


def test_what_the_model_is_asked_is_in_the_hash(model32, tasks, tmp_path):
    """Not where the files are: a copy elsewhere has the same."""
    copy = shutil.copytree(tasks, tmp_path / "copy")
    made = {}
    for name, folder, more in (("first", tasks, ()), ("copy", copy, ()), ("shots", tasks, ("--shots", 1))):
        score(*words(model32, folder, tmp_path / name, "--tasks", "sums", "--limit", 4, *more))
        made[name] = read_harness(tmp_path / name / "base").tasks["sums"].hash
    (copy / "sums.yaml").write_text((copy / "sums.yaml").read_text().replace("Q:", "Question:"))
    score(*words(model32, copy, tmp_path / "changed", "--tasks", "sums", "--limit", 4))
    assert made["first"] == made["copy"]
    assert len({*made.values(), read_harness(tmp_path / "changed" / "base").tasks["sums"].hash}) == 3


# --- resuming ---------------------------------------------------------------------------------------------------------

KILLED = """\
import os, signal, sys
from llamafactory_ext.evaluation import harness
score = harness._score
def killed(model, task, *more):
    if task.name == "words":
        os.kill(os.getpid(), signal.SIGKILL)
    score(model, task, *more)
harness._score = killed
harness.app(sys.argv[1:])
"""


def test_killed_in_the_middle_it_goes_on(model32, tasks, tmp_path):
    arguments = ("--tasks", "sums:2,words,both:0")
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, *words(model32, tasks, broken, *arguments)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    (finished,) = (broken / "base" / "tasks").iterdir()
    assert finished.name == "sums.json"
    written = finished.stat().st_mtime_ns
    score(*words(model32, tasks, broken, *arguments))
    score(*words(model32, tasks, whole, *arguments))
    assert finished.stat().st_mtime_ns == written
    for name in ("base/results.json", "base/manifest.json", "results.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_another_run_in_the_same_folder_is_refused(model32, adapters, tasks, tmp_path):
    arguments = ("--tasks", "sums:0", "--limit", 2)
    other = tiny.make_model(tmp_path / "other", dtype="float32", seed=9)
    copied = shutil.copytree(tasks, tmp_path / "tasks")
    output = tmp_path / "out"
    score(*words(model32, copied, output, *arguments))
    for changed in (
        words(other, copied, output, *arguments),
        words(model32, copied, output, "--tasks", "sums:1", "--limit", 2),
        words(model32, copied, output, "--tasks", "sums:0", "--limit", 3),
        words(model32, copied, output, *arguments, "--dtype", "bfloat16"),
    ):
        refused = invoke(*changed)
        assert refused.exit_code == 2
        assert "belongs to another run" in refused.output
    (copied / "sums.yaml").write_text((copied / "sums.yaml").read_text().replace("Q:", "Question:"))
    refused = invoke(*words(model32, copied, output, *arguments))
    assert "belongs to another run: its own_tasks" in refused.output


def test_a_folder_without_scores_belongs_to_nobody(model32, tasks, tmp_path):
    """As after a model that could not be loaded."""
    arguments = words(model32, tasks, tmp_path / "out", "--tasks", "sums:0")
    (tmp_path / "out" / "base").mkdir(parents=True)
    (tmp_path / "out" / "base" / "manifest.json").write_text(json.dumps({"model": "another"}))
    score(*arguments)


def test_a_damaged_task_is_named(model32, tasks, tmp_path):
    arguments = words(model32, tasks, tmp_path, "--tasks", "sums:0", "--limit", 2)
    score(*arguments)
    (tmp_path / "base" / "tasks" / "sums.json").write_text("{")
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "sums.json is damaged" in " ".join(refused.output.split())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "sums:0:f1"), "sums has no metric f1 per example: write one of acc, acc_norm"),
        (("--tasks", "words:0:bleu"), "words has no metric bleu per example: write one of exact_match"),
        (("--tasks", "words:0:exact_match:none"), "no filter none: write one of whole, letter"),
        (("--tasks", "both:0:acc_norm"), "both has no metric acc_norm per example: write one of acc"),
        (("--tasks", "more_sums:99"), "more_sums cannot be asked with 99 shots (Sample larger than population"),
        (("--tasks", "sums", "--batch-size", "many"), "--batch-size many: write a number from 1, or auto"),
        (("--tasks", "sums", "--tensor-parallel", 2), "--engine hf uses one device"),
        (("--tasks", "sums", "--adapter", "x=/no/such"), "has no adapter_config.json"),
        (("--tasks", "sums", "--model", "/no/such"), "/no/such is not a model"),
        (("--tasks", "sums", "--include-path", "/no/such"), "/no/such is not a folder"),
        (("--tasks", "sums", "--engine", "openai"), "Invalid value for '--engine'"),
    ],
)
def test_wrong_words(model32, tasks, tmp_path, more, message):
    result = invoke(*words(model32, tasks, tmp_path / "out", *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_unknown_task_suggests_names(model32, tasks, tmp_path):
    result = invoke(*words(model32, tasks, tmp_path / "out", "--tasks", "arc_chalenge"))
    assert result.exit_code == 2
    assert "write arc_challenge" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_leaderboards_tasks_are_lm_evals():
    """Their names, metrics and filters are still those that the named set writes."""
    leaderboard = parse_tasks("open_llm_leaderboard")
    known = find_tasks(leaderboard, None)
    for wanted in leaderboard:
        definition = known.task_index[wanted.task].cfg
        offered = definition.get("aggregate_metric_list") or definition["metric_list"]
        metric = {"mc2": "acc"}.get(wanted.metric, wanted.metric)
        assert metric in [each["metric"] for each in offered]
        if wanted.filter:
            assert wanted.filter == definition["filter_list"][0]["name"]


# --- vLLM -------------------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.slow
def test_vllm_scores_like_transformers(model32, adapters, tasks, tmp_path):
    """Base and adapter in one load."""
    arguments = ("--tasks", "sums:2:acc_norm", "--dtype", "float32", "--adapter", f"one={adapters['one']}")
    score(*words(model32, tasks, tmp_path / "hf", *arguments))
    score(*words(model32, tasks, tmp_path / "vllm", *arguments, "--max-model-len", 512, engine="vllm"))
    for name in ("base", "one"):
        ours, theirs = (read_harness(tmp_path / engine / name) for engine in ("vllm", "hf"))
        assert ours.tasks == theirs.tasks
