"""Tasks of lm-evaluation-harness: which are asked for, their data and metrics, and what a model reaches in them."""

from __future__ import annotations

import difflib
import glob
import importlib.metadata
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import hashes
from ..errors import UserError, in_a_line
from .harness_results import interval_95

TESTED = "0.4.13"  # of lm_eval; earlier releases load tasks in another way
NAMED = {
    # The shots of arXiv 2405.21040, Table 3. The leaderboard read GSM8K's answers after `####`, as strict-match does.
    "open_llm_leaderboard": (
        "arc_challenge:25:acc_norm,hellaswag:10:acc_norm,mmlu:5:acc,truthfulqa_mc2:0:mc2,winogrande:5:acc,"
        "gsm8k:5:exact_match:strict-match"
    )
}
SHOWN_AS = {("truthfulqa_mc1", "acc"): "mc1", ("truthfulqa_mc2", "acc"): "mc2"}  # lm_eval's name -> the papers'
# What decides, beside the prompts, on a reply and its score. Not where the data is: its content counts.
SCORING = ("output_type", "process_results", "metric_list", "filter_list", "generation_kwargs", "repeats")


@dataclass(frozen=True)
class Wanted:
    """A task that is asked for; None leaves it to the task's definition.

    Args:
        task: its name, or that of a group.
        shots: solved examples in the prompt.
        metric, filter: which number is reported, of which reading of the reply.
    """

    task: str
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A task with its data.

    Args:
        name: of the task or group.
        parts: lm_eval's tasks by name: one, or those of a group.
        is_group: whether ids of examples start with the part's name.
        metric, filter: lm_eval's names.
        shots: None if the parts differ in it.
        version: of the definition.
        scoring: fingerprint of how replies are made and scored.
    """

    name: str
    parts: Mapping[str, Any]
    is_group: bool
    metric: str
    filter: str
    shots: int | None
    version: str | float | None
    scoring: str


def parse_tasks(words: str) -> list[Wanted]:
    """The tasks of --tasks: comma-separated NAME, NAME:SHOTS, NAME:SHOTS:METRIC or NAME:SHOTS:METRIC:FILTER.

    Raises:
        UserError: if a word has another form, or a task is named twice.
    """
    wanted = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        wanted += [_parse(each) for each in NAMED.get(word, word).split(",")]
    if not wanted:
        raise UserError(f"--tasks is empty: write names of tasks, or {', '.join(NAMED)}.")
    names = [each.task for each in wanted]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks has {twice[0]} twice: name each task once.")
    return wanted


def _parse(word: str) -> Wanted:
    name, *rest = word.split(":")
    shots, metric, chosen, *more = [*rest, "", "", ""]
    if not name or any(more) or (shots and not (shots.isascii() and shots.isdigit())):
        raise UserError(f"--tasks {word}: write NAME, NAME:SHOTS, NAME:SHOTS:METRIC or NAME:SHOTS:METRIC:FILTER.")
    if "/" in name or name.endswith((".yaml", ".yml")):
        raise UserError(f"--tasks {word}: write the task's name, and name the folder of its file with --include-path.")
    return Wanted(name, int(shots) if shots else None, metric or None, chosen or None)


# --- definitions and data --------------------------------------------------------------------------------------------


def check_lm_eval() -> None:
    """Refuse an environment without lm_eval, or with an earlier release than the tested one.

    Raises:
        UserError: says what to install.
    """
    from packaging.version import Version

    remedy = f"run `make eval-env`, or `pip install lm_eval=={TESTED}` here"
    try:
        import lm_eval  # noqa: F401

        found = importlib.metadata.version("lm_eval")
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be imported ({in_a_line(error)}): {remedy}.") from error
    if Version(found) < Version(TESTED):
        raise UserError(f"lm_eval {found} is older than {TESTED}: {remedy}.")


def find_tasks(wanted: Iterable[Wanted], include: Path | None) -> Any:
    """lm_eval's `TaskManager` that knows the tasks. If a folder of one's own has them all, only that one is read:
    lm_eval's own 14,000 definitions take a quarter of a minute.

    Raises:
        UserError: if a task is unknown.
    """
    from lm_eval.tasks import TaskManager

    names = [each.task for each in wanted]
    manager = None
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include} is not a folder: name the folder of your own tasks' YAML files.")
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if not all(name in manager.task_index and _is_closed(manager, name) for name in names):
            manager = TaskManager(include_path=str(include))
    manager = manager or TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise UserError(_unknown(name, manager.all_tasks, include))
        if manager.task_index[name].kind.name == "TAG":
            members = ",".join(sorted(manager.task_index[name].tags))
            raise UserError(f"{name} stands for several tasks without a common score: write --tasks {members}.")
    return manager


def _is_closed(manager: Any, name: str) -> bool:
    """Whether a task's definition names no tasks that the manager does not know."""
    definition = manager.task_index[name].cfg or {}
    members = definition.get("task")
    return not isinstance(members, list) or all(
        isinstance(each, str) and each in manager.task_index and _is_closed(manager, each) for each in members
    )


