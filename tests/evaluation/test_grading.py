"""Ratings from 1 to 10: read, averaged, repeated and compared, worked out by hand."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import CutOffError, RefusalError, chat_server
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from llamafactory_ext.evaluation import grading
from llamafactory_ext.evaluation.generations import Generation, Run
from llamafactory_ext.evaluation.grading import PROMPTS
from llamafactory_ext.evaluation.intervals import mean_95, t_test_p
from llamafactory_ext.evaluation.ratings import compare, parse_rating, summarize

SCRIPT = Path(__file__).parents[2] / "evaluation" / "grade.py"
ANSWER = re.compile(r"<answer>\n(.*)\n</answer>", re.DOTALL)


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rating_in_answer(request: dict) -> str:
    """The judge gives what the last answer asks for: `5` or `Answer to turn 2:` and `7`."""
    content = ANSWER.search(request["messages"][0]["content"])[1]
    return f"Good.\n[[{content.splitlines()[-1]}]]"


@pytest.fixture
def server():
    with chat_server() as http:
        http.answer = rating_in_answer
        yield http


def answers(*ratings: tuple[int, int]) -> list[dict]:
    """Two turns a question, each answered with the rating that it gets."""
    return [
        {
            "id": f"q{number}",
            "category": "math" if number == 1 else "writing",
            "turns": ["Q?", "R?"],
            "answers": [str(rating) for rating in pair],
        }
        for number, pair in enumerate(ratings, start=1)
    ]


@pytest.fixture
def dpo(tmp_path):
    """Questions with means 4, 6 and 8."""
    return write(tmp_path / "dpo" / "base" / "answers.jsonl", answers((3, 5), (6, 6), (7, 9))).parents[1]


@pytest.fixture
def sr(tmp_path):
    """Better by 1, 2 and 0 than `dpo`."""
    return write(tmp_path / "sr.jsonl", answers((5, 5), (7, 9), (7, 9)))


def grade(server, output: Path, *words: object):
    where = ("--judge", "m", "--base-url", server.url, "--output", output)
    return CliRunner().invoke(grading.app, [str(word) for word in (*where, *words)])


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


# --- ratings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("[[7]]", 7),
        ("Good.\n\n[[10]]\n", 10),
        ("**[[1]]**", 1),
        ("Fine.\nRating: [[7]]", 7),
        ("**Rating: [[7]]**", 7),
        ("**Rating:** [[7]]", 7),
        ("I gave [[2]] first.\n[[2]]\nBut then:\n[[8]]", 8),
        ("[[7.5]]", 7.5),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[10.5]]", None),
        ("[[0.99]]", None),
        ("[[-5]]", None),
        ("[[8/10]]", None),
        ("8/10", None),
        ("11", None),
        ("7", None),
        ("7.5", None),
        ("[7]", None),
        ("[[N]]", None),
        ("[[٣]]", None),
        ("[[7]] [[8]]", None),
        ("My rating is [[7]]", None),
        ("[[7]]\nThat is my rating.", None),
        ("", None),
    ],
)
def test_a_rating_is_a_last_line_of_its_own(text, rating):
    assert parse_rating(Generation(0, text, None, "stop")) == rating


def test_a_reply_that_was_cut_off_has_no_rating():
    assert parse_rating(Generation(0, "Good.\n[[7]]", None, "length")) is None


@given(st.text(alphabet="[]0123456789./* \nRating:", max_size=40))
def test_whatever_is_read_is_on_the_scale(text):
    rating = parse_rating(Generation(0, text, None, "stop"))
    assert rating is None or (1 <= rating <= 10 and f"[[{text.rpartition('[[')[2].partition(']]')[0]}]]" in text)


# --- means -----------------------------------------------------------------------------------------------------------


def test_a_run_by_turn_and_category(server, dpo, tmp_path):
    result = grade(server, tmp_path / "out", dpo)
    assert result.exit_code == 0, result.output
    assert "Ratings from 1 to 10 by m" in result.output
    found = results_of(tmp_path / "out")
    summary = found["summary"]["dpo"]
    assert (summary["mean"], summary["questions"], summary["turns"], summary["spread"]) == (6, 3, 6, None)
    # The means of the questions, 4, 6 and 8, have the standard deviation 2; t with 2 degrees of freedom is 4.3027.
    half = 4.302653 * 2 / math.sqrt(3)
    assert summary["interval_95"] == pytest.approx([6 - half, 6 + half])
    assert {turn: part["mean"] for turn, part in summary["by_turn"].items()} == {"1": 16 / 3, "2": 20 / 3}
    assert summary["by_turn"]["1"]["questions"] == 3
    assert {name: part["mean"] for name, part in summary["by_category"].items()} == {"math": 4, "writing": 7}
    assert summary["by_category"]["math"]["interval_95"] is None  # of a single question
    assert (summary["unparseable"], summary["refused"]) == ({"replies": 0, "questions": []}, [])
    assert found["comparisons"] == []
    assert found["rows"][0] == {
        **{"run": "dpo", "id": "q1", "turn": 1, "category": "math", "question": "Q?", "answer": "3"},
        **{"mean": 3, "ratings": [3], "replies": [{"reply": "Good.\n[[3]]"}]},
    }
    for request in server.requests:  # nothing that OpenAI's own server would refuse
        assert set(request) == {"model", "messages", "temperature", "max_tokens"}


def test_repeats_have_a_spread(server, dpo, tmp_path):
    """Each answer gets its rating, and one more or one less, in this order."""
    times: Counter[str] = Counter()

    def moody(request):
        content = request["messages"][0]["content"]
        times[content] += 1
        return f"[[{int(rating_in_answer(request)[8:-2]) + (0, 1, -1)[times[content] - 1]}]]"

    server.answer = moody
    words = ("--repeats", 3, "--temperature", 1, "--concurrency", 1)
    result = grade(server, tmp_path / "out", dpo, *words)
    assert result.exit_code == 0, result.output
    assert "3 times each" in result.output
    found = results_of(tmp_path / "out")
    assert found["rows"][0]["ratings"] == [3, 4, 2]
    summary = found["summary"]["dpo"]
    assert summary["mean"] == pytest.approx(6)
    assert summary["spread"] == pytest.approx(1)  # of 0, 1 and -1
    assert summary["by_turn"]["2"]["spread"] == pytest.approx(1)
    assert summary["interval_95"] == pytest.approx(mean_95([4, 6, 8]))  # repeats are no further questions
    seeds = [request["seed"] for request in server.requests]
    assert len(set(seeds)) == 18
    times.clear()
    assert grade(server, tmp_path / "again", dpo, *words, "--seed", 1).exit_code == 0
    assert not set(seeds) & {request["seed"] for request in server.requests[18:]}


def test_repeats_need_a_temperature(server, dpo, tmp_path):
    refused = grade(server, tmp_path / "out", dpo, "--repeats", 2)
    assert refused.exit_code == 2
    assert "With --temperature 0 all ratings of an answer are alike" in refused.output
    assert not (tmp_path / "out").exists()


def test_a_judge_without_seeds(server, dpo, tmp_path):
    server.rejects = {"seed", "temperature"}
    result = grade(server, tmp_path / "out", dpo, "--repeats", 2, "--temperature", 0.7)
    assert result.exit_code == 0, result.output
    assert results_of(tmp_path / "out")["summary"]["dpo"]["left_out"] == ["seed", "temperature"]
    assert "does not accept seeds" in result.output
    assert "does not accept a temperature" in result.output


@given(st.lists(st.lists(st.none() | st.integers(1, 10), min_size=1, max_size=4), min_size=1, max_size=6))
def test_means_lie_within_the_ratings(items):
    rows = [
        {
            "id": str(number // 2),
            "turn": 1 + number % 2,
            "ratings": ratings,
            "mean": sum(given) / len(given) if (given := [rating for rating in ratings if rating]) else None,
        }
        for number, ratings in enumerate(items)
    ]
    found = summarize(rows)
    every = [rating for ratings in items for rating in ratings if rating]
    assert found["unparseable"]["replies"] == sum(ratings.count(None) for ratings in items)
    assert (found["mean"] is None) is (not every)
    if every:
        assert min(every) - 1e-9 <= found["mean"] <= max(every) + 1e-9
        assert 0 <= (found["spread"] or 0) <= 10


# --- several runs ----------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_question_by_question(server, dpo, sr, tmp_path):
    result = grade(server, tmp_path / "out", dpo, sr)
    assert result.exit_code == 0, result.output
    found = results_of(tmp_path / "out")
    assert {name: run["mean"] for name, run in found["summary"].items()} == {"dpo": 6, "sr": 7}
    (row,) = found["comparisons"]
    # Differences 1, 2 and 0: mean 1, standard deviation 1, t = sqrt(3). With 2 degrees of freedom,
    # p = 1 - t / sqrt(t^2 + 2).
    assert (row["baseline"], row["run"], row["questions"], row["difference"]) == ("dpo", "sr", 3, 1)
    assert row["p"] == pytest.approx(1 - math.sqrt(3 / 5))
    half = 4.302653 / math.sqrt(3)
    assert row["interval_95"] == pytest.approx([1 - half, 1 + half])
    assert "sr minus dpo: +1.00, 95% from -1.48 to +3.48, paired t-test over 3 questions: p = 0.225" in result.output
    assert len(server.requests) == 12

    third = write(tmp_path / "third.jsonl", answers((1, 1), (2, 4), (1, 5)))
    result = grade(server, tmp_path / "out", dpo, sr, third)
    assert len(server.requests) == 18  # only the third
    rows = results_of(tmp_path / "out")["comparisons"]
    assert [row["run"] for row in rows] == ["sr", "third"]
    assert rows[0]["p"] == pytest.approx(0.225403, abs=1e-6)
    assert max(row["p_holm"] for row in rows) >= 0.225
    assert min(row["p_holm"] for row in rows) == pytest.approx(2 * min(row["p"] for row in rows))
    assert "by Holm" in result.output


def test_only_turns_that_both_runs_have_are_compared():
    def rows(*means):
        return [
            {"id": str(n), "turn": turn, "mean": mean} for n, pair in enumerate(means) for turn, mean in pair.items()
        ]

    a = rows({1: 2.0, 2: 8.0}, {1: 5.0})
    b = rows({1: 3.0, 2: None}, {1: 4.0})
    (found,) = compare({"a": a, "b": b})
    assert (found["questions"], found["difference"]) == (2, 0)  # 3 - 2 and 4 - 5
    (found,) = compare({"a": a, "b": rows({1: None, 2: None}, {1: None})})
    assert (found["questions"], found["difference"], found["p"], found["p_holm"]) == (0, None, None, None)


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=2, max_size=30))
def test_the_t_test_is_scipys(pairs):
    differences = [b - a for a, b in pairs]
    p = t_test_p(differences)
    if len(set(differences)) > 1:
        expected = ttest_rel([b for _, b in pairs], [a for a, _ in pairs])
        assert p == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval(0.95)
        assert mean_95(differences) == pytest.approx([interval.low, interval.high])
    else:
        assert p == (1.0 if differences[0] == 0 else 0.0)


def test_an_interval_of_one_value_is_unknown():
    assert (mean_95([5.0]), t_test_p([5.0])) == (None, None)
    assert mean_95([5.0, 5.0]) == [5.0, 5.0]
    assert mean_95([4.0, 6.0])[1] == pytest.approx(5 + student.ppf(0.975, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--names", "one"), "do not tell 2 runs apart"),
        (("--names", "one,one"), "do not tell 2 runs apart"),
        (("--names", "one,../two"), "do not tell 2 runs apart"),
        (("--names", "one,"), "do not tell 2 runs apart"),
        (("--judge", ""), "--judge is missing"),
        (("--prompt", "nowhere.txt"), "The prompt file nowhere.txt does not exist"),
    ],
)
def test_wrong_arguments(server, dpo, sr, tmp_path, words, message):
    refused = grade(server, tmp_path / "out", dpo, sr, *words)
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()
    assert not server.requests


def test_runs_of_other_questions_are_refused(server, dpo, tmp_path):
    other = write(tmp_path / "other.jsonl", answers((1, 2)))
    refused = grade(server, tmp_path / "out", dpo, other)
    assert "do not answer the same questions: 2 are in only one of them" in " ".join(refused.output.split())


# --- replies ---------------------------------------------------------------------------------------------------------


def test_replies_without_a_rating_are_counted_and_asked_again(server, dpo, tmp_path):
    def odd(request):
        content = request["messages"][0]["content"]
        if "Turn 2" not in content and "\n6\n" in content:
            raise CutOffError("Good.\n[[6]]")
        if content.endswith("\n9\n</answer>\n\n" + PROMPTS[False, False].rpartition("\n\n")[2]):
            raise RefusalError(400, "too long")
        return "[[11]]" if "\n3\n" in content and "Turn 2" not in content else rating_in_answer(request)

    server.answer = odd
    result = grade(server, tmp_path / "out", dpo)
    assert result.exit_code == 0, result.output
    said = "dpo: 3 replies without a rating, to questions q1 (turn 1), q2 (turn 1), q3 (turn 2). Run the same command"
    assert said in " ".join(result.output.split())
    summary = results_of(tmp_path / "out")["summary"]["dpo"]
    assert summary["unparseable"]["replies"] == 3
    assert summary["mean"] == pytest.approx((5 + 6 + 7) / 3)
    assert summary["turns"] == 3

    server.answer = rating_in_answer
    assert grade(server, tmp_path / "out", dpo).exit_code == 0
    assert len(server.requests) == 9
    assert results_of(tmp_path / "out")["summary"]["dpo"]["mean"] == 6


def test_a_judge_that_never_rates(server, dpo, tmp_path):
    server.answer = lambda request: "I would rather not."
    result = grade(server, tmp_path / "out", dpo)
    assert result.exit_code == 2
    assert "No reply to dpo has a rating" in " ".join(result.output.split())
    assert len(Run(tmp_path / "out" / "dpo").read()) == 6
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_was_refused_is_left_out(server, tmp_path):
    rows = answers((3, 5), (6, 6))
    rows[0] |= {"answers": ["3", ""], "refused": [None, "too long"]}
    result = grade(server, tmp_path / "out", write(tmp_path / "a.jsonl", rows))
    assert "a: 1 left out, because they were refused: q1 (turn 2)" in result.output
    assert results_of(tmp_path / "out")["summary"]["a"]["mean"] == (3 + 6) / 2


def test_what_the_judge_reads(server, dpo, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{reference}: {question}\n<answer>\n{answer}\n</answer>")
    shown = grade(server, tmp_path / "out", dpo, "--show-prompt", "--prompt", prompt)
    first = "--- question q1 (turn 1) ---\n(none): Q?\n<answer>\n3\n</answer>\n\n"
    second = "--- question q1 (turn 2) ---\n(none): Turn 1:\nQ?\n\nTurn 2:\nR?\n<answer>\n"
    both = "Answer to turn 1:\n3\n\nAnswer to turn 2:\n5\n</answer>\n\n"
    assert shown.output == first + second + both
    assert not server.requests
    prompt.write_text("{question}")
    assert "does not contain {answer}" in grade(server, tmp_path / "out", dpo, "--prompt", prompt).output


def test_another_prompt_is_another_grading(server, dpo, tmp_path):
    assert grade(server, tmp_path / "out", dpo).exit_code == 0
    for words, key in (
        (("--temperature", 1, "--repeats", 2), "repeats is 1, not 2"),
        (("--temperature", 1), "sampling is"),
        (("--limit", 2), "data is"),
        (("--judge", "other"), "judge is"),
    ):
        refused = grade(server, tmp_path / "out", dpo, *words)
        assert refused.exit_code == 2
        assert f"belongs to another run: its {key}" in " ".join(refused.output.split())
    assert len(server.requests) == 6


def test_killed_and_resumed(server, dpo, sr, tmp_path):
    """The judge holds its eighth reply, to the second run, back until the asking process is dead."""
    dead = []

    def patient(request):
        while len(server.requests) == 8 and not dead:
            time.sleep(0.02)
        return rating_in_answer(request)

    server.answer = patient
    where = ["--judge", "m", "--base-url", server.url, "--output", str(tmp_path / "out"), "--concurrency", "1"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(dpo), str(sr), *where])
    while len(server.requests) < 8 or len(Run(tmp_path / "out" / "sr").read()) < 1:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead.append(True)
    assert grade(server, tmp_path / "out", dpo, sr).exit_code == 0
    assert len(server.requests) == 8 + 5
    assert [run["mean"] for run in results_of(tmp_path / "out")["summary"].values()] == [6, 7]
