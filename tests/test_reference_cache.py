"""The folder of reference log-probabilities: nothing lost, nothing altered, nothing computed twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from crashes import kill_at_random, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llamafactory_ext import cli
from llamafactory_ext.training.reference import cache, folders

# The values are log-probabilities in float32, -0.0 and the smallest of them included.
logp = st.floats(max_value=0, allow_nan=False, width=32)
rows = st.dictionaries(st.binary(min_size=cache.KEY_BYTES, max_size=cache.KEY_BYTES), st.tuples(logp, logp), max_size=9)
ABOUT = {"files": "of a test", "llamafactory_ext": "0"}
NEW, OLD = "aa11" * 8, "ab22" * 8
KEYS = [bytes([n]) * cache.KEY_BYTES for n in range(9)]


@given(parts=st.lists(rows, max_size=4))
@settings(deadline=None, max_examples=30)
def test_what_was_added_is_read_again(parts, tmp_path_factory):
    folder, everything = tmp_path_factory.mktemp("cache"), {}
    for part in parts:
        part = {key: part[key] for key in part.keys() - everything.keys()}
        cache.append(folder, part, ABOUT)
        everything |= part
    assert cache.read(folder) == everything
    cache.merge(folder, ABOUT)
    assert cache.read(folder) == everything
    assert len(list(folder.glob("*.safetensors"))) == min(len(parts), 1)


def test_nothing_is_read_from_no_folder(tmp_path):
    assert cache.read(tmp_path / "none") == {}


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda b: b""])
def test_a_damaged_file_is_left_out(damage, tmp_path, caplog):
    good, bad = (cache.append(tmp_path, {key: (-1.5, -2.5)}, ABOUT) for key in KEYS[:2])
    bad.write_bytes(damage(bad.read_bytes()))
    assert cache.read(tmp_path) == {KEYS[0]: (-1.5, -2.5)}
    cache.merge(tmp_path, ABOUT)
    assert list(tmp_path.glob("*.safetensors")) == [good]


def test_a_file_of_another_reference_is_left_out(tmp_path, caplog):
    own, other = tmp_path / "own", tmp_path / "other"
    cache.append(own, {KEYS[0]: (-1.5, -2.5)}, ABOUT)
    moved = cache.append(other, {KEYS[0]: (-9.0, -9.0), KEYS[1]: (-9.0, -9.0)}, ABOUT)
    moved.rename(own / moved.name)
    assert cache.read(own) == {KEYS[0]: (-1.5, -2.5)}


def test_a_file_of_another_format_is_left_out(tmp_path):
    for content in (b"", b"rows", safetensors.numpy.save({"rows": np.zeros(3)})):
        (tmp_path / f"{cache._name(tmp_path, content)}.safetensors").write_bytes(content)
    good = cache.append(tmp_path, {KEYS[0]: (-1.5, -2.5)}, ABOUT)
    assert cache.read(tmp_path) == {KEYS[0]: (-1.5, -2.5)}
    cache.merge(tmp_path, ABOUT)
    assert list(tmp_path.glob("*.safetensors")) == [good]


def test_a_user_without_a_home_has_a_folder(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folders.default_folder() == Path("/.cache/llamafactory_ext/references")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert folders.default_folder() == Path("/elsewhere/llamafactory_ext/references")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    cache.append(tmp_path, {KEYS[0]: (-1.0, -2.0)}, ABOUT)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.append(tmp_path, {KEYS[1]: (-1.0, -2.0)}, ABOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_key_is_the_tokens():
    pair = {"chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3], "rejected_input_ids": [1, 4]}
    pair |= {"rejected_labels": [-100, 4]}
    (key,) = cache.row_keys(pair)
    as_arrays = {name: np.array(values, dtype=np.int32) for name, values in pair.items()}
    assert cache.row_keys(as_arrays | {"images": None}) == [key]
    moved = {"chosen_input_ids": [1, 2], "chosen_labels": [3, -100, 2, 3], "rejected_input_ids": [1, 4]}
    changes = [{"chosen_labels": [-100, -100, 3]}, {"rejected_input_ids": [1, 5]}, moved]
    swapped = {
        name: pair[name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")] for name in pair
    }
    others = [cache.row_keys(other)[0] for other in (swapped, *(pair | change for change in changes))]
    assert len({key, *others}) == 5


# --- crashes ---------------------------------------------------------------------------------------------------------


def fill_cache(count, per_file=2, seconds=0.0):
    """The work of computing so many log-probabilities, a file at a time, as `ReferenceLogps.fill` does."""

    def work(folder):
        own = cache.lock(folder / "reference", seconds=10)
        keys = [n.to_bytes(cache.KEY_BYTES, "big") for n in range(count)]
        known = cache.read(folder / "reference")
        missing = [key for key in keys if key not in known]
        for start in range(0, len(missing), per_file):
            part = {key: (-float(key[-1]), -0.5) for key in missing[start : start + per_file]}
            cache.append(folder / "reference", part, ABOUT)
            time.sleep(seconds)
        cache.merge(folder / "reference", ABOUT)
        own.release()

    return work


def cached(folder):
    assert len(list((folder / "reference").glob("*.safetensors"))) == 1
    return cache.read(folder / "reference"), (folder / "reference" / "about.json").read_text()


def test_every_crash_leads_to_the_same_log_probabilities(tmp_path):
    assert walk(fill_cache(4), tmp_path / "cache", result=cached) >= 15


def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    kill_at_random(fill_cache(100, seconds=0.001), tmp_path / "cache", result=cached)


# --- several processes -----------------------------------------------------------------------------------------------

# Fills a cache; every batch that the reference is asked about leaves a line, and the process may die while it works.
FILL = """
import os, signal, sys
from pathlib import Path
import datasets, torch
from accelerate import PartialState
from llamafactory_ext.training.reference import logps as reference_logps

