"""Writes a recipe's data without the pairs of the highest length-normalized CHES (arXiv 2410.08847).

The scores are those of `data check --model`. Rows are written as they are in the data, with all their columns.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe.loading import load_pairs, source_files, source_rows
from ..recipe.reading import Settings, data_sets, parse_recipe
from ..rows import BadRow, Fields, Row
from ..scoring.file import read_scores, unfinished_path
from ..scoring.foresight import SCORE, check_stage, fingerprint_of, ranked
from .files import Tally, check_output, registered, write_rows

# What an entry of dataset_info.json says of where its rows are; the rest says what they look like.
PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
PARTS = ("subset", "split", "folder", "num_samples")


def drop_worst(settings: Settings, scores: Path, share: float, output: Path, overwrite: bool) -> tuple[Tally, Fields]:
    """Write a recipe's data without the pairs of the highest length-normalized CHES.

    Args:
        settings: the recipe that the scores were made with.
        scores: the file that `data check --model` has written.
        share: of the scored pairs, how many to leave out, above 0 and below 1; rounded down to a whole pair.
        output: a .jsonl file, which appears when all rows are written; dropped rows go to `*.dropped.jsonl` beside it.
        overwrite: whether to replace an existing file.

    Returns:
        What became of the rows, and the entry for `dataset_info.json`, without the name of the file.

    Raises:
        UserError: if the recipe, the scores or the share do not fit, or a data set cannot be written as one file.
    """
    if not 0 < share < 1:
        raise UserError(f"--worst is {share:g}: write a number between 0 and 1, such as 0.1.")
    from ..training.loading import loaded_as_trained

    check_stage(settings)
    model_args, data_args, finetuning_args = parse_recipe({"stage": "dpo", **settings})
    data_args.streaming = False
    descriptions = data_sets(data_args.dataset, data_args.dataset_dir)
    entry = _entry(data_args, descriptions)
    files = [str(file) for each in descriptions for file in source_files(each, data_args.dataset_dir)]
    check_output(output, overwrite, *files, str(scores))
    scored = _read(scores)
    worst = ranked(row for row in scored if not row["skipped"])
    count = math.floor(share * len(worst))
    if not 0 < count < len(worst):
        raise UserError(
            f"--worst {share:g} drops {count} of {len(worst)} pairs: write a share that leaves some of both."
        )
    with loaded_as_trained(finetuning_args):
        rows = load_pairs(model_args, data_args)
    _check_match(scored, rows, scores)
    dropped = {row["index"] for row in worst[:count]}

    def keep(row: Row, fields: Fields) -> tuple[str, Fields]:
        if row.number - 1 in dropped:
            raise BadRow("among the highest length-normalized CHES")
        return "pairs", fields

    return write_rows(_numbered(descriptions, data_args, len(scored)), keep, output, overwrite), entry


def _read(scores: Path) -> list[dict[str, Any]]:
    if not scores.is_file():
        if unfinished_path(scores).exists():
            raise UserError(f"{str(scores)!r} is not complete: run `data check --model` again to resume it.")
        raise UserError(f"{str(scores)!r} does not exist: write it with `data check RECIPE --model --output {scores}`.")
    if scores.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"{str(scores)!r} does not end in .jsonl or .parquet: name the --output of `data check --model`."
        )
    rows = read_scores(scores, None)
    if not all(row["skipped"] or {SCORE, "fingerprint"} <= row.keys() for row in rows):
        raise UserError(f"{str(scores)!r} holds other scores: name the --output of `data check --model`.")
    return rows


def _entry(data_args: Any, descriptions: Sequence[Any]) -> Fields:
    """The entry of dataset_info.json that all data sets share, without the places of their rows.

    Raises:
        UserError: if there is none, or the order of the rows is not that of the data sets one after the other.
    """
    if not descriptions:
        raise UserError("the recipe names no data set: write `dataset` and `dataset_dir`.")
    if len(descriptions) > 1 and data_args.mix_strategy != "concat":
        raise UserError(
            f"mix_strategy {data_args.mix_strategy!r} mixes the data sets: name one at a time with dataset=."
        )
    sampled = [
        name for name, about in zip(data_args.dataset, descriptions, strict=True) if about.num_samples is not None
    ]
    if sampled:
        raise UserError(f"num_samples of {sampled[0]!r} draws rows at random: remove it from dataset_info.json.")
    info = registered(Path(data_args.dataset_dir))
    entries = [info.get(name) for name in data_args.dataset]
    looks = [
        {key: value for key, value in entry.items() if key not in PLACES + PARTS} if isinstance(entry, dict) else None
        for entry in entries
    ]
    if None in looks:
        raise UserError(f"{data_args.dataset_dir!r} has no dataset_info.json with these data sets: name its folder.")
    if any(each != looks[0] for each in looks):
        raise UserError("the data sets have different columns or formats: name one at a time with dataset=.")
    assert looks[0] is not None
    return looks[0]


def _check_match(scored: Sequence[dict[str, Any]], pairs: Any, scores: Path) -> None:
    """
    Raises:
        UserError: if the scores are of other pairs than the recipe's.
    """
    again = f"score them with `data check --model` again, to another --output than {scores}"
    if len(scored) != len(pairs):
        raise UserError(f"{str(scores)!r} has scores of {len(scored)} rows, and the recipe {len(pairs)} rows: {again}.")
    for row in scored:
        if not row["skipped"] and fingerprint_of(pairs[row["index"]]) != row["fingerprint"]:
            raise UserError(f"row {row['index'] + 1} is not the pair that {str(scores)!r} has a score of: {again}.")


def _numbered(descriptions: Sequence[Any], data_args: Any, count: int) -> Iterator[Row]:
    """The rows as they are in the data, numbered from 1 through the data sets as LLaMA-Factory loads them.

    Raises:
        UserError: if a row cannot be read or written, or there are others than LLaMA-Factory loads.
    """
    parts = (itertools.islice(source_rows(each, data_args.dataset_dir), data_args.max_samples) for each in descriptions)
    number = 0
    for number, row in enumerate(itertools.chain.from_iterable(parts), start=1):
        if isinstance(row.fields, BadRow):
            raise UserError(f"row {number} cannot be written: {row.fields}.")
        try:
            json.dumps(row.fields)
        except TypeError as error:
            raise UserError(f"row {number} cannot be written to a .jsonl file: {error}.") from error
        yield Row(number, row.fields)
    if number != count:
        names = ", ".join(data_args.dataset)
        raise UserError(
            f"{number} rows of {names} can be read here, and LLaMA-Factory reads {count}: use .jsonl files."
        )
