"""Folders of sweeps as their commands leave them, without a training."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from llamafactory_ext.sweep.files import write_recipes, write_sweep
from llamafactory_ext.sweep.records import Record
from llamafactory_ext.sweep.spec import Sweep
from llamafactory_ext.sweep.tasks import Agenda

RECIPE = {"stage": "dpo", "model_name_or_path": "model", "finetuning_type": "full", "dataset": "pairs"}
LOSS_FILE = """
from llamafactory_ext import register_loss

@register_loss("margin_with_a_floor")
def margin_with_a_floor(pairs, *, beta, tau=1.0, floor=0.0):
    return -(beta * pairs.margin).clamp(min=floor) / tau
"""


def make_sweep(folder, axes, recipe=RECIPE, **evaluators):
    gsm8k = {"data": "openai/gsm8k", "engine": "hf", "script": folder / "gsm8k.py"}
    sweep = Sweep(recipe=recipe, axes=axes, output=folder / "out", evaluators={"gsm8k": gsm8k, **evaluators})
    agenda = Agenda(sweep, sweep.cells())
    write_recipes(agenda, agenda.cells)
    write_sweep(agenda, Path("sweep.yaml"))
    return sweep


def tasks_of(sweep):
    """Name and step -> the sweep's own task."""
    agenda = Agenda(sweep, sweep.cells())
    return {(task.name, task.step): task for chain in agenda.chains(agenda.cells) for task in chain}


def record(sweep, name, step, how, tasks=None):
    """Write a record of the sweep's own task."""
    task = (tasks or tasks_of(sweep))[name, step]
    task.write(replace(how, command=task.argv, fingerprint=task.fingerprint))


def write_logs(cell, logs):
    cell.model.mkdir()
    (cell.model / "trainer_state.json").write_text(json.dumps({"log_history": logs}))


def train(sweep, cell, value=1.0, metrics=("normalized_rewards/chosen", "normalized_rewards/rejected"), tasks=None):
    logs = [{"step": step, **dict.fromkeys(metrics, value * step), "monitor/degenerating": 1.0} for step in (1, 2, 3)]
    for log in logs:
        if metrics:
            log["normalized_rewards/margins"] = log[metrics[0]] - log[metrics[1]] / 2
    write_logs(cell, logs)
    record(sweep, cell.name, "train", Record("done", seconds=90.0), tasks)


def score(sweep, name, right, problems=10, sha256="of the problems", tasks=None):
    """Scores of a model that solves these of the problems: so many from the first on, or those of a set."""
    solved = set(range(right)) if isinstance(right, int) else right
    summary = {"accuracy": len(solved) / problems, "wilson_95": [0.1, 0.9]}
    rows = [{"index": index, "strict": {"correct": index in solved}} for index in range(problems)]
    result = {
        "summary": {
            "problems": problems,
            "problems_sha256": sha256,
            "missing": 0,
            "strict": summary,
            "flexible": summary,
            "degeneration": {"degenerate": 0.3, "cut_off": 0.1},
        },
        "rows": rows,
    }
    folder = sweep.output / name if name == "base" else sweep.output / "cells" / name
    (folder / "scores" / "base").mkdir(parents=True)
    (folder / "scores" / "base" / "results.json").write_text(json.dumps(result))
    record(sweep, name, "score", Record("done", seconds=9.0), tasks)