folder, log, dies_after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
reference_logps.BATCHES_PER_FILE = 3
PartialState(cpu=True)
ids = [[1, n % 7 + 2, n % 5 + 2, n] for n in range(40)]
rows = [{f"{side}_input_ids": i, f"{side}_labels": i} for i in ids for side in ("chosen",)]
rows = [row | {"rejected_input_ids": [9, *row["chosen_input_ids"]], "rejected_labels": [-100] * 5} for row in rows]
references = reference_logps.ReferenceLogps(folder, {}, [datasets.Dataset.from_list(rows)])

def score(pairs):
    with log.open("a") as file:
        file.write(f"{len(pairs)}\\n")
    if len(log.read_text().split()) == dies_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor([[-1.0 * sum(pair["chosen_input_ids"]), -0.5] for pair in pairs]).flatten()

references.fill(score, tokens=2 * 2 * 5)  # two pairs, whose longer responses have five tokens
assert not references.missing and len(references.table) == 40
column = reference_logps.from_column(references.column(rows))
assert column.tolist() == [[-1.0 * sum(i), -0.5] for i in ids]
"""


def fill(folder: Path, log: Path, dies_after: int = 0) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", FILL, str(folder), str(log), str(dies_after)])


@pytest.mark.slow
def test_killed_it_loses_one_file_at_most(tmp_path):
    folder, first, second = tmp_path / "cache", tmp_path / "first", tmp_path / "second"
    assert fill(folder, first, dies_after=11).wait(timeout=300) == -9
    assert len(cache.read(folder)) == 18  # three files of three batches of two pairs; two batches were lost
    assert fill(folder, second).wait(timeout=300) == 0
    assert sum(map(int, second.read_text().split())) == 40 - 18
    assert len(list(folder.glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_one_process_computes_and_the_other_waits(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    processes = [fill(folder, log) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert sum(map(int, log.read_text().split())) == 40


# --- llamafactory-ext cache ------------------------------------------------------------------------------------------


def run_cache(*words: object):
    return CliRunner().invoke(cli.app, ["cache", *map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture
def references(tmp_path):
    """Two references, one of them of forty days ago: three pairs in two files, and one pair."""
    new, old = tmp_path / NEW, tmp_path / OLD
    cache.append(new, {KEYS[0]: (-1.0, -2.0), KEYS[1]: (-3.0, -4.0)}, {"model": "org/new", **ABOUT})
    cache.append(new, {KEYS[2]: (-1.0, -2.0)}, {"model": "org/new", **ABOUT})
    cache.append(old, {KEYS[0]: (-1.0, -2.0)}, {"model": "org/old", **ABOUT})
    before = time.time() - 40 * 24 * 60 * 60
    for path in old.iterdir():
        os.utime(path, (before, before))
    return tmp_path


def test_cache_lists_models_pairs_and_sizes(references):
    result = run_cache("--folder", references)
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split()[:3] for line in result.output.splitlines()]
    assert [NEW[:12], "org/new", "3"] in rows
    assert [OLD[:12], "org/old", "1"] in rows
    assert [each.folder.name for each in folders.list_references(references)] == [NEW, OLD]
    assert sum(each.size for each in folders.list_references(references)) == sum(
        path.stat().st_size for path in references.glob("*/*")
    )


def test_cache_of_a_folder_that_is_empty_or_not_there(tmp_path):
    assert "holds no reference log-probabilities" in run_cache("--folder", tmp_path).output
    for words in ((), ("clear", "--all")):
        refused = run_cache(*words, "--folder", tmp_path / "nowhere")
        assert refused.exit_code == 2
        assert "is not a folder" in refused.output


@pytest.mark.parametrize(
    ("words", "left"),
    [(["aa"], {OLD}), ([OLD, OLD], {NEW}), (["--older-than", "30"], {NEW}), (["--all"], set())],
)
def test_cache_clear(references, words, left):
    result = run_cache("clear", "--folder", references, *words)
    assert result.exit_code == 0, result.output
    assert {path.name for path in references.iterdir()} == left
    assert f"{2 - len(left)} of 2 references removed" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--older-than DAYS or --all"),
        (["a"], "2 begin like that"),
        (["b"], "none begins"),
        ([""], "is no reference"),
    ],
)
def test_cache_clear_that_says_too_little_removes_nothing(references, words, message):
    result = run_cache("clear", "--folder", references, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert len(folders.list_references(references)) == 2


def test_cache_clear_leaves_what_a_training_writes_and_what_is_not_its_own(references):
    mine = references / OLD / "notes.txt"
    mine.write_text("mine")
    with cache.lock(references / NEW, 0):
        refused = run_cache("clear", "--folder", references, "--all")
        assert refused.exit_code == 2
        assert "1 of 2 references removed" in refused.output
        assert f"a training is computing {NEW[:12]}" in refused.output
    assert len(cache.read(references / NEW)) == 3
    assert run_cache("clear", "--folder", references, "--all").exit_code == 0
    assert mine.read_text() == "mine"


def test_folders_of_others_and_links_are_no_references(references, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for place, about in ((references / "model", {"who": "me"}), (references / ("cc33" * 8), {"who": "me"})):
        place.mkdir()
        (place / "about.json").write_text(json.dumps(about))
        (place / "model.safetensors").write_bytes(b"weights")
    cache.append(elsewhere / ("dd44" * 8), {KEYS[0]: (-1.0, -2.0)}, ABOUT)
    (references / ("dd44" * 8)).symlink_to(elsewhere / ("dd44" * 8))
    (references / NEW / "9.safetensors").symlink_to(references / "nowhere")
    (references / NEW / "folder.safetensors").mkdir()
    assert run_cache("clear", "--folder", references, "--all").exit_code == 0
    assert (references / "model" / "model.safetensors").read_bytes() == b"weights"
    assert (references / ("cc33" * 8) / "model.safetensors").read_bytes() == b"weights"
    assert len(cache.read(elsewhere / ("dd44" * 8))) == 1
    assert not list((references / NEW).glob("about.json"))


def test_odd_descriptions(references):
    (references / NEW / "half.safetensors").write_bytes(b"half")
    (references / NEW / "about.json").write_text('{"llamafactory_ext": "0", "model": "\\ud800[red]"}')
    (references / OLD / "about.json").write_text("[")
    ((found,),) = [folders.list_references(references)]
    assert (found.folder.name, found.model, found.pairs) == (NEW, "?[red]", 3)
    assert "?[red]" in run_cache("--folder", references).output


def test_an_exact_name_counts():
    there = [folders.Reference(Path(name), "", 0, 0, 0.0) for name in ("ooo", "oooo")]
    assert folders.choose(there, ["ooo"], everything=False, older_than=None) == there[:1]
