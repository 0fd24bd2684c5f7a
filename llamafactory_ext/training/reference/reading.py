"""The rows of tokenized data, read directly from Arrow.

The formatters of `datasets` convert number by number, and import torchvision and others under names that current
releases no longer have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 1000


def rows_of(dataset: Any) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a data set whose columns are lists, of numbers or of further lists."""
    tables = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        table = tables[start : start + ROWS_AT_ONCE]
        columns = [_lists(table[name]) for name in dataset.column_names]
        for row in zip(*columns, strict=True):
            yield dict(zip(dataset.column_names, row, strict=True))


def _lists(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    for array in column.chunks:
        values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
        yield from (values[start:end] for start, end in itertools.pairwise(offsets.tolist()))
