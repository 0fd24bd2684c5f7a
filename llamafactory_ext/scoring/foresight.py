"""Scores, before a training, which pairs are likely to push their chosen response down: `data check --model`.

The model that is to be trained reads every pair once, in the layout of the training. What is done is on disk: if a run
is interrupted at any moment, the same command resumes.
"""

from __future__ import annotations

import json
import math
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..recipe.reading import Settings, parse_recipe
from .file import Row, ScoreFile, check_output, read_scores
from .loading import device_of, encode, fingerprints, load_model, rows_of

if TYPE_CHECKING:
    import torch

    from ..training.sharing import PrefixSharing

SCORE = "normalized_ches"  # by which pairs are ranked
# What is shown: of the file's columns, by their names there.
OF_WORST = (SCORE, "ches", "edit_distance")
SHOWN = (*OF_WORST, *(f"{side}_{name}" for name in ("tail_logp", "tail_mean_logp") for side in ("chosen", "rejected")))
PERCENTILES = (0, 25, 50, 75, 100)
WORST = 5  # pairs shown


def foresee(settings: Settings, output: Path, batch_tokens: int = 4096) -> Iterator[tuple[int, int]]:
    """Measure every pair of a recipe's data sets into a file; yields (pairs done, pairs in all) as it goes.

    Args:
        settings: a recipe for stage dpo; its `model_name_or_path`, with its adapter, reads the pairs.
        output: a .jsonl or .parquet file, which appears when all pairs are measured. Per pair it holds `index` (from 0,
            through the data sets as LLaMA-Factory loads them), `fingerprint` (of its texts, see `fingerprint_of`), what
            `ches.measures` measures, and the tails' log-probability per token.
        batch_tokens: tokens at a time, padding included; at least one pair.

    Raises:
        UserError: if the recipe is wrong, the output is refused, another process writes to it, it was begun with other
            settings, or a score is not finite.
    """
    check_stage(settings)
    check_output(output)
    file = ScoreFile(output, {"settings": settings, "files": fingerprints(settings, [settings])}, SCORE)
    file.check()
    reader = _load(settings)
    with file:
        yield from file.fill(len(reader.tokens), reader.measure, partial(_by_tokens, reader.tokens, batch_tokens))


def check_stage(settings: Settings) -> None:
    """
    Raises:
        UserError: if the recipe is not for stage dpo.
    """
    if settings.get("stage", "dpo") != "dpo":
        raise UserError(f"pairs are scored by recipes of stage dpo, not {settings['stage']!r}: write stage=dpo.")


def fingerprint_of(row: Row) -> int:
    """A fingerprint, 32 bits, of a pair in LLaMA-Factory's standard format: of its prompt and its responses."""
    texts = [row["_system"], row["_tools"], row["_prompt"], row["_response"]]
    return zlib.crc32(json.dumps(texts).encode())


# --- reading pairs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Model and data of a recipe, ready to measure.

    Args:
        model: the policy before its training.
        sharing: whether prefixes are shared, as in the training.
        rows: pairs in LLaMA-Factory's standard format.
        processor, collator: LLaMA-Factory's.
        tokens: of the longer sequence of each pair; 0 for one that LLaMA-Factory skips.
    """

    model: torch.nn.Module
    sharing: PrefixSharing
    rows: Any
    processor: Any
    collator: Any
    tokens: Sequence[int]

    def measure(self, indices: list[int]) -> list[Row]:
        """The results of some pairs.

        Raises:
            UserError: if a score is not finite, or memory runs out.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            results = rows_of(indices, self.rows, self.processor, self.collator, self._columns)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            advice = "run the same command with fewer --batch-tokens to resume"
            if len(indices) == 1:
                advice = "write a smaller cutoff_len, or use a GPU with more memory"
            raise UserError(
                f"memory ran out at {len(indices)} pairs of {self.tokens[indices[0]]} tokens: {advice}."
            ) from error
        for row in results:
            if not row["skipped"]:
                row["fingerprint"] = fingerprint_of(self.rows[row["index"]])
                _check(row)
        return results

    def _columns(self, batch: Any) -> dict[str, list[Any]]:
        import torch

        from .ches import measures

        with torch.inference_mode():
            layout = self.sharing.lay_out({name: values.to(device_of(self.model)) for name, values in batch.items()})
            found = {name: values.tolist() for name, values in measures(self.model, layout).items()}
        for side in ("chosen", "rejected"):
            tails = zip(found[f"{side}_tail_logp"], found[f"{side}_tail_tokens"], strict=True)
            found[f"{side}_tail_mean_logp"] = [logp / tokens if tokens else None for logp, tokens in tails]
        return found


def _check(row: Row) -> None:
    if not all(math.isfinite(value) for value in row.values() if value is not None):
        raise UserError(
            f"row {row['index'] + 1} has a score that is not finite: check the model's weights, or write "
            "infer_dtype=float32."
        )


