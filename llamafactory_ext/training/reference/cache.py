"""The cache of reference log-probabilities on disk, keyed by what the model reads of a pair.

Each reference has a folder with files of rows (key, chosen, rejected). A file's name is a hash of the folder's name and
the file's content, so truncated or altered files and files of another reference are detected and ignored. Files are
written whole or not at all, never changed, and finally merged into one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout
from llamafactory.extras import logging

from ...whole_files import write_whole
from ..ranking import Response, responses_of
from .content import digest_of_media
from .folders import ABOUT, LOCK, ROWS

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

T = TypeVar("T")

# Key of a pair -> log-probability of its chosen and its rejected response, summed over tokens, in nats.
Logps = dict[bytes, tuple[float, float]]

KEY_BYTES = 16
TOKENS = tuple(f"{side}_{column}" for side in ("chosen", "rejected") for column in ("input_ids", "labels"))


def row_keys(row: Mapping[str, Any]) -> list[bytes]:
    """The keys of a tokenized row: of its pair, or of more responses two by two, the last one twice if it is left over.

    Each is 16 bytes: a hash of token ids and labels of both sequences, and of the row's pictures.
    """
    responses, media = responses_of(row), digest_of_media(row)
    return [_pair_key(*pair, media) for pair in two_by_two(responses)]


def two_by_two(values: Sequence[T]) -> list[tuple[T, T]]:
    """The values in pairs; the last one with itself if it is left over."""
    return [(values[at], values[min(at + 1, len(values) - 1)]) for at in range(0, len(values), 2)]


def _pair_key(chosen: Response, rejected: Response, media: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for numbers in (*chosen, *rejected):
        values = np.asarray(numbers, dtype="<i8")
        digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    digest.update(media)
    return digest.digest()


def read(folder: Path) -> Logps:
    """All rows in a folder; empty if there is no folder. Damaged files are skipped with a warning."""
    logps: Logps = {}
    for path in sorted(path for path in folder.glob(ROWS) if not path.is_symlink()):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # merged by another process in the meantime
            return read(folder)
        except OSError as error:
            logger.warning_rank0_once(f"{path} cannot be read ({error}): its log-probabilities will be computed again.")
            continue
        rows = _rows(content) if path.stem == _name(folder, content) else None
        if rows is None:
            logger.warning_rank0_once(
                f"{path} is damaged or belongs to another reference: its log-probabilities will be computed again."
            )
            continue
        logps |= rows
    return logps


def _name(folder: Path, content: bytes) -> str:
    return hashlib.sha256(os.fsencode(folder.name) + content).hexdigest()


def _rows(content: bytes) -> Logps | None:
    """The rows of a file; None if it has another format, such as another release's."""
    try:
        tensors = safetensors.numpy.load(content)
        keys, logps = tensors["keys"].tobytes(), map(tuple, tensors["logps"].tolist())
        return dict(zip((keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)), logps, strict=True))
    except (safetensors.SafetensorError, KeyError, ValueError):
        return None


def append(folder: Path, logps: Logps, about: Mapping[str, Any]) -> Path:
    """Write a file with these rows and return its path; `about`, which describes the reference, goes to `about.json`.

    Raises:
        OSError: if the folder cannot be written or the disk is full; existing files are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        write_whole(folder / ABOUT, json.dumps(about, indent=2, sort_keys=True))
    content = safetensors.numpy.save(
        {
            "keys": np.frombuffer(b"".join(logps), dtype=np.uint8).reshape(len(logps), KEY_BYTES),
            "logps": np.array(list(logps.values()), dtype=np.float32).reshape(len(logps), 2),
        }
    )
    path = folder / f"{_name(folder, content)}.safetensors"
    write_whole(path, content)
    return path


def merge(folder: Path, about: Mapping[str, Any]) -> None:
    """Merge all files into one; damaged files are removed. The caller holds the lock.

    Raises:
        OSError: as for `append`.
    """
    files = list(folder.glob(ROWS))
    if len(files) > 1:
        whole = append(folder, read(folder), about)
        for path in files:
            if path != whole:
                path.unlink(missing_ok=True)


def lock(folder: Path, seconds: float) -> FileLock | None:
    """Acquire the lock for computing what the folder lacks; None if another process holds it.

    Args:
        seconds: how long to wait.

    Raises:
        OSError, NotImplementedError: if the folder cannot be written, or its file system does not support locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock
