"""Reference log-probabilities on disk, found by the token ids of a pair.

A folder per reference holds files of rows (key, chosen, rejected), each named after the hash of the folder's name and
its content: one that was cut off, altered, or moved from another reference's folder is seen to be, and left out. Files
appear whole or not at all and are only added to, until one that holds everything replaces them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout
from llamafactory.extras import logging

from ...whole_files import write_whole
from .folders import ABOUT, LOCK, ROWS

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

# Pair -> summed log-probabilities of its chosen and its rejected response, in nats.
Logps = dict[bytes, tuple[float, float]]

KEY_BYTES = 16
TOKENS = tuple(f"{side}_{column}" for side in ("chosen", "rejected") for column in ("input_ids", "labels"))


def pair_key(pair: Mapping[str, Any]) -> bytes:
    """What a tokenized pair is found by: token ids and labels of both answers, and nothing else."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in TOKENS:
        values = np.asarray(pair[name], dtype="<i8")
        digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    return digest.digest()


def read(folder: Path) -> Logps:
    """Everything that the folder holds; empty if there is none. Damaged files are named in a warning."""
    logps: Logps = {}
    for path in sorted(path for path in folder.glob(ROWS) if not path.is_symlink()):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # replaced by another process a moment ago
            return read(folder)
        except OSError as error:
            logger.warning_rank0_once(f"{path} cannot be read ({error}): what it holds is computed again.")
            continue
        rows = _rows(content) if path.stem == _name(folder, content) else None
        if rows is None:
            logger.warning_rank0_once(
                f"{path} is damaged, or belongs to another reference: the log-probabilities in it are computed again."
            )
            continue
        logps |= rows
    return logps


def _name(folder: Path, content: bytes) -> str:
    return hashlib.sha256(os.fsencode(folder.name) + content).hexdigest()


def _rows(content: bytes) -> Logps | None:
    """The rows of a file; None if it holds something else, as another release's may."""
    try:
        tensors = safetensors.numpy.load(content)
        keys, logps = tensors["keys"].tobytes(), map(tuple, tensors["logps"].tolist())
        return dict(zip((keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)), logps, strict=True))
    except (safetensors.SafetensorError, KeyError, ValueError):
        return None


def append(folder: Path, logps: Logps, about: Mapping[str, Any]) -> Path:
    """Add a file with these rows and return its path; `about` says in `about.json` which reference this is.

    Raises:
        OSError: if the folder cannot be written, or the disk is full; what was there is untouched.
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
    """Replace all files by one, with whatever a bad disk left there. The caller holds the lock.

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
    """The right to compute what the folder lacks, which one process has at a time; None if another one keeps it.

    Args:
        seconds: how long to wait for it.

    Raises:
        OSError, NotImplementedError: if the folder cannot be written, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock
