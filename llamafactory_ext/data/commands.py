"""The commands of `llamafactory-ext data`: make preference pairs, and check a recipe's pairs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..commandline import progress
from ..errors import UserError
from ..evaluation.generations import GENERATIONS, run_folder
from ..evaluation.sampling import print_pass_rates
from ..evaluation.scoring import pass_rates
from ..paths import output_path
from ..recipe.reading import Settings, read_recipe
from ..rows import Fields, Row, read_rows
from ..whole_files import write_whole
from .corruption import PROMPT, corrupt_row
from .dialogues import hh_rlhf_pair, kind_by_scores, ultrafeedback_pair
from .files import PAIR, Tally, alpaca, check_output, pair_file, register, write_pairs
from .metamath import Template, index_queries, learn_template, zero_shot_pair
from .samples import RANKED, Choice, read_samples, write_sample_pairs

app = typer.Typer(help="Make preference pairs, and check a recipe's pairs before training.", no_args_is_help=True)
console = Console()

SAMPLE = 1000  # prompts that the template is learned from

Source = typer.Argument
Opt = typer.Option
Output = Annotated[
    Path, Opt(help="The .jsonl file to write; its stem names the data set.", parser=output_path, metavar="PATH")
]
Overwrite = Annotated[bool, Opt("--overwrite", help="Replace an existing output.")]
Split = Annotated[str | None, Opt(help="Split of a Hub data set or a folder (default: train).")]


@app.command()
def metamath(
    pairs: Annotated[str, Source(help="Few-shot pairs: a file, or owner/name on the Hub.")] = (
        "abacusai/MetaMath_DPO_FewShot"
    ),
    questions: Annotated[str, Opt(help="MetaMathQA: a file, or owner/name on the Hub.")] = "meta-math/MetaMathQA",
    output: Output = Path("data/metamath_zero_shot.jsonl"),
    prompt: Annotated[str, Opt(help="Text before each question.")] = "",
    lead: Annotated[
        str | None, Opt(help="Text before a prompt's last question (default: learned from the pairs).")
    ] = None,
    suffix: Annotated[
        str | None, Opt(help="Text after a prompt's last question (default: learned from the pairs).")
    ] = None,
    split: Split = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn MetaMath's few-shot pairs into zero-shot pairs; the questions are found with MetaMathQA.

    llamafactory-ext data metamath

    llamafactory-ext data metamath few_shot.parquet --questions MetaMathQA-395K.json --output data/metamath.jsonl
    """
    check_output(output, overwrite, pairs, questions)
    if (lead is None) != (suffix is None):
        raise UserError("--lead and --suffix describe the template together: give both or neither.")
    rows = _rows(pairs, split)
    index, unusable = index_queries(read_rows(questions))
    for reason, count in unusable.items():
        console.print(f"[yellow]{count:,} rows of {escape(questions)} are not used: {escape(reason)}")

    sample = list(itertools.islice(rows, SAMPLE))
    if lead is not None and suffix is not None:
        template = Template(lead, suffix)
    else:
        template = learn_template([row.fields for row in sample if isinstance(row.fields, dict)], index)
    console.print(f"The question is between {escape(repr(template.lead))} and {escape(repr(template.suffix))}.")

    def convert(row: Row, fields: Fields) -> tuple[str, Fields]:
        return zero_shot_pair(fields, index, template, prompt)

    tally = write_pairs(itertools.chain(sample, rows), convert, output, overwrite)
    _finish(
        tally,
        output,
        alpaca(),
        {"matched": "matched with MetaMathQA", "fallback": "fallback: question found by the template"},
    )


@app.command()
def corrupt(
    solutions: Annotated[str, Source(help="GSM8K, MetaMathQA or similar: a file, or owner/name on the Hub.")],
    output: Output = Path("data/corrupted_pairs.jsonl"),
    seed: Annotated[int, Opt(help="Random seed: which result is changed, and to what.")] = 0,
    prompt: Annotated[str, Opt(help="Text before each question.", show_default="the MinorDPO paper's")] = PROMPT,
    limit: Annotated[int | None, Opt(min=1, help="Number of solutions to use, from the first (default: all).")] = None,
    split: Split = None,
    overwrite: Overwrite = False,
) -> None:
    """Make pairs from worked solutions: the rejected response has one intermediate result changed.

    llamafactory-ext data corrupt train.jsonl --output data/gsm8k_pairs.jsonl

    llamafactory-ext data corrupt meta-math/MetaMathQA --seed 1
    """
    check_output(output, overwrite, solutions)
    rows = itertools.islice(_rows(solutions, split), limit)
    tally = write_pairs(rows, _each(lambda fields: corrupt_row(fields, seed, prompt)), output, overwrite)
    _finish(tally, output, alpaca())


