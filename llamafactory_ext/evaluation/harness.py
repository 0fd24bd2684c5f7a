"""Score a model on benchmarks: the tasks of lm-evaluation-harness, with confidence intervals and each example's score.

llamafactory-ext eval harness --model /path/to/model --tasks open_llm_leaderboard --output runs/benchmarks

llamafactory-ext eval harness --model /base --adapter dpo=/lora/dpo --tasks winogrande:5,gsm8k:5:exact_match ...

llamafactory-ext eval harness --engine hf --model /path/to/model --include-path my_tasks --tasks my_task --limit 100 ...

A task is NAME, NAME:SHOTS, NAME:SHOTS:METRIC or NAME:SHOTS:METRIC:FILTER. What is left out or empty is as the task
defines it: its first metric, its first filter. `open_llm_leaderboard` stands for the leaderboard's six tasks with its
shots: arc_challenge, hellaswag, mmlu, truthfulqa_mc2, winogrande and gsm8k (strict-match, the number after `####`).
Chat templates are not used, as the leaderboard did not.

Tasks of your own are YAML files in the folder that --include-path names. They may name Python functions (`!function`),
which then run: include only files that you trust. Tasks of lm_eval download their data from the Hugging Face Hub.

Each finished task is saved. If it is interrupted, even by kill -9, rerun the same command to resume.

It needs lm_eval, which is in vLLM's environment (`make eval-env`): there, run `python evaluation/harness.py`. With
`--engine hf`, any environment will do after `pip install lm_eval==0.4.13`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from filelock import FileLock

from ..commandline import Command
from ..errors import UserError
from ..resuming import take
from ..whole_files import write_whole
from .engines import Sampling, Settings, package_versions
from .generations import MANIFEST, claim
from .harness_models import check_engine, load
from .harness_results import RESULTS
from .harness_tasks import Loaded, Wanted, check_lm_eval, find_tasks, load_task, own_files, parse_tasks, score_task
from .models import BASE, Dtype, EngineName, folder_hashes, local_model, parse_adapters
from .options import with_options, written_to
from .vllm_engine import vllm_version

TASKS = "tasks"  # the folder of finished tasks in that of a run

Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class HarnessEngine(StrEnum):
    """Values of --engine."""

    vllm = "vllm"
    hf = "hf"


@dataclass(frozen=True)
class HarnessOptions:
    """Which models are asked, with which engine, and how much."""

    model: Annotated[str, Opt(help="A model folder or a name on the Hub.")] = ""
    engine: Annotated[HarnessEngine, Opt(help="vLLM, or transformers.")] = HarnessEngine.vllm
    adapter: Annotated[list[str] | None, Opt(help="NAME=DIR of a LoRA adapter; may be repeated.")] = None
    skip_base: Annotated[bool, Opt("--skip-base", help="Ask only the adapters.")] = False
    shots: Annotated[int | None, Opt(min=0, help="Shots of tasks that --tasks names without (default: theirs).")] = None
    include_path: Annotated[Path | None, Opt(help="Folder of your own tasks; functions that it names run.")] = None
    limit: Annotated[
        int | None, Opt(min=1, help="Examples of each task, also of each in a group, from the first (default: all).")
    ] = None
    seed: Annotated[int, Opt(min=0, max=2**32 - 1, help="Of the choice of shots.")] = 1234
    dtype: Annotated[Dtype, Opt(help="Data type of the weights.")] = Dtype.auto
    batch_size: Annotated[str, Opt(help="Prompts per batch, or auto: what fits (hf without a GPU: 8).")] = "auto"
    tensor_parallel: Annotated[int, Opt(min=1, help="vllm: GPUs per copy of the model.")] = 1
    data_parallel: Annotated[int, Opt(min=1, help="vllm: copies of the model; needs Ray, loads them per task.")] = 1
    max_model_len: Annotated[int | None, Opt(min=1, help="Context length; longer prompts lose their beginning.")] = None

    @property
    def engine_name(self) -> EngineName:
        return EngineName(self.engine)

    def settings(self) -> Settings:
        """The engine's settings; downloads the model if it is on the Hub.

        Raises:
            UserError: if an option is wrong, or a model or adapter does not exist.
        """
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise UserError(f"--batch-size {self.batch_size}: write a number from 1, or auto.")
        return Settings(
            model=local_model(self.model, self.engine_name),
            adapters=parse_adapters(self.adapter or [], self.engine_name),
            sampling=Sampling(seed=self.seed),
            dtype=self.dtype.value,
            tensor_parallel=self.tensor_parallel,
            data_parallel=self.data_parallel,
            max_model_len=self.max_model_len,
        )

    def runs(self, settings: Settings) -> list[str]:
        """The names of the runs: `base` for the model itself, and its adapters."""
        return [*([] if self.skip_base and settings.adapters else [BASE]), *settings.adapters]


@app.command(cls=Command, help=__doc__, no_args_is_help=True)
@with_options
def main(
    tasks: Annotated[str, Opt(help="Comma-separated tasks, see above.")],
    output: Annotated[Path, written_to("Folder for the scores; one sub-folder per model or adapter.")],
    *,
    options: HarnessOptions,
) -> None:
    wanted = parse_tasks(tasks)
    settings = options.settings()
    check_engine(options.engine_name, settings)
    check_lm_eval()
    manager = find_tasks(wanted, options.include_path)
    manifest = {
        "model": {"name": options.model, "files": folder_hashes(settings.model)},
        "tasks": [asdict(each) for each in wanted],
        "shots": options.shots,
        "own_tasks": own_files(manager, options.include_path),
        "limit": options.limit,
        "seed": options.seed,
        "max_model_len": options.max_model_len,
        "engine": {"name": str(options.engine), "dtype": settings.dtype, "versions": _versions(options.engine_name)},
    }
    runs = {
        name: (output / name, {**manifest, "adapter": folder_hashes(settings.adapters.get(name))})
        for name in options.runs(settings)
    }
    missing = {
        name: [each for each in wanted if not _file(folder, each.task).is_file()] for name, (folder, _) in runs.items()
    }
    needed = [each for each in wanted if any(each in found for found in missing.values())]
    # All of them before the model, so that what is wrong with a task is known at once.
    loaded = {each: load_task(manager, each, options.shots, options.seed) for each in needed}
    with ExitStack() as stack:
        for folder, depends in runs.values():
            _open(folder, depends, stack)
        if loaded:
            ask = load(options.engine_name, settings, options.batch_size)
            for name, found in missing.items():
                with ask(name) as model:
                    for each in found:
                        _score(model, loaded[each], options, output / name)
        _finish(output, list(runs), wanted)


def _open(folder: Path, manifest: dict[str, Any], stack: ExitStack) -> None:
    """Take a run's folder for this process; before its first finished task, it belongs to nobody.

    Raises:
        UserError: if another process writes to it, or it has scores of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    take(lock, folder)
    stack.callback(lock.release)
    if not any((folder / TASKS).glob("*.json")):
        (folder / MANIFEST).unlink(missing_ok=True)
    claim(folder, manifest)


