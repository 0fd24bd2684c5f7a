"""Score a model on GSM8K: generate, extract, and say how sure the score is.

    python evaluation/gsm8k.py --model /path/to/model --data openai/gsm8k --output runs/dpo
    python evaluation/gsm8k.py --model /base --adapter dpo=/lora/dpo --adapter minor=/lora/minor --data test.jsonl ...
    python evaluation/gsm8k.py --engine openai --base-url http://127.0.0.1:8000/v1 --model NAME --data test.jsonl ...
    python evaluation/gsm8k.py --score-only --data test.jsonl --output runs/dpo

Every answer is kept as it arrives; interrupted, even by kill -9, the same command goes on. Imports neither llamafactory
nor llamafactory_ext: vLLM lives in an environment of its own (`make eval-env`).
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from degeneration import is_degenerate
from engines import Job, Sampling, Settings, make_engine
from extraction import VERSION, extract_answer, read_answer
from generations import Run, file_hashes, write_whole
from questions import Question, UserError, load_prompt, load_questions, messages
from scoring import score_run
from tqdm import tqdm

__all__ = ["extract_answer", "is_degenerate"]

BASE = "base"
LEGEND = (
    "strict: behind the last `the answer is` or `####`; prompt: behind `So the answer is:`; flex.: the last number; "
    "confl.: first and last answer differ; degen.: empty, looping or repeating itself; cut: at the token limit; "
    "miss.: not answered yet"
)


class EngineName(StrEnum):
    vllm = "vllm"
    openai = "openai"
    hf = "hf"


Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.replace("\n    python", "\n\n    python"), no_args_is_help=True)
def main(
    data: Annotated[str, Opt(help="A jsonl or parquet file with question and answer (`#### N`), or openai/gsm8k.")],
    output: Annotated[Path, Opt(help="A folder for the answers and scores; one sub-folder per model or adapter.")],
    model: Annotated[str, Opt(help="A model folder or hub name; with --engine openai, the name it is served by.")] = "",
    engine: Annotated[EngineName, Opt(help="What generates.")] = EngineName.vllm,
    adapter: Annotated[list[str] | None, Opt(help="NAME=DIR of a LoRA adapter; several in one load.")] = None,
    skip_base: Annotated[bool, Opt("--skip-base", help="Score the adapters only.")] = False,
    split: Annotated[str, Opt(help="Split of a hub data set.")] = "test",
    limit: Annotated[int | None, Opt(min=1, help="Only the first problems.")] = None,
    prompt: Annotated[str, Opt(help="paper (MinorDPO's), plain, or a file that holds {question}.")] = "paper",
    system: Annotated[str | None, Opt(help="Text of the system turn, also ''; default: the template's own.")] = None,
    temperature: Annotated[float, Opt(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, Opt(min=0, max=1)] = 1.0,
    repetition_penalty: Annotated[float, Opt(min=0.01, help="1: none. Always sent.")] = 1.0,
    max_tokens: Annotated[int, Opt(min=1, help="Of an answer.")] = 1024,
    seed: Annotated[int, Opt()] = 0,
    dtype: Annotated[str, Opt(help="auto, float32, bfloat16 or float16. Compare engines in float32.")] = "auto",
    tensor_parallel: Annotated[int, Opt(min=1, help="vllm: GPUs per copy of the model.")] = 1,
    data_parallel: Annotated[int, Opt(min=1, help="vllm: copies of the model.")] = 1,
    max_model_len: Annotated[int | None, Opt(min=1, help="vllm: context length.")] = None,
    batch_size: Annotated[int, Opt(min=1, help="hf: problems at a time.")] = 16,
    base_url: Annotated[str, Opt(help="openai: the server.")] = "http://127.0.0.1:8000/v1",
    concurrency: Annotated[int, Opt(min=1, help="openai: requests at a time.")] = 64,
    score_only: Annotated[bool, Opt("--score-only", help="Score the answers that are there; no model needed.")] = False,
) -> None:
    try:
        questions, data_hash = load_questions(data, split, limit)
        if score_only:
            runs = sorted(path.parent for path in output.glob("*/manifest.json"))
            if not runs:
                raise UserError(f"{output} holds no runs: name the --output of an earlier run.")
        else:
            sampling = Sampling(temperature, top_p, repetition_penalty, max_tokens, seed)
            settings = Settings(
                model=_local_model(model, engine),
                adapters=_parse_adapters(adapter or [], engine),
                sampling=sampling,
                dtype=dtype,
                tensor_parallel=tensor_parallel,
                data_parallel=data_parallel,
                max_model_len=max_model_len,
                batch_size=batch_size,
                base_url=base_url,
                concurrency=concurrency,
            )
            names = [*([] if skip_base and settings.adapters else [BASE]), *settings.adapters]
            asked = {"prompt": load_prompt(prompt), "system": system}
            about = {
                "data": {"source": data, "sha256": data_hash, "problems": len(questions)},
                "model": {"name": model, "files": _hashes(settings.model)},
                **asked,
            }
            runs = _generate(engine, settings, names, questions, about, output)
        _score(runs, questions, output)
    except UserError as error:
        print(f"gsm8k.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _local_model(model: str, engine: EngineName) -> str:
    """The model's folder, fetched from the hub if it is a hub name; a served model is only a name."""
    if not model:
        raise UserError("--model is missing: name a model folder or hub name.")
    if engine is EngineName.openai or Path(model, "config.json").is_file():
        return model
    if model.startswith((".", "/")) or Path(model).exists():
        raise UserError(f"There is no model at {model}: name a folder with config.json, weights and tokenizer.")

    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, ignore_patterns=["original/*", "*.pth", "*.gguf"])
    except Exception as error:
        raise UserError(f"{model} is neither a folder nor to be had from the hub ({error}).") from error


