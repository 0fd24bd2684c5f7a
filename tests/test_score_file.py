"""The file of scored pairs: whole lines only, one writer, one manifest, and the same end after every crash."""

from __future__ import annotations

import json
import os
import time

import pytest
from crashes import kill_at_random, walk

from llamafactory_ext.errors import UserError
from llamafactory_ext.scoring.file import ScoreFile, in_order, read_scores, unfinished_path

MANIFEST = {"settings": 1}


def rows(batch):
    return [{"index": index, "margin": index / 4, "skipped": False} for index in batch]


def score(count, batch_size=2, seconds=0.0):
    """The work of scoring so many pairs, as `score_pairs` does."""

    def work(folder):
        file = ScoreFile(folder / "scores.jsonl", MANIFEST)
        try:
            with file:
                for _ in file.fill(count, rows, in_order(batch_size)):
                    time.sleep(seconds)
        except UserError as error:
            assert "is complete" in str(error)  # noqa: PT017

    return work


def files(folder):
    """The content of the finished file; a lock that nobody holds may be left, and nothing else."""
    (name,) = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    return (folder / name).read_bytes()


def test_every_crash_leads_to_the_same_scores(tmp_path):
    assert walk(score(3), tmp_path / "folder", result=files) >= 10
    assert read_scores(tmp_path / "folder" / "scores.jsonl") == rows(range(3))


def test_killed_at_random_moments_every_pair_is_there_once(tmp_path):
    kill_at_random(score(100, seconds=0.001), tmp_path / "folder", result=files)
    assert read_scores(tmp_path / "folder" / "scores.jsonl") == rows(range(100))


def test_one_process_at_a_time(tmp_path):
    output = tmp_path / "scores.jsonl"
    with ScoreFile(output, MANIFEST):
        with pytest.raises(UserError, match="another process is writing to"):
            ScoreFile(output, MANIFEST).__enter__()
        list(ScoreFile(tmp_path / "other.jsonl", MANIFEST).__enter__().fill(1, rows, in_order(1)))
    assert not output.exists()


@pytest.mark.parametrize("torn", [b'{"mani', b"\0" * 200, b'{"manifest": "another"}\n'])
def test_a_torn_beginning_is_begun_anew_and_another_one_refused(torn, tmp_path):
    output = tmp_path / "scores.jsonl"
    unfinished_path(output).write_bytes(torn)
    if torn.endswith(b"\n"):
        with pytest.raises(UserError, match=r"was started with other settings.*: its settings is null, not 1"):
            ScoreFile(output, MANIFEST).check()
    else:
        score(3)(tmp_path)
        assert read_scores(output) == rows(range(3))


def test_a_damaged_line_is_named(tmp_path):
    output = tmp_path / "scores.jsonl"
    with ScoreFile(output, MANIFEST) as file:
        next(steps := file.fill(3, rows, in_order(1)))
        next(steps)
    unfinished_path(output).write_text(unfinished_path(output).read_text() + "{broken\n")
    with pytest.raises(UserError, match="line 3 is damaged"):
        ScoreFile(output, MANIFEST).__enter__()


def test_a_file_that_somebody_else_has_put_there_stays(tmp_path):
    output = tmp_path / "scores.jsonl"
    with ScoreFile(output, MANIFEST):
        pass
    output.write_text("mine")
    with pytest.raises(UserError, match="already exists and is complete"), ScoreFile(output, MANIFEST) as file:
        list(file.fill(3, rows, in_order(1)))
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"index": 1, "skipped": False, "margin": 1.0}, "a second row of pair 1"),
        *(({"index": index, "skipped": True}, "it names no pair") for index in (-1, 0.0, True, "x", None, [1])),
        ([["index", 0]], "it names no pair"),
        ({"index": 0}, "it does not say whether it was skipped"),
        ({"index": 0, "skipped": False}, "it has no margin"),
        ({"index": 0, "skipped": False, "margin": "x"}, "it has no margin"),
        ({"index": 0, "skipped": False, "margin": 1.0, "loss": "x"}, "loss is not a number"),
    ],
)
def test_a_row_that_nobody_has_scored_is_named(row, words, tmp_path):
    path = tmp_path / "scores.jsonl"
    lines = [{"manifest": "of them"}, {"index": 1, "skipped": False, "margin": 0.5}, row]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=f"line 3 is damaged .{words}"):
        read_scores(path)


def test_a_row_of_no_pair_is_refused_before_anything_is_scored(tmp_path):
    file = ScoreFile(tmp_path / "scores.jsonl", {})
    file.path.write_text(file.head + json.dumps({"index": 9, "skipped": True}) + "\n")
    with file, pytest.raises(UserError, match="holds pair 10 of 3"):
        next(file.fill(3, None, in_order(1)))


def test_what_is_no_file_is_refused(tmp_path):
    file = ScoreFile(tmp_path / "scores.jsonl", {})
    os.mkfifo(file.path)
    with pytest.raises(UserError, match="is not a file: remove it"):
        file.check()