def _file(folder: Path, task: str) -> Path:
    return folder / TASKS / f"{task}.json"


def _versions(engine: EngineName) -> dict[str, str]:
    return package_versions("lm_eval", "torch", "transformers", "datasets") | (
        vllm_version() if engine is EngineName.vllm else package_versions("peft")
    )


def _score(model: Any, task: Loaded, options: HarnessOptions, folder: Path) -> None:
    print(f"{folder.name}: {task.name} ...", file=sys.stderr, flush=True)
    result = score_task(model, task, options.limit, options.seed)
    write_whole(_file(folder, task.name), json.dumps(result))
    summary = result["summary"]
    print(f"{folder.name}: {task.name}: {summary['metric']} {summary['value']:.3f}", file=sys.stderr, flush=True)


# --- results ---------------------------------------------------------------------------------------------------------


def _finish(output: Path, runs: list[str], wanted: list[Wanted]) -> None:
    """Write results.json into each run's folder, a summary of all beside them, and print a table."""
    summaries = {}
    for name in runs:
        found = {each.task: _read(_file(output / name, each.task)) for each in wanted}
        tasks = {task: each["summary"] for task, each in found.items()}
        summaries[name] = {"tasks": tasks, "average": fmean(each["value"] for each in tasks.values())}
        rows = {task: each["rows"] for task, each in found.items()}
        write_whole(output / name / RESULTS, json.dumps({"summary": summaries[name], "rows": rows}, indent=1))
    write_whole(output / RESULTS, json.dumps(summaries, indent=2))
    _print(summaries)
    print(f"Scores: {output / RESULTS}; each example: {output}/*/{RESULTS}")


def _read(file: Path) -> dict[str, Any]:
    """A finished task.

    Raises:
        UserError: if its file is damaged.
    """
    try:
        found = json.loads(file.read_bytes())
        float(found["summary"]["value"]), found["rows"][0]["id"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, then run the same command again.") from error
    return dict(found)


def _print(summaries: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    caption = "95%: Wilson's interval where every example counts 0 or 1, otherwise Student's"
    table = Table(caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("run", "task", "metric", "shots", "value", "95%", "examples"):
        table.add_column(column, justify="left" if column in ("run", "task", "metric") else "right", overflow="fold")
    for name, summary in summaries.items():
        for task, found in summary["tasks"].items():
            interval, shots = found["interval_95"], found["shots"]
            table.add_row(
                escape(name),
                escape(task),
                escape(found["metric"]),
                "" if shots is None else str(shots),
                f"{found['value']:.3f}",
                "" if interval is None else "{:.3f}-{:.3f}".format(*interval),
                str(found["examples"]),
            )
        table.add_row(escape(name), "average", "", "", f"{summary['average']:.3f}", "", "", end_section=True)
    Console().print(table)
    for name, summary in summaries.items():
        for task, found in summary["tasks"].items():
            if found["undefined"]:
                print(f"{name}: {found['undefined']} examples of {task} have no value and count as 0.")