@app.command(name="hh-rlhf")
def hh_rlhf(
    dialogues: Annotated[str, Source(help="A .jsonl.gz file of the data set, or owner/name on the Hub.")] = (
        "Anthropic/hh-rlhf"
    ),
    output: Output = Path("data/hh_rlhf.jsonl"),
    split: Split = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert Anthropic's HH-RLHF to multi-turn pairs.

    llamafactory-ext data hh-rlhf

    llamafactory-ext data hh-rlhf harmless-base/train.jsonl.gz --output data/harmless.jsonl
    """
    check_output(output, overwrite, dialogues)
    tally = write_pairs(_rows(dialogues, split), _each(hh_rlhf_pair), output, overwrite)
    _finish(tally, output, alpaca(["history"]))


@app.command()
def ultrafeedback(
    dialogues: Annotated[str, Source(help="Rows with lists of messages: a file, or owner/name on the Hub.")] = (
        "HuggingFaceH4/ultrafeedback_binarized"
    ),
    output: Output = Path("data/ultrafeedback.jsonl"),
    split: Annotated[str | None, Opt(help="Split of a Hub data set or a folder (default: train_prefs).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert binarized UltraFeedback to pairs; the scores of both responses are kept.

    llamafactory-ext data ultrafeedback

    llamafactory-ext data ultrafeedback test_prefs.parquet --output data/ultrafeedback_test.jsonl
    """
    check_output(output, overwrite, dialogues)

    def convert(row: Row, fields: Fields) -> tuple[str, Fields]:
        pair = ultrafeedback_pair(fields)
        return kind_by_scores(pair), pair

    tally = write_pairs(_rows(dialogues, split, "train_prefs"), convert, output, overwrite)
    _finish(tally, output, alpaca(["system", "history"]))


@app.command(name="from-samples")
def from_samples(
    samples: Annotated[str, Source(help="The output of `llamafactory-ext eval sample`: its folder, or a file in it.")],
    output: Output = Path("data/self_pairs.jsonl"),
    choose: Annotated[
        Choice, Opt(help="Which pairs first: any, those closest by edit distance, or closest in length.")
    ] = Choice.random,
    per_problem: Annotated[
        int, Opt(min=1, help="Pairs of a problem at most; with --ranked, right answers at most, and wrong ones.")
    ] = 4,
    seed: Annotated[int, Opt(help="Random seed: which pairs, where --choose leaves it open.")] = 0,
    ranked: Annotated[
        bool, Opt("--ranked", help="Write one row per problem, with several answers and their scores.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make pairs of a model's own answers, right against wrong; problems solved always or never give none.

    llamafactory-ext data from-samples runs/samples --output data/self_pairs.jsonl

    llamafactory-ext data from-samples runs/samples/dpo --choose closest --per-problem 2 --output data/close_pairs.jsonl
    """
    source = _samples_file(samples)
    responses = RANKED if ranked else PAIR
    check_output(output, overwrite, source, responses=responses)
    with pair_file(output, overwrite) as file:
        read = read_samples(_rows(source, None), file, source)
        written, problems = write_sample_pairs(read, file, choose, per_problem, seed, ranked)
    rates = pass_rates(sample.verdict for sample in read)
    print_pass_rates({Path(source).parent.name: rates})
    has_system = any("system" in sample.prompt for sample in read)
    kinds = None if ranked else {"right": "right, and chosen", "wrong": "wrong, and rejected"}
    _finish(file.tally, output, alpaca(["system"] if has_system else [], responses), kinds)
    unit = "ranked rows" if ranked else "pairs"
    console.print(f"{written:,} {unit}, from {problems:,} of {rates['problems']:,} problems.")


def _samples_file(samples: str) -> str:
    """The file of samples that a folder of `eval sample` holds, or the file itself."""
    folder = Path(samples)
    if not folder.is_dir():
        return samples
    file = run_folder(folder, GENERATIONS) / GENERATIONS
    if not file.is_file():
        raise UserError(
            f"{samples!r} has no samples: make them with `llamafactory-ext eval sample --output {samples}`."
        )
    return str(file)


@app.command()
def check(
    recipe: Annotated[list[str], Source(help="A recipe and key=value words, as for llamafactory-cli train.")],
    test_set: Annotated[
        str | None, Opt(help="Questions that must not be in the pairs: a file, or owner/name on the Hub.")
    ] = None,
    test_split: Annotated[str | None, Opt(help="Split of --test-set, if it is not a file (default: test).")] = None,
    strict: Annotated[bool, Opt("--strict", help="Treat notes as problems.")] = False,
    json_file: Annotated[
        Path | None, Opt("--json", help="Also write the report to this JSON file.", parser=output_path, metavar="PATH")
    ] = None,
    model: Annotated[
        bool, Opt("--model", help="Also score the pairs of `dataset` with the recipe's model, into --output.")
    ] = False,
    output: Annotated[
        Path | None,
        Opt(help="The .jsonl or .parquet file for the scores of --model.", parser=output_path, metavar="PATH"),
    ] = None,
    batch_tokens: Annotated[int, Opt(min=1, help="Tokens that --model reads at a time, padding included.")] = 4096,
) -> None:
    """Check a recipe's pairs as training would load them: empty, identical, truncated, or in the test set.

    With --model, the model to be trained also reads every pair. The command scores how similar the two responses are to
    the model (CHES, arXiv 2410.08847), and shows the pairs with the highest scores. If a run is interrupted, even by
    kill -9, rerun the same command to resume.

    Exits with 0 if there are no problems, 1 if there are, 2 if the check could not run.

    llamafactory-ext data check recipe.yaml --test-set gsm8k/test.jsonl

    llamafactory-ext data check recipe.yaml cutoff_len=512 max_samples=1000

    llamafactory-ext data check recipe.yaml --model --output scores.jsonl
    """
    from .check import EVALUATION, TRAINING, check_pairs, render
    from .contamination import read_test_set

    settings = read_recipe(recipe)
    if model != (output is not None):
        raise UserError("--model writes its scores to --output: give both or neither.")
    if output is not None:
        _check_scores(settings, output)
    questions = read_test_set(_rows(test_set, test_split, "test")) if test_set else None
    report = check_pairs(settings, questions)
    evaluation = check_pairs(settings, questions, EVALUATION) if settings.get(EVALUATION) else None
    for part in render(report, f" in `{TRAINING}`" if evaluation else ""):
        console.print(part)
    if evaluation is not None:
        for part in render(evaluation, f" in `{EVALUATION}`"):
            console.print(part)
    if json_file is not None:
        both = asdict(report) | ({EVALUATION: asdict(evaluation)} if evaluation else {})
        write_whole(json_file, json.dumps(both, indent=2) + "\n")
    if output is not None and not report.stop:
        _foresee(settings, output, batch_tokens)
    elif output is not None:
        console.print("The pairs are not scored, because a row cannot be tokenized: correct or remove it.")
    reports = [each for each in (report, evaluation) if each is not None]
    noted = any(any(each.notes.values()) or each.template for each in reports)
    if any(each.found_problems for each in reports) or (strict and noted):
        raise typer.Exit(1)


def _check_scores(settings: Settings, output: Path) -> None:
    """Refuse a recipe or an output that `_foresee` does not take, before anything is loaded."""
    from ..scoring.file import check_output
    from ..scoring.foresight import check_stage

    check_stage(settings)
    check_output(output)


def _foresee(settings: Settings, output: Path, batch_tokens: int) -> None:
    from ..scoring.foresight import foresee, render

    with progress("scoring", "pairs") as show:
        for done, total in foresee(settings, output, batch_tokens):
            show(done, total)
    for part in render(output):
        console.print(part)


@app.command()
def drop(
    recipe: Annotated[list[str], Source(help="The recipe and key=value words that the pairs were scored with.")],
    scores: Annotated[Path, Opt(help="The file that `data check --model` has written.", metavar="PATH")],
    worst: Annotated[
        float, Opt(help="The share of pairs to drop, between 0 and 1: those with the highest length-normalized CHES.")
    ] = 0.1,
    output: Output = Path("data/kept_pairs.jsonl"),
    overwrite: Overwrite = False,
) -> None:
    """Write a recipe's data without the pairs of the highest length-normalized CHES (arXiv 2410.08847).

    The other rows are written as they are, with all columns.

    llamafactory-ext data drop recipe.yaml --scores scores.jsonl

    llamafactory-ext data drop recipe.yaml --scores scores.jsonl --worst 0.05 --output data/kept.jsonl
    """
    from .dropping import drop_worst

    tally, entry = drop_worst(read_recipe(recipe), scores, worst, output, overwrite)
    _finish(tally, output, entry)


def _rows(source: str, split: str | None, usual: str = "train") -> Iterator[Row]:
    """The rows of a source's split; `usual` if none is named.

    Raises:
        UserError: if a split is named for a file, and as `read_rows` does.
    """
    if split is not None and Path(source).is_file():
        raise UserError(
            f"{source!r} is a file, and files have no splits: remove the split {split!r}, or name a folder."
        )
    return read_rows(source, usual if split is None else split)


def _each(make_pair: Callable[[Fields], Fields]) -> Callable[[Row, Fields], tuple[str, Fields]]:
    return lambda row, fields: ("pairs", make_pair(fields))


def _finish(tally: Tally, output: Path, entry: Fields, kinds: dict[str, str] | None = None) -> None:
    """Register the pairs, and print what became of every row."""
    is_new = register(output, entry)
    table = Table("rows", "result", "first lines", title=str(output), title_justify="left")
    for counter, style, prefix in ((tally.written, None, ""), (tally.dropped, "yellow", "dropped: ")):
        for what, count in counter.most_common():
            lines = ", ".join(str(line) for line in tally.first_lines[what])
            table.add_row(f"{count:,}", escape(prefix + (kinds or {}).get(what, what)), lines, style=style)
    console.print(table)
    if tally.dropped:
        console.print(f"The dropped rows are in {output.with_name(output.stem + '.dropped.jsonl')}.")
    done = "is registered" if is_new else "was registered already"
    console.print(f"`dataset: {output.stem}` {done} in {output.with_name('dataset_info.json')}.")