def _unknown(name: str, known: list[str], include: Path | None) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    advice = f"write {' or '.join(close)}" if close else "see `lm_eval ls tasks` for the names"
    where = f", which {include} does not define either" if include else ""
    return f"--tasks {name} is not a task of lm_eval {importlib.metadata.version('lm_eval')}{where}: {advice}."


def load_task(manager: Any, wanted: Wanted, shots: int | None, seed: int) -> Loaded:
    """A task with its data, which is downloaded if it is on the hub.

    Args:
        manager: from `find_tasks`.
        wanted: the task.
        shots: if it names none.
        seed: for definitions that draw, such as the order of choices.

    Raises:
        UserError: if it cannot be loaded, or has no such metric or number of shots.
    """
    set_seeds(seed)
    try:
        found = manager.load([wanted.task])
    except Exception as error:
        raise UserError(
            f"The task {wanted.task} cannot be loaded ({in_a_line(error)}): correct its definition or data, or "
            "leave it out."
        ) from error
    parts, group = found["tasks"], found.get("groups", {}).get(wanted.task)
    for name, part in parts.items():
        if getattr(part, "UNSAFE_CODE", False) or getattr(part, "MULTIMODAL", False):
            raise UserError(f"{name} runs code of the model's, or shows images: score it with `lm_eval` itself.")
        _set_shots(name, part, wanted, shots)
        _try_prompt(name, part, wanted)
    metric = _metric(wanted, parts, group)
    used = {part.get_config("num_fewshot") for part in parts.values()}
    return Loaded(
        name=wanted.task,
        parts=parts,
        is_group=group is not None,
        metric=metric,
        filter=_filter(wanted, parts),
        shots=used.pop() if len(used) == 1 else None,
        version=group.version if group else next(iter(parts.values())).VERSION,
        scoring=_scoring(parts),
    )


def _set_shots(name: str, task: Any, wanted: Wanted, shots: int | None) -> None:
    """Set the number of shots, but leave a task whose definition says 0 at it, as lm_eval does."""
    defined = task.get_config("num_fewshot")
    if defined == 0 and wanted.shots:
        raise UserError(f"{name} is defined without shots, so {wanted.shots} are not possible: write {wanted.task}:0.")
    number = shots if wanted.shots is None else wanted.shots
    if defined != 0 and (number is not None or defined is None):
        task.set_config(key="num_fewshot", value=number or 0)


def _try_prompt(name: str, task: Any, wanted: Wanted) -> None:
    """Make the first example's prompt, which fails where there are too few solved examples."""
    number = task.get_config("num_fewshot")
    task.set_fewshot_seed(0)
    try:
        _, first = next(iter(task.doc_iterator(limit=1)))
        task.fewshot_context(first, num_fewshot=number)
    except Exception as error:
        raise UserError(
            f"{name} cannot be asked with {number} shots ({in_a_line(error)}): correct its data, or write "
            f"{wanted.task}:0."
        ) from error


def _metric(wanted: Wanted, parts: Mapping[str, Any], group: Any) -> str:
    """lm_eval's name of the metric: the one that is asked for, or the first that the definition names."""
    from lm_eval.api.metrics import mean

    if group:
        weighted = {each.metric: each.weight_by_size for each in group.aggregate_metric_list or []}
        if not any(weighted.values()):
            raise UserError(
                f"{wanted.task} has no score over all of its examples: name its tasks, such as {next(iter(parts))}."
            )
        offered = [metric for metric, by_size in weighted.items() if by_size]
    else:
        offered = list(next(iter(parts.values())).aggregation())
    offered = [metric for metric in offered if all(part.aggregation().get(metric) is mean for part in parts.values())]
    if not offered:
        raise UserError(f"{wanted.task} has no metric that is a mean over examples: choose another task.")
    by_name = {shown_as(wanted.task, metric): metric for metric in offered} | {metric: metric for metric in offered}
    if wanted.metric is None:
        return str(offered[0])
    if wanted.metric not in by_name:
        raise UserError(f"{wanted.task} has no metric {wanted.metric} per example: write one of {', '.join(by_name)}.")
    return str(by_name[wanted.metric])


