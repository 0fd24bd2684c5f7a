"""Pairs of a model's own answers: right against wrong, each answer once before any twice, no sample lost."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from typer.testing import CliRunner

from llamafactory_ext.cli import app
from llamafactory_ext.data.samples import DISTANCES, Choice, choose_pairs

PROMPT = "Solve it.\n"


def sample(problem: int, text: str, right: bool, number: int = 0, **changes) -> dict:
    """A line as `eval sample` writes it."""
    row = {
        "index": 100 * problem + number,
        "text": text,
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "refused": None,
        "left_out": [],
        "problem": f"p{problem}",
        "sample": number,
        "seed": number,
        "instruction": f"{PROMPT}Problem {problem}?",
        "gold": "1",
        "answer": "1" if right else "2",
        "correct": right,
        "degenerate": False,
        "run": "a run",
    }
    return {**row, **changes}


def group(problem: int, right: list[str], wrong: list[str], **changes) -> list[dict]:
    texts = [(text, True) for text in right] + [(text, False) for text in wrong]
    return [sample(problem, text, is_right, number, **changes) for number, (text, is_right) in enumerate(texts)]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def invoke(*words: object):
    return CliRunner().invoke(app, ["data", "from-samples", *map(str, words)], prog_name="llamafactory-ext")


def made(tmp_path, rows, *words) -> list[dict]:
    """The pairs of these samples."""
    output = tmp_path / "pairs.jsonl"
    done = invoke(write(tmp_path / "samples.jsonl", rows), "--output", output, "--overwrite", *words)
    assert done.exit_code == 0, done.output
    return lines(output)


def reasons(tmp_path) -> dict[str, int]:
    path = tmp_path / "pairs.dropped.jsonl"
    return dict(Counter(row["reason"] for row in lines(path))) if path.exists() else {}


# --- which answers make a pair ---------------------------------------------------------------------------------------

TEXTS = st.lists(st.text("ab 1", max_size=6), min_size=1, max_size=6, unique=True)


@given(TEXTS, TEXTS, st.integers(1, 40), st.sampled_from(Choice), st.integers(0, 3))
def test_no_answer_is_used_twice_before_all_are_used_once(right, wrong, count, choice, seed):
    distance = DISTANCES[choice]()
    chosen = choose_pairs(right, wrong, count, distance, random.Random(seed))
    assert chosen == choose_pairs(right, wrong, count, distance, random.Random(seed))
    assert len(chosen) == len(set(chosen)) == min(count, len(right) * len(wrong))
    for side, texts in ((0, right), (1, wrong)):
        used = Counter(pair[side] for pair in chosen)
        assert set(used) <= set(range(len(texts)))
        for length in range(1, len(chosen) + 1):
            before = Counter(pair[side] for pair in chosen[:length])
            assert max(before.values()) == 1 or len(before) == len(texts)
    first = distance(right[chosen[0][0]], wrong[chosen[0][1]])
    assert first == min(distance(a, b) for a in right for b in wrong)


def test_closest_by_edits_or_by_length():
    right = ["3 + 4 = 7, so 7.", "The sum of both is 7."]
    wrong = ["3 + 4 = 8, so 8.", "The product is 12 here.", "no"]

    def first(choice):
        ((i, j),) = choose_pairs(right, wrong, 1, DISTANCES[choice](), random.Random(0))
        return right[i], wrong[j]

    assert first(Choice.closest) == (right[0], wrong[0])
    assert first(Choice.length) == (right[0], wrong[0])
    long = [*wrong, "Twenty-one characters"]
    ((i, j),) = choose_pairs(right[1:], long, 1, DISTANCES[Choice.length](), random.Random(0))
    assert (i, j) == (0, 3)


def test_a_distance_is_a_share_of_the_longer_text():
    assert DISTANCES[Choice.closest]()("abcd", "abXdYZ") == Levenshtein.distance("abcd", "abXdYZ") / 6


def test_the_seed_decides_what_the_choice_leaves_open():
    texts = [str(n) for n in range(8)]
    found = {choose_pairs(texts, texts, 1, DISTANCES[Choice.random](), random.Random(s))[0] for s in range(50)}
    assert len(found) > 20


# --- the command -----------------------------------------------------------------------------------------------------


def test_right_answers_against_wrong_ones(tmp_path):
    rows = group(0, ["r0", "r1"], ["w0", "w1", "w2"]) + group(1, ["r2"], []) + group(2, [], ["w3", "w4"])
    pairs = made(tmp_path, rows)
    assert len(pairs) == 4
    assert {pair["instruction"] for pair in pairs} == {f"{PROMPT}Problem 0?"}
    assert all(set(pair) == {"instruction", "chosen", "rejected"} for pair in pairs)
    assert {pair["chosen"] for pair in pairs} == {"r0", "r1"}
    assert {pair["rejected"] for pair in pairs} == {"w0", "w1", "w2"}
    assert reasons(tmp_path) == {
        "the problem has no wrong sample to reject": 1,
        "the problem has no right sample to choose": 2,
    }


def test_what_is_reported(tmp_path):
    rows = group(0, ["r0"], ["w0", "w1"]) + group(1, ["r1"], [])
    output = tmp_path / "pairs.jsonl"
    done = invoke(write(tmp_path / "samples.jsonl", rows), "--output", output, "--per-problem", 1)
    shown = " ".join(done.output.split())
    assert "1 pairs, from 1 of 2 problems." in shown
    assert "66.7%" in shown  # pass@1: a third and all
    assert "`dataset: pairs` is registered" in shown
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    assert info == {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    assert reasons(tmp_path) == {
        "left over: the problem has enough without it": 1,
        "the problem has no wrong sample to reject": 1,
    }
    assert all("token_ids" not in row["row"] for row in lines(tmp_path / "pairs.dropped.jsonl"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"degenerate": True}, "right, but degenerate"),
        ({"finish_reason": "length"}, "right, but cut off at the token limit"),
    ],
)
def test_a_flawed_answer_is_rejected_but_never_chosen(tmp_path, changes, reason):
    flawed = [sample(0, "flawed right", True, 10, **changes), sample(0, "flawed wrong", False, 11, **changes)]
    (pair,) = made(tmp_path, group(0, ["right"], []) + flawed)
    assert (pair["chosen"], pair["rejected"]) == ("right", "flawed wrong")
    assert reasons(tmp_path) == {reason: 1}
    nothing = invoke(write(tmp_path / "samples.jsonl", flawed), "--output", tmp_path / "none.jsonl")
    assert nothing.exit_code == 2
    assert "nothing was written" in nothing.output
    assert not (tmp_path / "none.jsonl").exists()


def test_a_text_counts_once_and_an_empty_one_not_at_all(tmp_path):
    rows = group(0, ["right", "right", "right"], ["wrong", "wrong", " \n"])
    assert len(made(tmp_path, rows)) == 1
    assert reasons(tmp_path) == {"another sample of the problem has the same text": 3, "the text is empty": 1}


def test_refused_samples_and_those_asked_again(tmp_path):
    """A refused sample is asked again, and the last line counts, as where samples are resumed."""
    again = [sample(0, "", False, 1, refused="too long"), sample(0, "old", False, 2), sample(0, "new", False, 2)]
    (pair,) = made(tmp_path, group(0, ["right"], []) + again)
    assert pair["rejected"] == "new"
    assert reasons(tmp_path) == {"the server refused the question": 1, "the sample is in the file again": 1}


def test_the_order_of_the_file_does_not_matter(tmp_path):
    rows = [row for n in range(4) for row in group(n, [f"r{n}{i}" for i in range(3)], [f"w{n}{i}" for i in range(3)])]
    expected = made(tmp_path, rows, "--per-problem", 2)
    random.Random(1).shuffle(rows)
    assert made(tmp_path, rows, "--per-problem", 2) == expected
    assert [pair["instruction"] for pair in expected] == [f"{PROMPT}Problem {n}?" for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert made(tmp_path, rows, "--per-problem", 2, "--seed", 1) != expected


def test_ranked_rows(tmp_path):
    rows = group(0, ["r0", "r1", "r2"], ["w0"]) + group(1, ["r3"], ["w1", "w2", "w3"]) + group(2, ["r4"], [])
    first, second = made(tmp_path, rows, "--ranked", "--per-problem", 2)
    assert set(first) == {"instruction", "answers", "scores"}
    assert first["scores"] == [1.0, 1.0, 0.0]
    assert set(first["answers"][:2]) < {"r0", "r1", "r2"}
    assert first["answers"][2] == "w0"
    assert second["scores"] == [1.0, 0.0, 0.0]
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))["pairs"]
    columns = {"prompt": "instruction", "answers": "answers", "scores": "scores"}
    assert info == {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}


def test_a_name_that_is_registered_with_other_columns_is_refused(tmp_path):
    rows = group(0, ["r"], ["w"])
    made(tmp_path, rows)
    before = (tmp_path / "pairs.jsonl").read_bytes()
    refused = invoke(tmp_path / "samples.jsonl", "--output", tmp_path / "pairs.jsonl", "--overwrite", "--ranked")
    assert refused.exit_code == 2
    assert "registers 'pairs' without the columns answers and scores: choose another --output" in refused.output
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_a_system_turn_becomes_a_column(tmp_path):
    (pair,) = made(tmp_path, group(0, ["r"], ["w"], system="Brief."))
    assert pair["system"] == "Brief."
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))["pairs"]
    assert info["columns"]["system"] == "system"


def test_the_folder_of_a_run_will_do(tmp_path):
    folder = tmp_path / "runs"
    (folder / "base").mkdir(parents=True)
    write(folder / "base" / "generations.jsonl", group(0, ["r"], ["w"]))
    for name, source in (("a", folder), ("b", folder / "base"), ("c", folder / "base" / "generations.jsonl")):
        assert invoke(source, "--output", tmp_path / f"{name}.jsonl").exit_code == 0
        assert len(lines(tmp_path / f"{name}.jsonl")) == 1
    (folder / "other").mkdir()
    write(folder / "other" / "generations.jsonl", group(0, ["r"], ["w"]))
    several = invoke(folder, "--output", tmp_path / "d.jsonl")
    assert several.exit_code == 2
    assert "contains several runs: name one" in several.output


# --- hostile files ---------------------------------------------------------------------------------------------------


def test_samples_of_two_runs_are_refused(tmp_path):
    rows = group(0, ["r"], ["w"]) + group(1, ["r"], ["w"], run="hotter")
    refused = invoke(write(tmp_path / "samples.jsonl", rows), "--output", tmp_path / "pairs.jsonl")
    assert refused.exit_code == 2
    assert "mixes samples of several runs (see lines 1 and 3): name those of one run." in refused.output
    assert not (tmp_path / "pairs.jsonl").exists()


def test_broken_lines_are_dropped_and_told(tmp_path):
    source = write(tmp_path / "samples.jsonl", group(0, ["r"], ["w"]))
    good = (tmp_path / "samples.jsonl").read_text()
    broken = ["{broken", "[1]", json.dumps(sample(0, "half \ud800", False, 9)), good[:50]]
    (tmp_path / "samples.jsonl").write_text(good + "\n".join(broken))
    done = invoke(source, "--output", tmp_path / "pairs.jsonl")
    assert done.exit_code == 0, done.output
    assert reasons(tmp_path) == {
        "not valid JSON": 2,
        "not a JSON object": 1,
        "contains half a character (a lone surrogate), which no tokenizer accepts": 1,
    }


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("index", "0"),
        ("index", True),
        ("text", None),
        ("correct", "true"),
        ("degenerate", None),
        ("answer", 1),
        ("finish_reason", 3),
    ],
)
def test_a_column_of_another_kind_is_named(tmp_path, column, value):
    rows = [*group(0, ["r"], ["w"]), {**sample(0, "odd", False, 9), column: value}]
    assert len(made(tmp_path, rows)) == 1
    (reason,) = reasons(tmp_path)
    assert f"the column {column!r} is missing, or of another kind" in reason


def test_columns_of_a_later_release_are_ignored(tmp_path):
    assert len(made(tmp_path, group(0, ["r"], ["w"], later={"x": 1}))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing was written, because no row makes a pair: the source is empty"),
        ("\n\n", "the source is empty"),
        (json.dumps({"index": 0, "text": "x", "finish_reason": "stop"}) + "\n", "no sample of `llamafactory-ext eval"),
        (json.dumps({"question": "Q?", "answer": "#### 1"}) + "\n", "no sample of `llamafactory-ext eval sample`"),
    ],
)
def test_files_without_samples(tmp_path, content, message):
    (tmp_path / "samples.jsonl").write_text(content)
    refused = invoke(tmp_path / "samples.jsonl", "--output", tmp_path / "pairs.jsonl")
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_folder_without_samples(tmp_path):
    refused = invoke(tmp_path, "--output", tmp_path / "pairs.jsonl")
    assert refused.exit_code == 2
    assert "has no samples: make them with `llamafactory-ext eval sample" in " ".join(refused.output.split())


def test_an_existing_file_is_kept(tmp_path):
    source = write(tmp_path / "samples.jsonl", group(0, ["r"], ["w"]))
    assert invoke(source, "--output", tmp_path / "pairs.jsonl").exit_code == 0
    assert "already exists" in invoke(source, "--output", tmp_path / "pairs.jsonl").output
    assert "is what the pairs are made from" in invoke(source, "--output", source, "--overwrite").output
