"""What a sweep has to do: names, fingerprints, what is refused, how far it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation.chat_templates import parse_chat_template_kwargs
from llamafactory_ext.sweep.files import write_recipes, write_sweep
from llamafactory_ext.sweep.judging import check_baselines
from llamafactory_ext.sweep.progress import Watcher
from llamafactory_ext.sweep.records import Record
from llamafactory_ext.sweep.spec import Sweep
from llamafactory_ext.sweep.tasks import Agenda

RECIPE = {"stage": "dpo", "model_name_or_path": "one", "dataset": "pairs", "finetuning_type": "full"}


@pytest.fixture
def make(tmp_path):
    def agenda(axes, options=None, data="openai/gsm8k", evaluators=MappingProxyType({}), **changes):
        recipe = RECIPE | {"dataset_dir": str(tmp_path)} | changes
        scored = {"data": data, "engine": "hf", "script": tmp_path / "gsm8k.py", "options": options or {}}
        evaluators = {"gsm8k": scored, "pairs": {"dataset": "test"}, **evaluators}
        sweep = Sweep(recipe=recipe, axes=axes, output=tmp_path / "out", evaluators=evaluators)
        return Agenda(sweep, sweep.cells())

    return agenda


def score_fingerprint(agenda):
    return agenda.fingerprint(agenda.sweep.evaluators.gsm8k, "model")


def done(task):
    task.write(Record("done", task.argv, task.fingerprint))
    for path in task.results:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_names_of_models_do_not_depend_on_which_cells_are_asked_for(make):
    agenda = make({"model_name_or_path": ["one", "two"], "finetuning_type": ["full", "lora"]})
    assert agenda.groups == {"one": "adapters.1", "two": "adapters.2"}
    agenda = make({"model_name_or_path": ["one", "two"]})
    (task,) = agenda.base_tasks(agenda.cells[1:])
    assert task.name == "base.2"
    assert task.argv[task.argv.index("--model") + 1] == "two"


def test_a_score_belongs_to_its_model(make):
    agenda = make({"model_name_or_path": ["one", "two"]})
    done(agenda.base_tasks(agenda.cells)[0])
    changed = make({"model_name_or_path": ["three", "one"]})
    assert [task.record().state for task in changed.base_tasks(changed.cells)] == ["to do", "to do"]


@pytest.mark.parametrize("step", ["score", "pairs"])
def test_a_score_belongs_to_the_content_of_its_problems_or_pairs(step, make, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"test": {"file_name": "test.jsonl"}}))
    (tmp_path / "test.jsonl").write_text("{}")

    def task():
        agenda = make({"seed": [1]}, data=str(tmp_path / "test.jsonl"))
        return next(task for task in agenda.cell_tasks(agenda.cells[0]) if task.step == step)

    done(task())
    assert task().record().state == "done"
    (tmp_path / "test.jsonl").write_text("{}{}")
    assert task().record().state == "to do"


def test_a_loss_file_or_a_model_that_has_changed_is_refused(make, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "model/tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "loss.py").write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("of_a_sweep")\n'
        "def of_a_sweep(pairs, *, beta: float):\n"
        '    """Mine."""\n'
    )
    names = {"model_name_or_path": str(tmp_path / "model"), "pref_loss_file": str(tmp_path / "loss.py")}
    names["pref_loss"] = "of_a_sweep"
    agenda = make({"seed": [1, 2]}, **names)
    write_sweep(agenda, Path("sweep.yaml"))
    done(agenda.train_task(agenda.cells[0]))
    write_sweep(agenda, Path("sweep.yaml"))
    for changed, named in (("loss.py", "loss.py"), ("model/config.json", "model"), ("model/tokenizer.json", "model")):
        written = (tmp_path / changed).read_text()
        (tmp_path / changed).write_text(written + "\n")
        with pytest.raises(UserError, match=f"{named}' has changed since cells in .* were trained with it"):
            write_sweep(make({"seed": [1, 2, 3]}, **names), Path("sweep.yaml"))
        (tmp_path / changed).write_text(written)
    write_sweep(make({"seed": [1, 2, 3]}, **names), Path("sweep.yaml"))


def test_a_score_belongs_to_the_content_of_its_prompt(make, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question}")

    def task():
        agenda = make({"seed": [1]}, options={"prompt": str(prompt), "max_tokens": 8})
        return agenda.cell_tasks(agenda.cells[0])[1]

    done(task())
    assert task().record().state == "done"
    prompt.write_text("Q: {question}")
    assert task().record().state == "to do"


def test_an_empty_option_names_no_files(make, tmp_path, monkeypatch):
    """An empty path is the working directory, where the sweep itself writes: no score would ever belong to it."""
    monkeypatch.chdir(tmp_path)
    found = []
    for content in ("one", "two"):
        (tmp_path / "log.txt").write_text(content)
        found.append(score_fingerprint(make({"seed": [1]}, options={"system": ""})))
    assert found[0] == found[1]


@pytest.mark.parametrize("entry", [None, 3, "pairs.jsonl", [], {}, {"file_name": None}, {"file_name": "gone.jsonl"}])
def test_an_odd_entry_of_a_data_set_has_no_content(entry, make, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
    write_sweep(make({"seed": [1]}), Path("sweep.yaml"))
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["data"] == {}


def test_a_folder_of_data_is_all_its_files(make, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs"}}))
    found = set()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / name).write_text("{}")
        write_sweep(make({"seed": [1]}), Path("sweep.yaml"))
        found.add(json.loads((tmp_path / "out" / "sweep.json").read_text())["data"]["pairs"])
    assert len(found) == 2


def test_only_adapters_without_scores_are_asked(make):
    agenda = make({"seed": [1, 2]}, finetuning_type="lora")
    (task,) = agenda.adapter_tasks(agenda.cells[:1])
    assert [word for word in task.argv if word.startswith("seed")] == [f"seed1={agenda.cells[0].model}"]
    done(task)
    assert agenda.adapter_tasks(agenda.cells[:1])[0].record().state == "done"
    (task,) = agenda.adapter_tasks(agenda.cells)
    assert task.record().state == "to do"
    assert [word for word in task.argv if word.startswith("seed")] == [f"seed2={agenda.cells[1].model}"]
    assert "--skip-base" in task.argv


def test_options_of_the_evaluation_as_words(make):
    """YAML's true is a flag, its false none; a number stays a number, also 1."""
    options = {"limit": 1, "top-p": 0.5, "trust_remote_code": True, "verbose": False, "system": "", "dtype": "true"}
    agenda = make({"seed": [1]}, options=options)
    (words,) = [task.argv for task in agenda.cell_tasks(agenda.cells[0]) if task.step == "score"]
    after = words[words.index("--output") + 2 :]
    assert after == ("--limit=1", "--top-p=0.5", "--trust-remote-code", "--system=", "--dtype=true")


def test_arguments_of_the_chat_template_reach_the_evaluation_as_json(make):
    """Written in YAML, read by the evaluation's own command line; other arguments are other scores."""
    text = "chat_template_kwargs: {enable_thinking: false, level: 2, language: 'it''s', none: null, parts: [a, {b: c}]}"
    options = yaml.safe_load(text)
    agenda = make({"seed": [1]}, options=options)
    (words,) = [task.argv for task in agenda.cell_tasks(agenda.cells[0]) if task.step == "score"]
    (word,) = [word for word in words if word.startswith("--chat-template-kwargs=")]
    assert parse_chat_template_kwargs(word.partition("=")[2]) == options["chat_template_kwargs"]
    other = make({"seed": [1]}, options={"chat_template_kwargs": {"enable_thinking": True}})
    assert score_fingerprint(other) != score_fingerprint(agenda)


def test_training_a_cell_anew_spoils_what_was_made_of_it(make):
    agenda = make({"seed": [1]}, finetuning_type="lora")
    (cell,) = agenda.cells
    spoils = {str(path.relative_to(agenda.sweep.output)) for path in agenda.train_task(cell).invalidates}
    assert spoils == {
        "cells/seed1/scores",
        "cells/seed1/pairs.jsonl",
        "cells/seed1/.pairs.jsonl.unfinished",
        "cells/seed1/lm_eval",
        "cells/seed1/answers",
        "cells/seed1/judge",
        "adapters/scores/seed1",
        "adapters/lm_eval/seed1",
        "adapters/answers/seed1",
    }


def test_losses_without_reference_have_no_held_out_margins(make):
    agenda = make({"pref_loss": ["sigmoid", "orpo"]})
    steps = [[task.step for task in agenda.cell_tasks(cell)] for cell in agenda.cells]
    assert steps == [["train", "score", "pairs"], ["train", "score"]]
    assert "max_samples=null" in agenda.cell_tasks(agenda.cells[0])[2].argv


def test_another_recipe_for_any_trained_cell_is_refused(make):
    agenda = make({"seed": [1, 2]})
    write_recipes(agenda, agenda.cells)
    done(agenda.train_task(agenda.cells[0]))
    changed = make({"seed": [1, 2]}, learning_rate=0.5)
    with pytest.raises(UserError, match="was trained with another `learning_rate`"):
        write_recipes(changed, changed.cells[1:])
    moved = make({"seed": [1, 2]})
    write_recipes(moved, moved.cells)  # the same is not refused


def test_other_data_are_refused(make, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.jsonl"}}))
    (tmp_path / "pairs.jsonl").write_text("{}")
    agenda = make({"seed": [1]})
    write_sweep(agenda, Path("sweep.yaml"))
    (tmp_path / "pairs.jsonl").write_text("{}{}")
    write_sweep(agenda, Path("sweep.yaml"))  # nothing is trained yet
    done(agenda.train_task(agenda.cells[0]))
    (tmp_path / "pairs.jsonl").write_text("{}{}{}")
    with pytest.raises(UserError, match="the data set 'pairs' has changed since"):
        write_sweep(agenda, Path("sweep.yaml"))


def test_progress_of_a_training_that_begins_its_log_anew(make):
    agenda = make({"seed": [1]})
    task = agenda.train_task(agenda.cells[0])
    log = agenda.cells[0].model / "trainer_log.jsonl"
    watcher = Watcher(task)
    assert (watcher.look().done, watcher.look().total) == (0, None)
    log.parent.mkdir(parents=True)
    lines = [json.dumps({"current_steps": step, "total_steps": 9, "loss": 0.5}) + "\n" for step in (1, 2, 3)]
    log.write_text("".join(lines) + '{"current_st')
    assert (watcher.look().done, watcher.look().total, watcher.look().status) == (3, 9, "loss 0.500")
    log.write_text(lines[0])
    assert watcher.look().done == 1
    log.write_text("x" * 200 + "\n")
    assert watcher.look().done == 1


# --- several evaluators ----------------------------------------------------------------------------------------------


def everything(tmp_path, baseline, **judge):
    """All evaluators, with a file of questions."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("{}")
    judged = {"data": questions, "judge": "gpt", "baseline": baseline, "engine": "hf", **judge}
    return {"lm_eval": {"tasks": ["arc_easy:5", "own"], "engine": "hf"}, "judge": judged}


def test_every_evaluator_is_a_command_with_a_folder_of_its_own(make, tmp_path):
    agenda = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=everything(tmp_path, "sigmoid"))
    tasks = {task.step: task for task in agenda.cell_tasks(agenda.cells[1])}
    assert list(tasks) == ["train", "score", "lm_eval", "answers", "pairs"]
    words = tasks["lm_eval"].argv
    assert words[words.index("--tasks") + 1] == "arc_easy:5,own"
    assert [
        task.results[0].relative_to(agenda.cells[1].folder).as_posix() for task in tasks.values() if task.results
    ] == [
        "scores/base/results.json",
        "lm_eval/base/results.json",
        "answers/base/answers.jsonl",
        "pairs.jsonl",
    ]
    assert [(task.name, task.step) for task in agenda.base_tasks(agenda.cells)] == [
        ("base", "score"),
        ("base", "lm_eval"),
    ]


def answer(agenda, *names):
    for cell in agenda.cells:
        if cell.name in names:
            done(agenda.train_task(cell))
            done(next(task for task in agenda.cell_tasks(cell) if task.step == "answers"))


def test_a_cell_is_judged_when_its_baseline_has_answered_too(make, tmp_path):
    agenda = make({"pref_loss": ["sigmoid", "minor_dpo", "dpop"]}, evaluators=everything(tmp_path, "sigmoid"))
    answer(agenda, "minor_dpo", "dpop")
    assert agenda.judge_tasks(agenda.cells) == []
    answer(agenda, "sigmoid")
    tasks = agenda.judge_tasks(agenda.cells)
    assert [task.name for task in tasks] == ["minor_dpo", "dpop"]
    words = tasks[0].argv
    ours, theirs = (words[words.index(name) + 1] for name in ("--a", "--b"))
    assert (ours, theirs) == tuple(
        str(tmp_path / "out/cells" / name / "answers/base") for name in ("minor_dpo", "sigmoid")
    )
    assert words[words.index("--names") + 1] == "minor_dpo,sigmoid"
    done(tasks[0])
    again = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=everything(tmp_path, "sigmoid", judge="other"))
    assert agenda.judge_tasks(agenda.cells)[0].record().state == "done"
    assert again.judge_tasks(again.cells)[0].record().state == "to do"


def test_training_a_baseline_anew_spoils_the_verdicts_against_it(make, tmp_path):
    agenda = make({"pref_loss": ["sigmoid", "minor_dpo", "dpop"]}, evaluators=everything(tmp_path, "sigmoid"))
    spoils = {cell.name: set(agenda.train_task(cell).invalidates) for cell in agenda.cells}
    judged = {name: tmp_path / "out/cells" / name / "judge" for name in ("sigmoid", "minor_dpo", "dpop")}
    assert spoils["sigmoid"] >= {judged["minor_dpo"], judged["dpop"]}
    assert judged["minor_dpo"] in spoils["minor_dpo"]
    assert judged["dpop"] not in spoils["minor_dpo"]


def test_a_baseline_by_loss_has_the_same_seed_and_size(make, tmp_path):
    axes = [
        {"pref_loss": "sigmoid", "seed": [1, 2]},
        {"pref_loss": "ipo", "ipo_length_normalize": False, "seed": [1, 2]},
        {"pref_loss": ["sr_dpo", "sr_ipo"], "sr_lambda": 0.3, "seed": [1, 2, 3]},
        {"pref_loss": "sigmoid", "max_samples": 10, "seed": 1},
        {"pref_loss": "sr_dpo", "sr_lambda": 0.3, "max_samples": 10, "seed": 1},
    ]
    agenda = make(axes, evaluators=everything(tmp_path, {"sr_dpo": "sigmoid", "sr_ipo": "ipo"}))
    answer(agenda, *(cell.name for cell in agenda.cells))
    found = {
        task.name: task.argv[task.argv.index("--names") + 1].split(",")[1] for task in agenda.judge_tasks(agenda.cells)
    }
    assert found == {
        "sr_dpo-sr_lambda0.3-seed1": "sigmoid-seed1",
        "sr_dpo-sr_lambda0.3-seed2": "sigmoid-seed2",
        "sr_ipo-sr_lambda0.3-seed1": "ipo-ipo_length_normalizeFalse-seed1",
        "sr_ipo-sr_lambda0.3-seed2": "ipo-ipo_length_normalizeFalse-seed2",
        "sr_dpo-sr_lambda0.3-max_samples10-seed1": "sigmoid-max_samples10-seed1",
    }


def test_adapters_are_asked_together_and_judged_one_by_one(make, tmp_path):
    evaluators = everything(tmp_path, "base", base=True)
    agenda = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=evaluators, finetuning_type="lora")
    assert [task.step for task in agenda.cell_tasks(agenda.cells[0])] == ["train", "pairs"]
    for cell in agenda.cells:
        done(agenda.train_task(cell))
    tasks = agenda.adapter_tasks(agenda.cells)
    assert [(task.name, task.step) for task in tasks] == [
        ("adapters", step) for step in ("score", "lm_eval", "answers")
    ]
    done(tasks[2])
    judged = agenda.judge_tasks(agenda.cells)
    places = [[word for word in task.argv if "/adapters/answers/" in word] for task in judged]
    folder = tmp_path / "out" / "adapters" / "answers"
    assert places == [
        [str(folder / "sigmoid"), str(folder / "base")],
        [str(folder / "minor_dpo"), str(folder / "base")],
    ]


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        ("dpo", "the judge's baseline 'dpo' is no cell: write `base`, one of sigmoid, minor_dpo"),
        ("base", "add `base: true` under `judge`"),
        ({"minor_dpo": "ipo"}, "'ipo' is not another loss of the sweep: sigmoid, minor_dpo"),
        ({"sigmoid": "sigmoid"}, "'sigmoid' is not another loss"),
    ],
)
def test_a_baseline_that_is_not_there_is_refused(baseline, words, make, tmp_path):
    agenda = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=everything(tmp_path, baseline))
    with pytest.raises(UserError, match=r".") as error:
        check_baselines(agenda.sweep.evaluators.judge, agenda.cells)
    assert words in str(error.value)


def test_no_cell_of_the_same_settings_to_compare_with_is_refused(make, tmp_path):
    axes = [{"pref_loss": "sigmoid", "seed": 1}, {"pref_loss": "minor_dpo", "seed": 2}]
    agenda = make(axes, evaluators=everything(tmp_path, {"minor_dpo": "sigmoid"}))
    with pytest.raises(UserError, match="no cell of minor_dpo has one of sigmoid with the same settings and seed"):
        check_baselines(agenda.sweep.evaluators.judge, agenda.cells)


def test_verdicts_belong_to_the_answers_that_they_compare(make, tmp_path):
    """Asking a baseline anew spoils the verdicts against it; until then, nothing is judged by its old answers."""
    evaluators = everything(tmp_path, "sigmoid")
    agenda = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=evaluators)
    answer(agenda, "sigmoid", "minor_dpo")
    done(agenda.judge_tasks(agenda.cells)[0])
    evaluators["judge"] |= {"options": {"max_tokens": 12}}
    changed = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=evaluators)
    answer(changed, "minor_dpo")  # as `--only minor_dpo` does
    assert changed.judge_tasks(changed.cells) == []
    spoils = {cell.name: next(t for t in changed.cell_tasks(cell) if t.step == "answers") for cell in changed.cells}
    verdicts = tmp_path / "out" / "cells" / "minor_dpo" / "judge"
    assert {name for name, task in spoils.items() if verdicts in task.invalidates} == {"sigmoid", "minor_dpo"}
    answer(changed, "sigmoid")
    assert [task.name for task in changed.judge_tasks(changed.cells)] == ["minor_dpo"]


def test_verdicts_belong_to_the_content_of_the_judges_prompt_not_to_its_address(make, tmp_path):
    prompt = tmp_path / "judge.txt"
    found = {}
    for name, text, options in (
        ("first", "one", {"concurrency": 4}),
        ("address", "one", {"concurrency": 8}),
        ("prompt", "two", {"concurrency": 4}),
    ):
        prompt.write_text(text)
        evaluators = everything(tmp_path, "sigmoid", judge_options={"prompt": str(prompt), **options}, base_url=name)
        agenda = make({"pref_loss": ["sigmoid", "minor_dpo"]}, evaluators=evaluators)
        found[name] = agenda.judge_task(agenda.cells[1]).fingerprint
    assert found["first"] == found["address"]
    assert found["first"] != found["prompt"]


def test_training_anew_spoils_the_scores_of_evaluators_that_the_file_has_lost(make, tmp_path):
    agenda = make({"seed": [1]}, evaluators={"gsm8k": None, "pairs": None}, finetuning_type="lora")
    spoils = {str(path.relative_to(tmp_path / "out")) for path in agenda.train_task(agenda.cells[0]).invalidates}
    assert {
        "adapters/scores/seed1",
        "adapters/lm_eval/seed1",
        "cells/seed1/answers",
        "cells/seed1/pairs.jsonl",
    } <= spoils


def test_other_columns_of_the_same_file_are_refused(make, tmp_path):
    entry = {"file_name": "pairs.jsonl", "columns": {"chosen": "chosen", "rejected": "rejected"}}
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": entry, "test": entry}))
    agenda = make({"seed": [1]})
    write_sweep(agenda, Path("sweep.yaml"))
    done(agenda.train_task(agenda.cells[0]))
    before = next(task for task in agenda.cell_tasks(agenda.cells[0]) if task.step == "pairs").fingerprint
    entry["columns"] = {"chosen": "rejected", "rejected": "chosen"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": entry, "test": entry}))
    changed = make({"seed": [1]})
    assert next(t for t in changed.cell_tasks(changed.cells[0]) if t.step == "pairs").fingerprint != before
    with pytest.raises(UserError, match=r"the entry in dataset_info\.json of the data set 'pairs' has changed since"):
        write_sweep(changed, Path("sweep.yaml"))


def test_the_data_of_ones_own_benchmarks_counts(make, tmp_path):
    tasks, data = tmp_path / "tasks", tmp_path / "sums.jsonl"
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(
        f"task: sums\ndataset_kwargs: {{data_files: {{test: {data}}}}}\nf: !function u.f\n"
    )

    def fingerprint():
        agenda = make({"seed": [1]}, evaluators={"lm_eval": {"tasks": "sums", "engine": "hf", "include_path": tasks}})
        return agenda.fingerprint(agenda.sweep.evaluators.lm_eval, "model")

    found = []
    for text in ("{}", "{}{}", "{}{}"):
        data.write_text(text)
        found.append(fingerprint())
        (tasks / "__pycache__").mkdir(exist_ok=True)
        (tasks / "__pycache__" / "u.pyc").write_text(text + "made by Python")
    assert found[0] != found[1] == found[2]


def test_long_options_are_no_paths(make):
    words = "be brief. " * 100
    agenda = make({"seed": [1]}, options={"system": words})
    assert score_fingerprint(agenda) != score_fingerprint(make({"seed": [1]}, options={"system": "be brief."}))


def test_a_name_is_no_longer_than_a_files_may_be(make):
    (cell,) = make({"default_system": ["请用中文简短地回答每一个问题" * 30]}).cells
    assert len(cell.name.encode()) <= 200


def test_verdicts_on_adapters_that_are_not_asked_again_stay(make, tmp_path):
    agenda = make({"seed": [1, 2]}, evaluators=everything(tmp_path, "base", base=True), finetuning_type="lora")
    for cell in agenda.cells:
        done(agenda.train_task(cell))
    done(agenda.adapter_tasks(agenda.cells[:1])[2])
    again = agenda.adapter_tasks(agenda.cells)[2]
    assert again.record().state == "to do"
    assert again.invalidates == (agenda.cells[1].folder / "judge",)