def score_pairs(sweep, cell, margins, tasks=None, **columns):
    """Scores of held-out pairs with these margins, and more columns of numbers; the pair after them was skipped."""
    rows = [{"index": n, "skipped": False, "margin": float(margin)} for n, margin in enumerate(margins)]
    for name, values in columns.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    rows.append({"index": len(margins), "skipped": True})
    task = (tasks or tasks_of(sweep))[cell.name, "pairs"]
    task.results[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    record(sweep, cell.name, "pairs", Record("done", seconds=5.0), tasks)


def benchmark(sweep, name, tasks, hash="of the task", at=None):
    """Results of `eval harness`: task -> the value of each example; right or wrong, as acc, with five shots."""
    about = {
        task: {"metric": "acc", "value": fmean(values), "interval_95": None, "examples": len(values), "shots": 5}
        | {"version": 1.0, "hash": hash}
        for task, values in tasks.items()
    }
    rows = {task: [{"id": n, "value": v} for n, v in enumerate(values)] for task, values in tasks.items()}
    average = fmean(each["value"] for each in about.values())
    task = (at or tasks_of(sweep))[name, "lm_eval"]
    task.results[0].parent.mkdir(parents=True)
    task.results[0].write_text(json.dumps({"summary": {"tasks": about, "average": average}, "rows": rows}))
    record(sweep, name, "lm_eval", Record("done", seconds=7.0), at)


def judge(sweep, cell, outcomes, against):
    """Verdicts of `eval judge`: a row per turn with `id`, `outcome`, and perhaps `turn` and `category`."""
    counts = {name: sum(row["outcome"] == name for row in outcomes) for name in ("win", "tie", "lose")}
    judged, questions = sum(counts.values()), len({row["id"] for row in outcomes})
    rates = {name: {"count": n, "rate": n / judged, "wilson_95": [0.1, 0.9]} for name, n in counts.items()}
    about = {"a": cell.name, "b": against, "judge": "gpt-4", "questions": questions, "turns": len(outcomes)}
    summary = {**about, "judged": judged, **rates, "sign_test_p": 0.5}
    agenda = Agenda(sweep, sweep.cells())
    for each in agenda.cells:
        answers = each.folder / "answers" / "base"
        answers.mkdir(parents=True, exist_ok=True)
        (answers / "answers.jsonl").touch()
    task = agenda.judge_task(cell)
    task.results[0].parent.mkdir(parents=True)
    task.results[0].write_text(json.dumps({"summary": summary, "rows": outcomes}))
    task.write(Record("done", command=task.argv, fingerprint=task.fingerprint, seconds=3.0))


# --- a large one -----------------------------------------------------------------------------------------------------

PLACES = {"learning_rate": [1e-5, 1e-4], "pref_beta": [0.02, 0.1, 0.2], "seed": [1, 2]}
# What a method's rewards end at, in nats, and how many of 100 problems it solves.
ENDS = {
    "sr_ipo": (-1.5, -12.0, 55),
    "sigmoid": (-8.0, -30.0, 52),
    "minor_dpo": (3.0, -12.0, 66),
    "dpop": (2.0, -10.0, 58),
    "ipo": (-2.0, -14.0, 55),
    "sr_dpo": (-6.0, -25.0, 54),
    "orpo": (None, None, 47),
    "margin_with_a_floor": (-4.0, -22.0, 50),
}


def make_large_sweep(folder):
    """Seven losses, two rates, three betas, two seeds; a loss of the user's own with arguments, which has long names;
    held-out pairs; the first cell failed, and DPO degenerates at the higher rate and lowest beta."""
    (folder / "losses.py").write_text(LOSS_FILE)
    own = {"pref_loss_file": str(folder / "losses.py"), "pref_loss_args": [{"tau": 0.5}, {"tau": 2.0, "floor": -12.5}]}
    axes = [
        {"pref_loss": ["sigmoid", "minor_dpo", "dpop", "ipo", "orpo"], **PLACES},
        {"pref_loss": "sr_dpo", "sr_lambda": [0.1, 0.3], "learning_rate": 1e-5, "pref_beta": 0.1, "seed": [1, 2]},
        {"pref_loss": "margin_with_a_floor", **own, **PLACES},
    ]
    sweep = make_sweep(folder, axes, pairs={"dataset": "held_out_pairs"})
    tasks, chance = tasks_of(sweep), random.Random(0)
    score(sweep, "base", 45, problems=100, tasks=tasks)
    first, *others = sweep.cells()
    record(sweep, first.name, "train", Record("failed", error="torch.OutOfMemoryError: CUDA out of memory"), tasks)
    for cell in others:
        broken = (cell.place["pref_loss"], cell.place["learning_rate"], cell.place["pref_beta"]) == (
            "sigmoid",
            1e-4,
            0.02,
        )
        right = 5 if broken else ENDS[cell.place["pref_loss"]][2] + chance.randint(-6, 6)
        write_logs(cell, list(_logs(cell.place, broken, chance)))
        record(sweep, cell.name, "train", Record("done", seconds=600.0 * chance.random()), tasks)
        score(sweep, cell.name, set(chance.sample(range(100), right)), problems=100, tasks=tasks)
        if cell.has_reference:
            score_pairs(sweep, cell, [chance.gauss(0.8, 2.0) for _ in range(60)], tasks)
    return sweep


def _logs(place, broken, chance):
    chosen, rejected, _ = ENDS[place["pref_loss"]]
    pace = 0.03 / place["pref_beta"] * (1.0 if place["learning_rate"] < 5e-5 else 3.0)
    for step in range(1, 41):
        risen = 1 - math.exp(-step / 12)
        log = {
            "step": step,
            "loss": (8.0 if place["pref_loss"] == "ipo" else 0.69) * (1 - 0.6 * risen) + chance.gauss(0, 0.02),
            "grad_norm": 10 * math.exp(chance.gauss(-risen, 0.3)),
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.4 * risen + chance.gauss(0, 0.05))),
            "monitor/degenerating": float(broken and step > 20),
        }
        if chosen is not None:
            w, l = (end * pace * risen + chance.gauss(0, 0.3) for end in (chosen, rejected))  # noqa: E741
            rewards = {"chosen": w, "rejected": l, "margins": w - l}
            log |= {f"normalized_rewards/{name}": value for name, value in rewards.items()}
        yield log