def _load(settings: Settings) -> _Reader:
    """Load tokenizer, data and model, by LLaMA-Factory's own functions; the data first.

    Raises:
        UserError: for a wrong recipe, and where the model or the data cannot be loaded.
    """
    from ..recipe.loading import load_pairs, load_tokenization
    from ..training.answers import AnswersProcessor
    from ..training.loading import loaded_as_trained
    from ..training.ranking import RankedCollator

    model_args, data_args, finetuning_args = parse_recipe({"stage": "dpo", **settings})
    if not data_args.dataset:
        raise UserError("the recipe names no data set: write `dataset` and `dataset_dir`.")
    data_args.streaming = False
    tools = load_tokenization(model_args, data_args)
    tokenization = {"template": tools.template, "tokenizer": tools.tokenizer, "processor": tools.processor}
    processor = AnswersProcessor(**tokenization, data_args=data_args)
    with loaded_as_trained(finetuning_args):
        rows = load_pairs(model_args, data_args)
    tokens = rows.map(
        _Tokens(processor),
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=False,
        desc="tokenizing",
    )
    model = load_model(settings, tools.tokenizer)
    return _Reader(
        model=model,
        sharing=_sharing(model, tools.tokenizer, finetuning_args.share_prefix),
        rows=rows,
        processor=processor,
        collator=RankedCollator(**tokenization, model=model, pad_to_multiple_of=8, label_pad_token_id=-100),
        tokens=list(tokens["tokens"]),
    )


class _Tokens:
    """Maps a row to the tokens of its longer sequence; picklable, for several processes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, row: Row, index: int) -> dict[str, int]:
        encoded = encode(self.processor, row, index)
        sides = (encoded[f"{side}_input_ids"][0] for side in ("chosen", "rejected")) if encoded else ()
        return {"tokens": max(map(len, sides), default=0)}


def _sharing(model: torch.nn.Module, tokenizer: Any, wanted: bool | None) -> PrefixSharing:
    """Prefix sharing as the training decides on it, but without noise: nothing is trained here.

    Raises:
        UserError: if the recipe says `share_prefix: true`, and the numbers would not be exact.
    """
    import torch

    from ..training.layout import Layout, inner_model
    from ..training.logps import token_logps
    from ..training.sharing import consider, ordinary_tokens

    def score(model: Any, layout: Layout) -> torch.Tensor:
        with torch.inference_mode():
            return token_logps(model, layout)

    vocabulary = inner_model(model).config.get_text_config().vocab_size
    tokens, device, dtype = ordinary_tokens(tokenizer, vocabulary), device_of(model), inner_model(model).dtype
    try:
        sharing = consider(wanted, [model], None, ranks_wait_for_each_other=False)
        if sharing.is_on is None:
            sharing.try_on([model], score, score, tokens, device, dtype, lambda values: values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return sharing


def _by_tokens(tokens: Sequence[int], most: int, indices: list[int]) -> Iterator[list[int]]:
    """Batches of pairs with similar lengths, longest first, so that a lack of memory shows at once.

    Args:
        tokens: of the longer sequence, by index of the pair.
        most: tokens of a batch, padding included; at least one pair.
        indices: the pairs.
    """
    longest_first = sorted(indices, key=lambda index: -tokens[index])
    start = 0
    while start < len(longest_first):
        size = max(1, most // (2 * max(1, tokens[longest_first[start]])))
        yield longest_first[start : start + size]
        start += size


# --- showing ---------------------------------------------------------------------------------------------------------


def render(output: Path) -> Iterable[Any]:
    """The scores of a file as tables and lines for a rich console.

    Raises:
        UserError: if a line is damaged.
    """
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    rows = [row for row in read_scores(output, SCORE) if not row["skipped"]]
    if not rows:
        yield Text(f"No row is a pair that LLaMA-Factory would train on, so {output} holds no scores.", style="yellow")
        return
    table = Table(
        "column", *(f"{p}%" for p in PERCENTILES), title=f"{len(rows):,} pairs, percentiles", title_justify="left"
    )
    for name in SHOWN:
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            table.add_row(name, *map(_short, np.percentile(values, PERCENTILES)))
    yield table
    worst = Table("row", *OF_WORST, title="Highest length-normalized CHES", title_justify="left")
    for row in ranked(rows)[:WORST]:
        worst.add_row(str(row["index"] + 1), *(_short(row[name]) for name in OF_WORST))
    yield worst
    yield (
        "According to arXiv 2410.08847, pairs of a higher normalized_ches lower their chosen response more. What this "
        "package's authors measured did not show it (docs/data.md)."
    )
    hint = (
        f"To write the data without such pairs: llamafactory-ext data drop RECIPE --scores {shlex.quote(str(output))}"
    )
    yield Text(hint, no_wrap=True, overflow="ignore")  # or a line that is copied would be two


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Scored pairs, the highest length-normalized CHES first; of equal ones, the first in the data."""
    return sorted(rows, key=lambda row: (-row[SCORE], row["index"]))