def _filter(wanted: Wanted, parts: Mapping[str, Any]) -> str:
    """Which reading of the replies counts: the one that is asked for, or the first of the definition."""
    offered = [[each["name"] for each in part.config.filter_list or [{"name": "none"}]] for part in parts.values()]
    shared = [name for name in offered[0] if all(name in names for names in offered)]
    if not shared or (wanted.filter and wanted.filter not in shared):
        raise UserError(
            f"{wanted.task} has no filter {wanted.filter or 'in all of its tasks'}: write one of "
            f"{', '.join(shared or offered[0])}, or name its tasks."
        )
    return wanted.filter or shared[0]


def shown_as(task: str, metric: str) -> str:
    """The name of a metric in results: lm_eval's, but for TruthfulQA those of the literature."""
    return SHOWN_AS.get((task, metric), metric)


def _scoring(parts: Mapping[str, Any]) -> str:
    definitions = {name: part.dump_config() for name, part in parts.items()}
    kept = {name: {key: each.get(key) for key in SCORING} for name, each in definitions.items()}
    # A function without source is shown with its address, which is another in each process.
    return hashes.of_value(re.sub(r" at 0x[0-9a-f]+", "", repr(kept)))


def own_files(manager: Any, include: Path | None) -> str | None:
    """Fingerprint of a folder of tasks, and of the local data that its definitions name."""
    if include is None:
        return None
    own = [entry.cfg for entry in manager.task_index.values() if entry.yaml_path and include in entry.yaml_path.parents]
    texts = {text for each in own for text in _texts((each or {}).get("dataset_kwargs"))}
    named = sorted({path for text in texts for path in glob.glob(text, recursive=True)})  # files, folders, patterns
    data = [hashes.of_data(Path(path)) for path in named]
    return hashes.of_value([hashes.of_model(include, ["**/*yaml", "**/*.py"]), sorted(data)])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


# --- scores ----------------------------------------------------------------------------------------------------------


def set_seeds(seed: int) -> None:
    """Seed everything that lm_eval and its tasks draw with."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def score_task(model: Any, task: Loaded, limit: int | None, seed: int) -> dict[str, Any]:
    """What a model reaches in a task, and the metric of each example.

    Args:
        model: an `LM` of lm_eval.
        task: with its data.
        limit: examples of each of its parts, from the first.
        seed: of the choice of shots.

    Raises:
        UserError: if lm_eval fails.
    """
    from lm_eval.evaluator import evaluate

    set_seeds(seed)
    for part in task.parts.values():
        part.set_fewshot_seed(seed)
    try:
        found = evaluate(lm=model, task_dict={"tasks": dict(task.parts)}, limit=limit, bootstrap_iters=0)
    except Exception as error:
        raise UserError(
            f"lm_eval failed in {task.name} ({in_a_line(error)}): correct the task, its shots or --max-model-len; "
            "finished tasks are saved, run the same command to resume."
        ) from error
    values, asked = {}, []
    for part, samples in sorted(found["samples"].items()):
        for sample in samples:
            if sample["filter"] == task.filter and task.metric in sample:
                example = f"{part}:{sample['doc_id']}" if task.is_group else str(sample["doc_id"])
                values[example] = float(sample[task.metric])
                texts = [[each for each in words if isinstance(each, str)] for words in sample["arguments"]]
                asked.append([example, sample["doc_hash"], sample["target_hash"], texts])
    # Not a number are shares of probabilities that are all zero: the model prefers no answer, so it is wrong.
    counted = {example: value if math.isfinite(value) else 0.0 for example, value in values.items()}
    summary = {
        "metric": shown_as(task.name, task.metric),
        "value": fmean(counted.values()),
        "interval_95": interval_95(list(counted.values())),
        "examples": len(counted),
        "shots": task.shots,
        "version": task.version,
        "hash": hashes.of_value([task.metric, task.filter, task.scoring, asked]),
        "filter": task.filter,
        "undefined": sum(not math.isfinite(value) for value in values.values()),
    }
    return {"summary": summary, "rows": [{"id": example, "value": value} for example, value in counted.items()]}