# --- self-refinement -------------------------------------------------------------------------------------------------

TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
CHOSEN = {"key": "sr_lambda", "of": "lambda.yaml", "by": "margin", "place": {"pref_loss": "sr_dpo"}, "value": 0.3}
MEASURED = {"0.1": 4.31, "0.3": 4.52, "0.5": 4.4, "1": 3.98}


def make_refined_sweep(folder):
    """The Sr paper's losses on two seeds, Sr-DPO on three numbers of pairs; held-out pairs with scores of the data,
    six benchmarks, a judge of two turns and three categories, and a chosen lambda."""
    (folder / "questions.jsonl").write_text("{}\n")
    axes = [
        {"pref_loss": ["sigmoid", "ipo"], "seed": [1, 2]},
        {"pref_loss": ["sr_dpo", "sr_ipo"], "sr_lambda": 0.3, "seed": [1, 2]},
        {"pref_loss": "sigmoid", "max_samples": [256, 512], "seed": 1},
        {"pref_loss": "sr_dpo", "sr_lambda": 0.3, "max_samples": [256, 512], "seed": 1},
    ]
    judged = {"data": folder / "questions.jsonl", "engine": "hf", "judge": "gpt-4"}
    evaluators = {
        "gsm8k": None,
        "pairs": {"dataset": "held_out_pairs"},
        "lm_eval": {"tasks": list(TASKS), "engine": "hf"},
        "judge": judged | {"baseline": {"sr_dpo": "sigmoid", "sr_ipo": "ipo"}},
    }
    sweep = make_sweep(folder, axes, RECIPE | {"learning_rate": 5e-7, "pref_beta": 0.1}, **evaluators)
    other = CHOSEN | {"place": {"pref_loss": "sr_ipo"}, "measured": MEASURED}
    write_sweep(Agenda(sweep, sweep.cells()), Path("sweep.yaml"), [CHOSEN | {"measured": MEASURED}, other])
    tasks, chance = tasks_of(sweep), random.Random(0)
    gaps = [float(chance.randint(0, 4)) for _ in range(60)]
    benchmark(sweep, "base", _examples(0.4, chance), at=tasks)
    names = {
        (cell.place["pref_loss"], cell.place.get("max_samples"), cell.place["seed"]): cell.name
        for cell in sweep.cells()
    }
    for cell in sweep.cells():
        refined = cell.place["pref_loss"].startswith("sr_")
        write_logs(cell, list(_logs(cell.place | {"learning_rate": 1e-5, "pref_beta": 0.1}, False, chance)))
        record(sweep, cell.name, "train", Record("done", seconds=600.0 * (1 + refined)), tasks)
        margins = [0.3 * gap + chance.gauss(0.5 - 0.2 * refined, 1.0) for gap in gaps]
        augmented = [margin + chance.gauss(0.1, 0.2) for margin in margins]
        scores = {"score_chosen": gaps, "score_rejected": [0.0] * 60, "augmented_margin": augmented}
        score_pairs(sweep, cell, margins, tasks, **scores)
        benchmark(sweep, cell.name, _examples(0.5 + 0.05 * refined, chance), at=tasks)
        if refined:
            plain = {"sr_dpo": "sigmoid", "sr_ipo": "ipo"}[cell.place["pref_loss"]]
            judge(sweep, cell, _verdicts(chance), names[plain, *_where(cell)[1:]])
    return sweep


def _where(cell):
    return tuple(cell.place.get(key) for key in ("pref_loss", "max_samples", "seed"))


def _examples(share, chance):
    return {task: [float(chance.random() < share) for _ in range(40)] for task in TASKS}


def _verdicts(chance):
    return [
        {
            "id": str(number),
            "turn": turn,
            "category": ("writing", "math", "roleplay")[number % 3],
            "outcome": chance.choices(["win", "tie", "lose"], [5, 3, 3])[0],
        }
        for number in range(24)
        for turn in (1, 2)
    ]
