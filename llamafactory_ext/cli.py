"""`llamafactory-ext`: preparing, planning, scoring and comparing trainings."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .commandline import Group, progress
from .data.commands import app as data
from .errors import UserError
from .evaluation.commands import app as evaluation
from .paths import output_path
from .sweep.commands import sweep
from .training.reference.commands import app as cache

if TYPE_CHECKING:
    from .scoring.summary import Summary

app = typer.Typer(
    cls=Group,
    help="Preference data, plans and checks for trainings with `llamafactory-cli train`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # rich's own would take [default] in a text for a style
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.add_typer(evaluation, name="eval")
app.add_typer(cache, name="cache")
app.command()(sweep)
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def env() -> None:
    """Show versions, devices, whether the plugin is active, and conflicts with their fix (then exit status 1)."""
    from .environment import findings

    has_conflict, width = False, len("llamafactory-ext needs")
    for finding in findings():  # one at a time: an import that is tried may end the process
        # Not in a table, which would break the commands that are there to be copied.
        line = f"{finding.name:{width}}  {finding.value}"
        console.print(line, style="red" if finding.fix else None, soft_wrap=True, markup=False, highlight=False)
        if finding.fix:
            has_conflict = True
            console.print(f"{'':{width}}  -> {finding.fix}", soft_wrap=True, markup=False, highlight=False)
    if has_conflict:
        raise typer.Exit(1)


@app.command()
def examples(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Where `examples`, `data` and `evaluation` are written.", parser=output_path, metavar="[FOLDER]"
        ),
    ] = Path(),
) -> None:
    """Write the package's recipes, DeepSpeed settings, samples and evaluation scripts; existing files are kept.

    llamafactory-ext examples

    llamafactory-cli train examples/metamath_qwen1.5_7b/qwen1.5-7b_lora_minor_dpo.yaml
    """
    from .examples import FOLDERS, write_examples

    written = [is_new for _, is_new in write_examples(folder)]
    there = f"; {written.count(False)} existed and were kept" if not all(written) else ""
    places = ", ".join(str(folder / name) for name in FOLDERS)
    console.print(f"{sum(written)} files written to {places}{there}", soft_wrap=True)


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(help="Show this one, whole.")] = None,
    pref_loss_file: Annotated[str | None, typer.Option(help="Also the losses of this file, as in the recipe.")] = None,
) -> None:
    """List every `pref_loss`, or show one whole: its equation, source, and lines to copy into a recipe.

    llamafactory-ext losses

    llamafactory-ext losses minor_dpo

    llamafactory-ext losses my_loss --pref-loss-file my_loss.py
    """
    from .losses.lookup import all_losses, get_loss, load_loss_file
    from .recipe.display import show_all, show_one

    try:
        of_file = load_loss_file(pref_loss_file) if pref_loss_file is not None else []
        loss = get_loss(name) if name is not None else None
    except ValueError as error:
        raise UserError(str(error)) from error
    if loss is not None:
        show_one(loss, console, pref_loss_file if loss.name in of_file else None)
        return
    show_all(all_losses(), console)
    also = f" --pref-loss-file {shlex.quote(pref_loss_file)}" if pref_loss_file is not None else ""
    hint = f"One loss whole, with lines for a recipe: llamafactory-ext losses NAME{also}"
    console.print(hint, soft_wrap=True, markup=False, highlight=False)


@app.command()
def plan(
    recipe: Annotated[list[str], typer.Argument(help="A recipe and key=value words, as for llamafactory-cli train.")],
    gpus: Annotated[int, typer.Option(min=1, help="Of all nodes together.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of one GPU.")] = 80.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="That share a host's memory.")] = 8,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Typical length of a sequence, as `data check` shows it (default: cutoff_len)."),
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest response (default: cutoff_len).")
    ] = None,
) -> None:
    """Plan steps, tokens and memory per GPU from the model's config alone; says what to change if it does not fit.

    Exit status: 0 if it fits, 1 if not, 2 if it cannot be planned. Memory is planned for cutoff_len tokens.

    llamafactory-ext plan recipe.yaml --gpus 8 --gpu-memory 80

    llamafactory-ext plan recipe.yaml finetuning_type=lora per_device_train_batch_size=1 --gpu-memory 24
    """
    from .planning.display import render
    from .planning.plan import alternatives, make_plan
    from .recipe.reading import read_recipe

    settings = read_recipe(recipe)
    asked: dict[str, Any] = {"gpus_per_node": gpus_per_node, "tokens": tokens, "answer_tokens": answer_tokens}
    planned = make_plan(settings, gpus, gpu_memory, **asked)
    if planned.fits:
        render(planned, console)
        return
    render(planned, console, alternatives(settings, gpus, gpu_memory, **asked))
    raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The `output` of a sweep, finished or not.")],
    output: Annotated[
        Path | None, typer.Option(help="A folder (default: FOLDER/report).", parser=output_path, metavar="PATH")
    ] = None,
) -> None:
    """Make one page of a sweep: figures, tests against DPO, every cell, and what is needed to repeat it.

    The page needs no network; figures and tables are also files beside it.

    llamafactory-ext report outputs/metamath_grid
    """
    from .report.page import write_report

    console.print(f"{write_report(folder, output or folder / 'report')}", soft_wrap=True)


@app.command()
def score(
    recipe: Annotated[list[str], typer.Argument(help="A recipe and key=value words, as for llamafactory-cli train.")],
    output: Annotated[
        Path,
        typer.Option(
            help="A .jsonl or .parquet file, which appears when all pairs are scored.",
            parser=output_path,
            metavar="PATH",
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs at a time.")] = 4,
) -> None:
    """Score pairs offline: log-ratios, margins, the recipe's loss and its metrics, pair by pair.

    The reference is `ref_model`, or with an adapter the model without it. If the data has scores of both responses
    (score_chosen, score_rejected), their difference is correlated with the margins. If a run is interrupted, even by
    kill -9, rerun the same command to resume.

    llamafactory-ext score recipe.yaml model_name_or_path=outputs/dpo ref_model=Qwen/Qwen1.5-7B-Chat --output dpo.jsonl

    llamafactory-ext score recipe.yaml finetuning_type=lora adapter_name_or_path=outputs/lora --output lora.parquet
    """
    from .recipe.reading import read_recipe
    from .scoring.file import read_scores
    from .scoring.scorer import score_pairs
    from .scoring.summary import summarize

    with progress("scoring", "pairs") as show:
        for done, total in score_pairs(read_recipe(recipe), output, batch_size):
            show(done, total)
    summary = summarize(read_scores(output))
    if not summary.pairs:
        raise UserError(
            f"none of {summary.skipped} rows is a pair that LLaMA-Factory would train on, so {output} holds no scores: "
            "`llamafactory-ext data check` on the same recipe says why."
        )
    _show(summary, output)


def _show(summary: Summary, output: Path) -> None:
    table = Table("number", "mean", title=f"{output}: {summary.pairs:,} pairs", title_justify="left")
    for name, value in summary.means.items():
        table.add_row(escape(name), f"{value:.4g}")
    table.add_row("accuracy (margin > 0)", f"{summary.accuracy:.1%}")
    if summary.augmented_accuracy is not None:
        table.add_row("accuracy under the augmented prompt", f"{summary.augmented_accuracy:.1%}")
    console.print(table)
    if summary.skipped:
        console.print(
            f"[yellow]{summary.skipped} rows skipped, because LLaMA-Factory would not train on them (column `skipped`)."
        )
    for margin, methods in summary.correlations.items():
        values = ", ".join(f"{name} {value:.3f} (p = {p:.2g})" for name, (value, p) in methods.items())
        console.print(f"correlation of {margin} with the data's scores: {values}")


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
