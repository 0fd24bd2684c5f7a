"""How long a run takes to look its pairs up among known reference log-probabilities, and how much memory it needs.

    python benchmarks/lookup.py --count 400000

The pairs are random token ids, about as many as GSM8K's have. The yardstick is what the plugin did before: going
through the pairs row by row with the numpy formatter of `datasets`, which is timed on a part of them (and does not
work beside torchvision 0.26 or later).
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import typer

from llamafactory_ext.training.reference.cache import TOKENS, row_keys
from llamafactory_ext.training.reference.logps import ReferenceLogps

PROMPT, ANSWER, VOCABULARY = (60, 200), (80, 300), 151_936  # tokens, from and to
YARDSTICK_PAIRS = 10_000


def main(count: Annotated[int, typer.Option(min=1, help="Pairs.")] = 400_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = datasets.Dataset.from_generator(random_pairs, gen_kwargs={"count": count}, cache_dir=folder)
        before = peak()
        start = time.perf_counter()
        references = ReferenceLogps(Path(folder, "references"), {}, [dataset])
        looked_up = time.perf_counter() - start
        assert len(references.missing) == count
        print(f"{count:,} pairs: {looked_up:.1f} s, {1e6 * looked_up / count:.0f} microseconds each")
        print(f"peak memory above what was there: {peak() - before:,.0f} MiB, pages of the file itself included")

        part = min(count, YARDSTICK_PAIRS)
        try:
            row_by_row = seconds_row_by_row(dataset.select(range(part))) / part
        except ImportError as error:
            print(f"the numpy formatter of `datasets` does not work here ({error})")
            return
        print(f"the numpy formatter of `datasets`: {row_by_row * count / looked_up:.1f} times as long ({part:,} pairs)")


def random_pairs(count: int) -> Iterator[dict[str, Any]]:
    draw = np.random.default_rng(0)
    for _ in range(count):
        prompt = draw.integers(0, VOCABULARY, draw.integers(*PROMPT))
        row = {}
        for side in ("chosen", "rejected"):
            answer = draw.integers(0, VOCABULARY, draw.integers(*ANSWER))
            row[f"{side}_input_ids"] = np.concatenate([prompt, answer])
            row[f"{side}_labels"] = np.concatenate([np.full(len(prompt), -100), answer])
        yield row


def seconds_row_by_row(dataset: datasets.Dataset) -> float:
    start = time.perf_counter()
    for pair in dataset.select_columns(list(TOKENS)).with_format("numpy"):
        row_keys(pair)
    return time.perf_counter() - start


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    typer.run(main)