def _parse_adapters(words: list[str], engine: EngineName) -> dict[str, str]:
    adapters = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name == BASE or "/" in name:
            raise UserError(f"--adapter {word}: write NAME=DIR, with a name that is no path and not `{BASE}`.")
        if engine is not EngineName.openai and not Path(folder, "adapter_config.json").is_file():
            raise UserError(f"{folder} holds no adapter_config.json: name the folder of a LoRA adapter with --adapter.")
        adapters[name] = folder
    return adapters


# --- generating ------------------------------------------------------------------------------------------------------


def _generate(
    engine_name: EngineName,
    settings: Settings,
    names: list[str],
    questions: list[Question],
    about: dict[str, Any],
    output: Path,
) -> list[Path]:
    """Ask every problem that has no answer yet, of every run, in one load of the engine; returns the runs' folders.

    The manifest holds everything that the answers and their reading depend on: a run is resumed only with the same one.
    """
    engine = make_engine(engine_name, settings)
    chats = [messages(question, about["prompt"], about["system"]) for question in questions]
    engine.check(chats)
    manifest = {
        **about,
        "sampling": vars(settings.sampling),
        "engine": {"name": str(engine_name), "dtype": settings.dtype, "versions": engine.versions()},
        "extractor": VERSION,
    }
    with ExitStack() as stack:
        runs = {name: stack.enter_context(Run(output / name)) for name in names}
        jobs, bar = [], _Progress(len(questions) * len(names), questions)
        for name, run in runs.items():
            done = run.open({**manifest, "adapter": _hashes(settings.adapters.get(name))})
            for question, chat in zip(questions, chats, strict=True):
                if question.index in done:
                    bar.count(question.index, done[question.index].text)
                else:
                    jobs.append(Job(name, question.index, chat))
        if jobs:
            for job, generation in engine.generate(jobs):
                runs[job.run].append(generation)
                bar.count(job.index, generation.text)
        bar.close()
    return [output / name for name in names]


def _hashes(folder: str | None) -> dict[str, str] | None:
    return file_hashes(Path(folder)) if folder and Path(folder).is_dir() else None


class _Progress:
    """A progress bar over all problems, with the strict accuracy so far."""

    def __init__(self, total: int, questions: list[Question]) -> None:
        self.gold = {question.index: question.gold for question in questions}
        self.correct = 0
        self.bar = tqdm(total=total, desc="answers", unit="", dynamic_ncols=True)

    def count(self, index: int, text: str) -> None:
        self.correct += read_answer(text, "strict").answer == self.gold[index]
        self.bar.update()
        self.bar.set_postfix_str(f"strict {self.correct / self.bar.n:.1%}", refresh=False)

    def close(self) -> None:
        self.bar.close()


# --- scoring ---------------------------------------------------------------------------------------------------------


def _score(runs: list[Path], questions: list[Question], output: Path) -> None:
    """Score each run into its folder, and print one table over all."""
    summaries = {}
    for folder in runs:
        result = score_run(questions, Run(folder).read())
        write_whole(folder / "results.json", json.dumps(result, indent=1))
        summaries[folder.name] = result["summary"]
    write_whole(output / "results.json", json.dumps(summaries, indent=2))
    _print_summary(summaries)
    print(f"\nAll of it: {output / 'results.json'}; each answer read: {output}/*/results.json")


def _print_summary(summaries: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    problems = next(iter(summaries.values()))["problems"]
    table = Table(
        title=f"{problems} problems, accuracy with Wilson's 95% interval",
        caption=LEGEND,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("run", "strict", "95%", "prompt", "flex.", "confl.", "degen.", "cut", "miss."):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name, summary in summaries.items():
        low, high = summary["strict"]["wilson_95"]
        signs = summary["degeneration"]
        table.add_row(
            name,
            f"{summary['strict']['accuracy']:.1%}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{summary['strict_prompt']['accuracy']:.1%}",
            f"{summary['flexible']['accuracy']:.1%}",
            str(summary["strict"]["conflicts"]),
            f"{signs['degenerate']:.1%}",
            f"{signs['cut_off']:.1%}",
            str(summary["missing"]),
        )
    Console().print(table)


if __name__ == "__main__":  # vLLM's workers import this file again
    app()
