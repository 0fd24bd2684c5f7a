"""What identifies the pictures, videos and sounds of pairs: their content, and what turns it into a model's inputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ... import hashes
from ...distributions import version

MEDIA = ("images", "videos", "audios")  # the columns in which LLaMA-Factory keeps them
# LLaMA-Factory's settings of how they are read, or how these begin.
SETTINGS = ("image_", "video_", "audio_", "crop_to_patches", "use_audio_in_video")
PROCESSORS = ("image_processor", "video_processor", "feature_extractor")
LIBRARIES = ("pillow", "torchvision", "av", "torchaudio", "librosa", "soundfile")
FILES = 2**16  # whose hashes are remembered


def columns_with_media(dataset: Any) -> list[str]:
    """The columns of a tokenized data set that hold pictures, videos or sounds in some row."""
    names = [name for name in MEDIA if name in dataset.column_names]
    # Only these columns: rows in another order than on disk are copied.
    columns = dataset.select_columns(names).with_format("arrow")[:]
    return [name for name in names if columns[name].null_count < len(dataset)]


def holds_media(dataset: Any) -> bool:
    """Whether a tokenized data set is known to hold pictures, videos or sounds; unknown of a stream."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "__len__") and bool(columns_with_media(dataset))


def digest_of_media(pair: Mapping[str, Any]) -> bytes:
    """A hash of the content of a pair's pictures, videos and sounds, in their order; empty if it has none.

    Raises:
        OSError: if a file cannot be read.
        TypeError: if something is neither a file, nor bytes, nor an image, nor numbers.
    """
    held = {name: pair[name] for name in MEDIA if pair.get(name) is not None and len(pair[name])}
    digest = hashlib.sha256()
    for name, values in held.items():
        digest.update(name.encode())
        for part in _parts(values):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest() if held else b""


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of a value, a list with how many there are."""
    if isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for each in value:
            yield from _parts(each)
    elif isinstance(value, str | os.PathLike):
        yield _of_file(os.fspath(value))
    elif isinstance(value, bytes):
        yield hashlib.sha256(value).digest()  # as if it were a file
    elif isinstance(value, Mapping):  # of `datasets`: bytes, a path, or samples
        held = [value[name] for name in ("bytes", "path", "array") if value.get(name) is not None]
        yield from _parts(held[0] if held else None)
    elif hasattr(value, "getpalette"):  # an image of Pillow
        yield repr((value.mode, value.size, value.getpalette())).encode() + value.tobytes()
    elif getattr(getattr(value, "dtype", None), "kind", None) in ("b", "i", "u", "f"):  # samples
        yield repr((value.shape, str(value.dtype))).encode() + value.tobytes()
    else:
        raise TypeError(f"{type(value).__name__} is neither a file, nor bytes, nor an image, nor numbers")


def _of_file(name: str) -> bytes:
    status = os.stat(name)
    return _of_version(name, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)


@lru_cache(FILES)
def _of_version(name: str, *version: int) -> bytes:
    return bytes.fromhex(hashes.of_file(Path(name)))


def describe_processing(collator: Any, model_args: Any) -> dict[str, Any]:
    """What a model's inputs depend on beside the content: processors, settings, template, libraries.

    Args:
        collator: LLaMA-Factory's pairwise collator.
        model_args: LLaMA-Factory's.
    """
    parts = {name: getattr(collator.processor, name, None) for name in PROCESSORS}
    settings = [field.name for field in fields(model_args) if field.name.startswith(SETTINGS)]
    plugin = collator.template.mm_plugin
    return {
        "processors": {name: part.to_dict() for name, part in parts.items() if part is not None},
        "settings": {name: str(getattr(model_args, name)) for name in settings},
        "template": {"plugin": type(plugin).__name__, **{name: str(value) for name, value in vars(plugin).items()}},
        "libraries": {name: version(name) for name in LIBRARIES},
    }
