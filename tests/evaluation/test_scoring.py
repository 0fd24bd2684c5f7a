"""Accuracies, intervals, signs of degeneration, and the comparison of runs."""

from __future__ import annotations

import json
import os
import random
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation.compare import Scored, compare, load_scored
from llamafactory_ext.evaluation.degeneration import ends_in_loop, inspect_output, is_degenerate, seq_rep, zlib_ratio
from llamafactory_ext.evaluation.generations import Generation
from llamafactory_ext.evaluation.questions import PAPER_PROMPT, Question, load_prompt, load_questions, messages
from llamafactory_ext.evaluation.scoring import score_run

GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[3] / "shared" / "data" / "gsm8k"))
PROSE = "Tom has 3 boxes of 4 pens, so 3 * 4 = 12 pens. He gives away 5 of them, which leaves 12 - 5 = 7 pens."


# --- degeneration -----------------------------------------------------------------------------------------------------


def test_seq_rep():
    assert seq_rep([1, 2, 3], 4) == 0.0  # too short
    assert seq_rep([1, 2, 3, 4, 5], 4) == 0.0
    assert seq_rep([1] * 8, 4) == 0.8  # five 4-grams, one distinct


def test_zlib_ratio():
    assert zlib_ratio("") == 0.0
    assert zlib_ratio(PROSE) < 2
    assert zlib_ratio("so the answer is 5 " * 100) > 10


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("Let me think. " * 4, True),
        (PROSE + " and then again" * 5, True),
        (PROSE + " and then again" * 5 + "\n", True),
        ("ha" * 20, True),
        ("ha" * 10, False),  # too little to tell
        (PROSE, False),
        (PROSE * 3, False),
        ("Let me think. " * 6 + "The answer is 5.", False),  # it got out
        ("1/3 = 0.3333", False),
        ("", False),
    ],
)
def test_ends_in_loop(text, loop):
    assert ends_in_loop(text) is loop


def test_a_period_longer_than_the_limit_is_no_loop():
    rng = random.Random(0)
    passage = "".join(rng.choice("abcdefgh ") for _ in range(201))
    assert not ends_in_loop(passage * 5)
    assert ends_in_loop(passage[:200] * 4)


def test_flags_of_one_output():
    signs = inspect_output("", None, "stop")
    assert signs.empty
    assert signs.degenerate
    cut_off = inspect_output(PROSE, None, "length")
    assert cut_off.cut_off
    assert not cut_off.degenerate  # long is not broken
    assert inspect_output("any text", [7] * 50, "stop").seq_rep_4 == pytest.approx(1 - 1 / 47)
    assert is_degenerate("the same words " * 20)
    assert not is_degenerate(PROSE)


@given(st.text())
@settings(deadline=None)
def test_inspection_never_raises(text):
    inspect_output(text)


# --- scores -----------------------------------------------------------------------------------------------------------


def questions(count: int) -> list[Question]:
    return [Question(index, f"Question {index}?", Decimal(index)) for index in range(count)]


def answer(index: int, text: str, reason: str = "stop") -> Generation:
    return Generation(index, text, None, reason)


def test_summary_by_hand():
    generations = {
        0: answer(0, "So the answer is: 0"),  # right in every tier
        1: answer(1, "The answer is 1."),  # not in the prompt's words
        2: answer(2, "I get 2"),  # flexible only
        3: answer(3, "So the answer is: 9\nSo the answer is: 3", "length"),  # right, in conflict with itself
        4: answer(4, ""),  # and 5 is missing
    }
    result = score_run(questions(6), generations)
    summary = result["summary"]
    assert [summary[tier]["correct"] for tier in ("strict_prompt", "strict", "flexible")] == [2, 3, 4]
    assert summary["strict"]["accuracy"] == 0.5
    # Wilson, n = 6, p = 1/2, z = 1.96: center 1/2, half width z sqrt(1/24 + z^2/144) / (1 + z^2/6)
    assert summary["strict"]["wilson_95"] == pytest.approx([0.18762, 0.81238], abs=1e-4)
    assert summary["strict"]["conflicts"] == 1
    assert summary["missing"] == 1
    assert summary["degeneration"]["empty"] == 0.2
    assert summary["degeneration"]["cut_off"] == 0.2
    assert [row["strict"]["answer"] for row in result["rows"]] == ["0", "1", None, "3", None, None]


def test_degenerate_outputs_are_scored_like_any_other():
    text = "So the answer is: 0\n" * 30
    result = score_run(questions(1), {0: answer(0, text)})
    assert result["summary"]["strict"]["correct"] == 1
    assert result["summary"]["degeneration"]["degenerate"] == 1.0


# --- comparing --------------------------------------------------------------------------------------------------------


def run_of(verdicts: list[bool], extractor: str = "1", data: str = "gsm8k") -> Scored:
    return Scored(extractor, {n: f"{data}{n}" for n in range(len(verdicts))}, dict(enumerate(verdicts)))


def test_mcnemar_by_hand():
    # 8 problems only the second run has right, 1 only the first: p = 2 (C(9,0) + C(9,1)) / 2^9 = 20/512.
    first = run_of([True] * 3 + [False] * 8 + [True] + [False] * 2)
    second = run_of([True] * 3 + [True] * 8 + [False] + [False] * 2)
    (row,) = compare({"dpo": first, "minor_dpo": second})
    counts = [row[key] for key in ("both", "only_baseline", "only_run", "neither")]
    assert counts == [3, 1, 8, 2]
    assert row["p"] == pytest.approx(20 / 512)
    assert row["p_holm"] == row["p"]
    assert row["difference"] == pytest.approx(7 / 14)


