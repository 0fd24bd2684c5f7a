"""Answers on disk: resumed, never lost, never doubled, never mixed with another run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crashes import kill_at_random, walk

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation.generations import GENERATIONS, MANIFEST, Generation, Run
from llamafactory_ext.evaluation.models import folder_hashes


def fill(folder: Path, *indices: int) -> None:
    with Run(folder) as run:
        run.open({"a": 1})
        for index in indices:
            run.append(Generation(index, f"text {index}", [1, 2], "stop"))


def test_round_trip_with_any_text(tmp_path):
    texts = ["", "line\nbreak", "\u2028 \x85 separators", "\ud800 lone surrogate", "emoji \U0001f600", '"quotes"\\']
    with Run(tmp_path) as run:
        run.open({})
        for index, text in enumerate(texts):
            run.append(Generation(index, text, None, "length"))
    assert [generation.text for generation in Run(tmp_path).read().values()] == texts


def test_resume_knows_what_is_done(tmp_path):
    fill(tmp_path, 0, 2)
    with Run(tmp_path) as run:
        assert set(run.open({"a": 1})) == {0, 2}


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path, keep):
    fill(tmp_path, 0, 1)
    path = tmp_path / GENERATIONS
    first, second, _ = path.read_text().split("\n")
    path.write_text(first + "\n" + second[:keep])
    assert set(Run(tmp_path).read()) == {0}
    fill(tmp_path, 1)
    assert {index: g.text for index, g in Run(tmp_path).read().items()} == {0: "text 0", 1: "text 1"}


def test_a_damaged_line_in_the_middle_is_reported(tmp_path):
    fill(tmp_path, 0, 1)
    path = tmp_path / GENERATIONS
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        Run(tmp_path).read()


def test_an_answer_may_hold_what_python_takes_for_line_ends(tmp_path):
    """As in a file that another program has written again, with the characters themselves in it."""
    path = tmp_path / "generations.jsonl"
    rows = [{"index": i, "text": f"a\u2028b\x85{i}", "token_ids": None, "finish_reason": "stop"} for i in range(3)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [answer.text for answer in Run(tmp_path).read().values()] == [row["text"] for row in rows]


def test_what_a_later_release_adds_is_left_out(tmp_path):
    row = {"index": 0, "text": "5", "token_ids": None, "finish_reason": "stop", "new": 1}
    (tmp_path / "generations.jsonl").write_text(json.dumps(row) + "\n")
    assert Run(tmp_path).read()[0].text == "5"


@pytest.mark.parametrize("odd", [{"text": 5}, {"text": None}, {"index": "0"}, {"index": True}, {"index": []}])
def test_an_answer_of_another_kind_is_damaged(odd, tmp_path):
    row = {"index": 0, "text": "5", "token_ids": None, "finish_reason": "stop"} | odd
    (tmp_path / "generations.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        Run(tmp_path).read()


def test_another_run_is_refused(tmp_path):
    fill(tmp_path, 0)
    with pytest.raises(UserError, match="its a is 1, not 2"), Run(tmp_path) as run:
        run.open({"a": 2})
    with pytest.raises(UserError, match="its b is null, not 3"), Run(tmp_path) as run:
        run.open({"a": 1, "b": 3})


def test_two_processes_cannot_write_at_once(tmp_path):
    with Run(tmp_path) as run:
        run.open({})
        code = (
            "from pathlib import Path; from llamafactory_ext.evaluation.generations import Run; "
            f"Run(Path({str(tmp_path)!r})).open({{}})"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing" in other.stderr


def answer(count, seconds=0.0):
    """The work of answering so many problems."""

    def work(folder):
        with Run(folder) as run:
            done = run.open({"problems": count})
            for index in range(count):
                if index not in done:
                    run.append(Generation(index, f"answer {index} " * 50, [index] * 200, "stop"))
                    time.sleep(seconds)

    return work


def on_disk(folder):
    return {name: (folder / name).read_bytes() for name in (MANIFEST, GENERATIONS)}


def test_every_crash_leads_to_the_same_answers(tmp_path):
    assert walk(answer(3), tmp_path / "run", result=on_disk) >= 10


def test_killed_at_random_moments_every_answer_is_there_once(tmp_path):
    kill_at_random(answer(100, seconds=0.001), tmp_path / "run", result=on_disk)


def test_folder_hashes(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    assert folder_hashes(str(tmp_path)) == {
        "a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "b.txt": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }


@pytest.mark.parametrize("changes", [{"index": -1}, {"index": 10**30}, {"token_ids": 7}, {"token_ids": [[1]]}])
def test_an_answer_that_no_engine_gives_is_named(changes, tmp_path):
    run = Run(tmp_path)
    line = {"index": 0, "text": "4", "token_ids": None, "finish_reason": "stop"} | changes
    run.path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"remove (it|that line)"):
        run.refuse_others(run.read(), 3)


def test_a_manifest_of_endless_lists_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        Run(tmp_path).manifest()
