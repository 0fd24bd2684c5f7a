"""What identifies the pictures, videos and sounds of a pair."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamafactory_ext.training.reference.content import digest_of_media


@pytest.fixture
def picture(tmp_path):
    """A file's path by color; its content is the color's alone."""

    def make(color, name=None):
        path = tmp_path / f"{name or color}.png"
        Image.new("RGB", (4, 4), color).save(path)
        return str(path)

    return make


def test_a_pair_of_text_has_none():
    assert digest_of_media({}) == b""
    assert digest_of_media({"images": None, "videos": [], "audios": None}) == b""


def test_content_counts_not_where_it_is(picture):
    digest = digest_of_media({"images": [picture("red")]})
    copy = picture("red", "another name")
    as_bytes = Path(copy).read_bytes()
    for same in (copy, as_bytes, {"path": None, "bytes": as_bytes}, {"path": copy, "bytes": None}):
        assert digest_of_media({"images": [same], "videos": None}) == digest
    image = Image.open(io.BytesIO(as_bytes))
    assert digest_of_media({"images": [image]}) == digest_of_media({"images": [image.copy()]})


def test_what_differs_is_told_apart(picture):
    red, blue = picture("red"), picture("blue")
    samples = np.zeros(8, dtype=np.float32)
    pairs = [
        {"images": [red]},
        {"images": [blue]},
        {"images": [red, blue]},
        {"images": [blue, red]},
        {"videos": [red]},
        {"videos": [[red, blue]]},
        {"videos": [[red], [blue]]},
        {"images": [red], "audios": [red]},
        {"images": [Image.new("RGB", (4, 2))]},
        {"images": [Image.new("RGB", (2, 4))]},
        {"audios": [samples]},
        {"audios": [samples.astype(np.int32)]},
        {"audios": [samples.reshape(2, 4)]},
    ]
    assert len({digest_of_media(pair) for pair in pairs}) == len(pairs)


def test_pictures_that_differ_in_their_palette_only():
    images = [Image.new("P", (4, 4)) for _ in range(2)]
    images[0].putpalette([255, 0, 0])
    images[1].putpalette([0, 0, 255])
    assert len({digest_of_media({"images": [image]}) for image in images}) == 2


def test_samples_in_a_mapping_and_paths_in_an_array(picture):
    red, samples = picture("red"), np.zeros(8, dtype=np.float32)
    sound = {"array": samples, "sampling_rate": 16000, "path": None}
    assert digest_of_media({"audios": [sound]}) == digest_of_media({"audios": [samples]})
    with pytest.raises(TypeError, match="ndarray is neither"):
        digest_of_media({"images": [np.array([red])]})
    with pytest.raises(TypeError, match="NoneType is neither"):
        digest_of_media({"images": [{"bytes": None, "path": None}]})


def test_a_file_that_is_written_again_is_another(picture, tmp_path):
    path = picture("red")
    before = digest_of_media({"images": [path]})
    stamp = os.stat(path)
    Image.new("RGB", (4, 4), "blue").save(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a copy with its times has them
    assert digest_of_media({"images": [path]}) != before


def test_what_cannot_be_identified(tmp_path):
    with pytest.raises(TypeError, match="int is neither a file"):
        digest_of_media({"images": [5]})
    with pytest.raises(FileNotFoundError):
        digest_of_media({"images": [str(tmp_path / "gone.png")]})
