"""Recorded runs read again: scored against what they were asked only, and compared; the numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
from recorded import record_run, write_problems
from typer.testing import CliRunner

from llamafactory_ext.evaluation import compare, gsm8k


def invoke(app, *words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def on_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def data(tmp_path):
    return write_problems(tmp_path / "test.jsonl", 12)


def test_answers_are_scored_against_their_own_problems_only(data, tmp_path):
    """The same answers have 100 % of their problems right, and none of those with other gold answers."""
    output = tmp_path / "runs"
    record_run(output / "base", data, {n: f"So the answer is: {n}" for n in range(12)})
    assert invoke(gsm8k.app, "--score-only", "--data", data, "--output", output).exit_code == 0
    scored = (output / "results.json").read_bytes()
    assert json.loads(scored)["base"]["strict"]["accuracy"] == 1.0

    other = write_problems(tmp_path / "other.jsonl", 12, gold=5)
    for words in (("--data", other), ("--data", data, "--limit", 5)):
        refused = invoke(gsm8k.app, "--score-only", "--output", output, *words)
        assert refused.exit_code == 2
        count = 12 if other in words else 5
        assert (
            f"{output / 'base'} has answers to 12 problems of {data}, not to the {count} problems of {words[1]}"
            in on_one_line(refused.output)
        )
    assert (output / "results.json").read_bytes() == scored


def test_one_run_of_other_problems_stops_the_scoring_of_all(data, tmp_path):
    output = tmp_path / "runs"
    record_run(output / "base", data, {0: "#### 0"})
    record_run(output / "few", data, {0: "#### 0"}, limit=3)
    assert invoke(gsm8k.app, "--score-only", "--data", data, "--output", output).exit_code == 2
    assert not list(output.glob("**/results.json"))


def test_a_damaged_manifest_is_named(data, tmp_path):
    record_run(tmp_path / "runs" / "base", data, {})
    (tmp_path / "runs" / "base" / "manifest.json").write_text("{")
    refused = invoke(gsm8k.app, "--score-only", "--data", data, "--output", tmp_path / "runs")
    assert refused.exit_code == 2
    assert "manifest.json cannot be read" in on_one_line(refused.output)


def test_compare_by_hand(data, tmp_path):
    """Twelve problems. Their numbers are the right answers; what is not listed is answered with 99.

    base  right: 0 1 2 3              4 of 12 = 33.3 %
    dpo   right: 0 1 4 5 6 7 8 9 10   9 of 12 = 75.0 %, and no answer at all to 11
    both: 0 1 (2); base only: 2 3 (2); dpo only: 4 to 10 (7); neither: 11 (1)
    McNemar, exact, 9 discordant: p = 2 (C(9,0) + C(9,1) + C(9,2)) / 2^9 = 2 * 46 / 512 = 0.1797
    On the first four problems: base 4 of 4; dpo 2 of 4; discordant 2, both for base: p = 2 / 2^2 = 0.5
    """
    base = {n: f"So the answer is: {n if n < 4 else 99}" for n in range(12)}
    dpo = {n: f"So the answer is: {99 if n in (2, 3) else n}" for n in range(11)}
    output, few = tmp_path / "runs", tmp_path / "few"
    record_run(output / "base", data, base)
    record_run(output / "dpo", data, dpo)
    record_run(few / "dpo", data, {n: dpo[n] for n in range(4)}, limit=4)
    assert invoke(gsm8k.app, "--score-only", "--data", data, "--output", output).exit_code == 0
    assert invoke(gsm8k.app, "--score-only", "--data", data, "--limit", 4, "--output", few).exit_code == 0

    file = tmp_path / "comparison.json"
    result = invoke(compare.app, output / "base", output / "dpo", "--output", file)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(file.read_text())
    assert row.pop("baseline") == str(output / "base")
    assert row.pop("run") == str(output / "dpo")
    assert row == {
        **{"problems": 12, "both": 2, "only_baseline": 2, "only_run": 7, "neither": 1},
        **{"baseline_accuracy": pytest.approx(4 / 12), "accuracy": pytest.approx(9 / 12)},
        **{"difference": pytest.approx(5 / 12), "p": pytest.approx(92 / 512), "p_holm": pytest.approx(92 / 512)},
    }
    assert f"{output / 'dpo'}: 1 of the 12 problems have no answer and count as wrong." in on_one_line(result.output)

    refused = invoke(compare.app, output / "base", few / "dpo")
    assert refused.exit_code == 2
    assert "was asked 12 problems and" in on_one_line(refused.output)
    shared = invoke(compare.app, output / "base", few / "dpo", "--shared", "--output", file)
    assert shared.exit_code == 0, shared.output
    (row,) = json.loads(file.read_text())
    assert (row["problems"], row["baseline_accuracy"], row["accuracy"], row["p"]) == (4, 1.0, 0.5, 0.5)
    assert f"{output / 'base'}: 4 of its 12 problems are compared, those of all runs." in on_one_line(shared.output)


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--tier", "loose"), "--tier loose is unknown: write one of strict_prompt"), ((), "named twice")],
)
def test_wrong_arguments_of_compare(data, tmp_path, words, message):
    output = tmp_path / "runs"
    record_run(output / "base", data, {0: "#### 0"})
    invoke(gsm8k.app, "--score-only", "--data", data, "--output", output)
    result = invoke(compare.app, output / "base", output / "base", *words)
    assert result.exit_code == 2
    assert message in on_one_line(result.output)


def test_a_run_is_not_compared_with_itself_by_another_name(data, tmp_path):
    record_run(tmp_path / "runs" / "base", data, {0: "#### 0"})
    invoke(gsm8k.app, "--score-only", "--data", data, "--output", tmp_path / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "base")
    result = invoke(compare.app, tmp_path / "runs" / "base", tmp_path / "link")
    assert (result.exit_code, "named twice" in on_one_line(result.output)) == (2, True)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"rows": 5}', '{"rows": [{"problem": 1}]}', '{"a":' * 9999])
def test_damaged_results_are_named(content, data, tmp_path):
    for name in ("a", "b"):
        record_run(tmp_path / "runs" / name, data, {0: "#### 0"})
    invoke(gsm8k.app, "--score-only", "--data", data, "--output", tmp_path / "runs")
    (tmp_path / "runs" / "b" / "results.json").write_text(content)
    result = invoke(compare.app, tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    assert result.exit_code == 2
    assert "results.json is damaged" in on_one_line(result.output)


def test_names_of_runs_are_no_markup(data, tmp_path):
    for name in ("x[", "[red]y"):
        record_run(tmp_path / "runs" / name, data, {0: "#### 0"})
    invoke(gsm8k.app, "--score-only", "--data", data, "--output", tmp_path / "runs")
    result = invoke(compare.app, tmp_path / "runs" / "x[", tmp_path / "runs" / "[red]y")
    assert result.exit_code == 0, result.output
    assert "[red]y" in on_one_line(result.output)


@pytest.mark.parametrize("gold", ["NaN", "sNaN", "Infinity", "-Infinity", "five", ""])
def test_a_gold_answer_is_a_number(gold, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": f"so #### {gold}"}) + "\n")
    result = invoke(gsm8k.app, "--score-only", "--data", file, "--output", tmp_path / "runs")
    assert result.exit_code == 2
    assert "must end in a line `#### N` with a number N" in on_one_line(result.output)


# --- what the system refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/dev/full", "No space left on device. Fix that, then run the same command to resume."),
        (".", ": Is a directory. Fix that"),
        ("test.jsonl/x.json", "test.jsonl: File exists. Fix that"),
        ("", "it is empty: write a path."),
        ("~nosuch/x", "Could not determine home directory."),
    ],
)
def test_what_cannot_be_written_is_a_sentence(output, words, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        record_run(tmp_path / name / "base", data, {0: "#### 0"})
        assert invoke(gsm8k.app, "--score-only", "--data", data, "--output", tmp_path / name).exit_code == 0
    refused = invoke(compare.app, "a/base", "b/base", "--output", output)
    assert (refused.exit_code, type(refused.exception)) == (2, SystemExit)
    assert words in on_one_line(refused.output.replace("│", ""))


def test_a_home_folder_is_meant_where_a_shell_has_left_its_sign(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    record_run(tmp_path / "runs" / "base", data, {0: "#### 0"})
    assert invoke(gsm8k.app, "--score-only", "--data", data, "--output=~/runs").exit_code == 0
    assert (tmp_path / "runs" / "results.json").is_file()


def test_records_that_do_not_belong_together_are_refused(data, tmp_path):
    folder = tmp_path / "runs" / "base"
    record_run(folder, data, {0: "#### 0"})
    score_it = ("--score-only", "--data", data, "--output", tmp_path / "runs")
    answers = folder / "generations.jsonl"
    written = answers.read_text()
    answers.write_text(written + written.replace('"index": 0', '"index": 99'))
    refused = invoke(gsm8k.app, *score_it)
    assert refused.exit_code == 2
    assert f"{answers} has an answer to problem 99, which does not exist" in on_one_line(refused.output)
    answers.write_text(written)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "data": None}))
    refused = invoke(gsm8k.app, *score_it)
    assert refused.exit_code == 2
    assert f"{manifest} does not record the problems" in on_one_line(refused.output)


def test_a_run_and_the_folder_that_holds_it_are_the_same_run(data, tmp_path):
    record_run(tmp_path / "runs" / "base", data, {0: "#### 0"})
    assert invoke(gsm8k.app, "--score-only", "--data", data, "--output", tmp_path / "runs").exit_code == 0
    refused = invoke(compare.app, tmp_path / "runs", tmp_path / "runs" / "base")
    assert refused.exit_code == 2
    assert "A run is named twice" in on_one_line(refused.output)