def test_holm_over_several():
    base = run_of([False] * 10)
    runs = {"base": base, "a": run_of([True] * 8 + [False] * 2), "b": run_of([True] * 6 + [False] * 4)}
    a, b = compare(runs)
    assert a["p"] == pytest.approx(2 / 2**8)
    assert b["p"] == pytest.approx(2 / 2**6)
    assert a["p_holm"] == pytest.approx(2 * a["p"])  # the smaller of two is doubled
    assert b["p_holm"] == pytest.approx(b["p"])


def test_a_run_on_fewer_problems_is_compared_only_if_asked_to():
    runs = {"whole": run_of([True, False] * 5), "few": run_of([True, True, True]), "more": run_of([False] * 4)}
    with pytest.raises(UserError, match="whole was asked 10 problems and few 3, with 3 in common: add --shared"):
        compare(runs)
    few, more = compare(runs, shared=True)  # on problems 0 to 2, which whole has right, wrong, right
    assert (few["problems"], few["baseline_accuracy"], few["accuracy"]) == (3, pytest.approx(2 / 3), 1.0)
    assert (more["problems"], more["only_baseline"]) == (3, 2)


def test_runs_on_different_problems_are_refused():
    for shared in (False, True):
        with pytest.raises(UserError, match="different problems, from number 1 on"):
            compare({"a": run_of([True]), "b": run_of([True], data="rephrased")}, shared)


def test_runs_without_a_problem_in_common_are_refused():
    elsewhere = Scored("1", {7: "gsm8k7"}, {7: True})
    with pytest.raises(UserError, match="have no problem in common"):
        compare({"a": run_of([True]), "b": elsewhere}, shared=True)


def test_answers_read_by_different_versions_are_refused():
    with pytest.raises(UserError, match="a and c were scored with versions 1 and 2 of the answer extractor"):
        compare({"a": run_of([True]), "b": run_of([True]), "c": run_of([True], extractor="2")})


def test_a_folder_without_scores_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no results\.json"):
        load_scored(tmp_path, "strict")
    (tmp_path / "results.json").write_text(json.dumps({"base": {}}))
    with pytest.raises(UserError, match="a run's own folder"):
        load_scored(tmp_path, "strict")


# --- questions --------------------------------------------------------------------------------------------------------


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_prompt_is_the_papers():
    (turn,) = messages(Question(0, "How many?", Decimal(1)), load_prompt("paper"), None)
    assert turn == {
        "role": "user",
        "content": "You are a helpful assistant. Please answer follow question step by step and give final answer in a "
        "separate line using the brief format So the answer is: . Below is the question:\nHow many?",
    }
    assert load_prompt("paper") == PAPER_PROMPT


def test_other_prompts_and_system_turns(tmp_path):
    question = Question(0, "How {many}?", Decimal(1))
    assert messages(question, load_prompt("plain"), "")[0] == {"role": "system", "content": ""}
    file = tmp_path / "prompt.txt"
    file.write_text("Q: {question}\nA:\n")
    assert messages(question, load_prompt(str(file)), None) == [{"role": "user", "content": "Q: How {many}?\nA:"}]
    file.write_text("no place")
    with pytest.raises(UserError, match=r"does not contain \{question\}"):
        load_prompt(str(file))
    with pytest.raises(UserError, match="neither paper nor plain nor a file"):
        load_prompt("other")


def test_questions_of_jsonl_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"Q{n}?", "answer": f"{n}+1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1},000"} for n in range(3)]
    source = write_rows(tmp_path / "test.jsonl", *rows)
    found, digest = load_questions(source)
    assert [question.gold for question in found] == [1000, 2000, 3000]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert load_questions(str(tmp_path / "test.parquet")) == (found, digest)
    limited, other = load_questions(source, limit=2)
    assert len(limited) == 2
    assert other != digest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no problems"),
        ([{"question": "Q?"}], "line 1 needs `question` and `answer`"),
        ([["Q?", "A"]], "line 1 is not a JSON object"),
        ([{"question": "Q?", "answer": "5"}], "must end in a line `#### N`"),
        ([{"question": "Q?", "answer": "#### five"}], "must end in a line `#### N`"),
    ],
)
def test_bad_data_is_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_questions(write_rows(tmp_path / "test.jsonl", *rows))


def test_missing_and_broken_data_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_questions(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        load_questions(str(tmp_path / "broken.jsonl"))


def test_gold_solutions_of_the_shipped_sample_score_100_percent():
    source = Path(__file__).parents[2] / "data" / "gsm8k_sample.jsonl"
    found, _ = load_questions(str(source))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    summary = score_run(found, {index: answer(index, row["answer"]) for index, row in enumerate(rows)})["summary"]
    assert summary["problems"] == 32
    assert summary["strict"]["accuracy"] == 1.0


@pytest.mark.skipif(not GSM8K.is_dir(), reason="set GSM8K_DIR to a folder with GSM8K's test.jsonl")
def test_gold_solutions_of_the_real_test_set_score_100_percent():
    found, _ = load_questions(str(GSM8K / "test.jsonl"))
    rows = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text().splitlines()]
    assert len(found) == 1319
    generations = {index: answer(index, row["answer"]) for index, row in enumerate(rows)}
    summary = score_run(found, generations)["summary"]
    assert summary["strict"]["accuracy"] == summary["flexible"]["accuracy"] == 1.0
    assert summary["strict_prompt"]["answered"] == 0
    assert summary["degeneration"]["degenerate"] == 0.0
