"""Score a model on GSM8K: generate, extract, and say how sure the score is.

    python evaluation/gsm8k.py --model /path/to/model --data openai/gsm8k --output runs/dpo
    python evaluation/gsm8k.py --model /base --adapter dpo=/lora/dpo --adapter minor=/lora/minor --data test.jsonl ...
    python evaluation/gsm8k.py --engine openai --base-url http://127.0.0.1:8000/v1 --model NAME --data test.jsonl ...
    python evaluation/gsm8k.py --model /path/to/qwen3 --chat-template-kwargs '{"enable_thinking": false}' ...
    python evaluation/gsm8k.py --score-only --data test.jsonl --output runs/dpo

Every answer is kept as it arrives; interrupted, even by kill -9, the same command goes on. Imports neither llamafactory
nor llamafactory_ext: vLLM lives in an environment of its own (`make eval-env`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import options
import typer
from asking import ask_missing, print_left_out, print_refused
from chat_templates import parse_chat_template_kwargs
from degeneration import is_degenerate
from engines import Sampling, Settings, make_engine
from extraction import VERSION, extract_answer, read_answer
from generations import MANIFEST, Generation, Run
from models import BASE, Dtype, EngineName, folder_hashes, local_model, parse_adapters
from questions import Question, UserError, load_prompt, load_questions, messages
from scoring import score_run
from whole_files import write_whole

__all__ = ["extract_answer", "is_degenerate"]

LEGEND = (
    "strict: behind the last `the answer is` or `####`; prompt: behind `So the answer is:`; flex.: the last number; "
    "confl.: first and last answer differ; degen.: empty, looping or repeating itself; cut: at the token limit; "
    "miss.: without an answer, which counts as wrong"
)


Opt = typer.Option
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.replace("\n    python", "\n\n    python"), no_args_is_help=True)
def main(
    data: Annotated[str, Opt(help="A jsonl or parquet file with question and answer (`#### N`), or openai/gsm8k.")],
    output: Annotated[
        Path,
        Opt(
            help="A folder for the answers and scores; one sub-folder per model or adapter.",
            parser=options.path,
            metavar="PATH",
        ),
    ],
    model: options.Model = "",
    engine: options.Engine = EngineName.vllm,
    adapter: options.Adapter = None,
    skip_base: Annotated[bool, Opt("--skip-base", help="Score the adapters only.")] = False,
    split: Annotated[str, Opt(help="Split of a hub data set.")] = "test",
    limit: options.Limit = None,
    prompt: Annotated[str, Opt(help="paper (MinorDPO's), plain, or a file that holds {question}.")] = "paper",
    system: Annotated[str | None, Opt(help="Text of the system turn, also ''; default: the template's own.")] = None,
    chat_template_kwargs: options.ChatTemplateKwargs = "{}",
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    max_tokens: options.MaxTokens = 1024,
    seed: options.Seed = 0,
    dtype: options.Dtype = Dtype.auto,
    tensor_parallel: options.TensorParallel = 1,
    data_parallel: options.DataParallel = 1,
    max_model_len: options.MaxModelLen = None,
    batch_size: options.BatchSize = 16,
    base_url: options.BaseUrl = "http://127.0.0.1:8000/v1",
    concurrency: options.Concurrency = 64,
    score_only: Annotated[bool, Opt("--score-only", help="Score the answers that are there; no model needed.")] = False,
) -> None:
    try:
        questions, data_hash = load_questions(data, split, limit)
        if score_only:
            runs = _recorded_runs(output, data, data_hash, len(questions))
        else:
            sampling = Sampling(temperature, top_p, repetition_penalty, max_tokens, seed)
            settings = Settings(
                model=local_model(model, engine),
                adapters=parse_adapters(adapter or [], engine),
                sampling=sampling,
                chat_template_kwargs=parse_chat_template_kwargs(chat_template_kwargs),
                dtype=dtype.value,
                tensor_parallel=tensor_parallel,
                data_parallel=data_parallel,
                max_model_len=max_model_len,
                batch_size=batch_size,
                base_url=base_url,
                concurrency=concurrency,
            )
            names = [*([] if skip_base and settings.adapters else [BASE]), *settings.adapters]
            about = {
                "data": {"source": data, "sha256": data_hash, "problems": len(questions)},
                "model": {"name": model, "files": folder_hashes(settings.model)},
                "prompt": load_prompt(prompt),
                "system": system,
                "chat_template_kwargs": settings.chat_template_kwargs,
            }
            runs = _generate(engine, settings, names, questions, about, output)
        _score(runs, questions, output)
    except (UserError, OSError) as error:
        raise options.refusal("gsm8k.py", error) from None


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
        "sent": engine.parameters(),
        "engine": {"name": str(engine_name), "dtype": settings.dtype, "versions": engine.versions()},
        "extractor": VERSION,
    }
    gold = {question.index: question.gold for question in questions}
    runs = {
        name: (output / name, {**manifest, "adapter": folder_hashes(settings.adapters.get(name))}) for name in names
    }
    ask_missing(engine, chats, runs, watch=_running_accuracy(gold))
    return [output / name for name in names]


def _running_accuracy(gold: dict[int, Decimal]) -> Callable[[Generation], str]:
    """What the progress bar says beside its numbers: the strict accuracy so far."""
    right: list[bool] = []

    def watch(generation: Generation) -> str:
        right.append(read_answer(generation.text, "strict").answer == gold[generation.index])
        return f"strict {sum(right) / len(right):.1%}"

    return watch


# --- scoring ---------------------------------------------------------------------------------------------------------


def _recorded_runs(output: Path, data: str, data_hash: str, count: int) -> list[Path]:
    """The folders of the runs in an output.

    Raises:
        UserError: if there is none, or one answers other problems than these.
    """
    runs = sorted(path.parent for path in output.glob(f"*/{MANIFEST}"))
    if not runs:
        raise UserError(f"{output} holds no runs: name the --output of an earlier run.")
    for folder in runs:
        asked = Run(folder).manifest().get("data")
        if not isinstance(asked, dict):
            raise UserError(f"{folder / MANIFEST} does not say what was asked: score another --output.")
        if asked.get("sha256") != data_hash:
            raise UserError(
                f"{folder} answers {asked.get('problems')} problems of {asked.get('source')}, which are not the "
                f"{count} that {data} holds now: name the --data and the --limit that it was asked with."
            )
    return runs


def _score(runs: list[Path], questions: list[Question], output: Path) -> None:
    """Score each run into its folder, and print one table over all."""
    summaries, answers = {}, {}
    for folder in runs:
        run = Run(folder)
        answers[folder] = run.read()
        run.refuse_others(answers[folder], len(questions))
        result = score_run(questions, answers[folder])
        write_whole(folder / "results.json", json.dumps(result, indent=1))
        summaries[folder.name] = result["summary"]
    write_whole(output / "results.json", json.dumps(summaries, indent=2))
    _print_summary(summaries)
    for folder in runs:
        print_refused(folder, answers[folder].values())
        print_left_out(folder, answers[folder].values())
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
