"""Win rates over several turns: what the judge sees of them, and what is counted, worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_server import chat_server
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation import judge
from llamafactory_ext.evaluation.answered import Exchange, exchanges, load_answered
from llamafactory_ext.evaluation.intervals import clustered_rate
from llamafactory_ext.evaluation.judge import PROMPTS, both_orders
from llamafactory_ext.evaluation.scoring import pass_rates
from llamafactory_ext.evaluation.verdicts import rates

BLOCK = re.compile(r"<(answer_a|answer_b)>\n(.*?)\n</\1>", re.DOTALL)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def last_answer(text: str) -> str:
    return re.split(r"Answer to turn \d+:\n", text)[-1]


def prefer_longer_last_answer(request: dict) -> str:
    blocks = dict(BLOCK.findall(request["messages"][0]["content"]))
    first, second = (len(last_answer(blocks[name])) for name in ("answer_a", "answer_b"))
    return f"So.\n[[{'C' if first == second else 'A' if first > second else 'B'}]]"


@pytest.fixture
def server():
    with chat_server() as http:
        http.answer = prefer_longer_last_answer
        yield http


# A wins both turns of q1, one of q2 (and loses the other), none of q3, and ties in q4's only turn.
QUESTIONS = {
    "q1": ("writing", ["aa", "aa"], ["b", "b"]),
    "q2": ("writing", ["aa", "a"], ["b", "bb"]),
    "q3": ("math", ["a", "a"], ["bb", "b"]),
    "q4": (None, ["a"], ["b"]),
}


def answered(model: int) -> list[dict]:
    rows = []
    for name, (category, *texts) in QUESTIONS.items():
        own = texts[model]
        row = {"id": name, "category": category, "turns": [f"{name} turn {n}?" for n in range(1, len(own) + 1)]}
        rows.append({**row, "answers": own, **({"reference": ["one", ""]} if category == "math" else {})})
    rows[3] = {"id": "q4", "question": "q4 turn 1?", "answer": QUESTIONS["q4"][1 + model][0]}
    return rows


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "a.jsonl", answered(0)), write(tmp_path / "b.jsonl", answered(1))


def compare(files, server, output: Path, *words: object):
    a, b = files
    where = ("--a", a, "--b", b, "--judge", "m", "--base-url", server.url, "--output", output)
    return CliRunner().invoke(judge.app, [str(word) for word in (*where, *words)])


# --- rates -----------------------------------------------------------------------------------------------------------


def test_rates_by_turn_and_by_category(files, server, tmp_path):
    result = compare(files, server, tmp_path / "out", "--names", "sr,dpo")
    assert result.exit_code == 0, result.output
    assert "sr against dpo: 7 turns of 4 questions, judged by m" in result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["id"], row["turn"], row["outcome"]) for row in found["rows"]] == [
        ("q1", 1, "win"),
        ("q1", 2, "win"),
        ("q2", 1, "win"),
        ("q2", 2, "lose"),
        ("q3", 1, "lose"),
        ("q3", 2, "tie"),
        ("q4", 1, "tie"),
    ]
    summary = found["summary"]
    assert (summary["questions"], summary["turns"], summary["judged"]) == (4, 7, 7)
    assert [summary[result]["count"] for result in ("win", "tie", "lose")] == [3, 2, 2]
    assert summary["win"]["rate"] == pytest.approx(3 / 7)
    # By question, (wins, turns) are (2, 2), (1, 2), (0, 2), (0, 1); what they differ from 3/7 of their turns by is
    # 8/7, 1/7, -6/7 and -3/7, in squares 110/49. So the rate's variance is 4/3 * 110/49 / 49, and the turns weigh as
    # 3/7 * 4/7 / (440/7203) = 4.009 independent ones.
    effective = 12 / 49 / (440 / 7203)
    assert 4 < effective < 4.01
    expected = proportion_confint(3 / 7 * effective, effective, method="wilson")
    assert summary["win"]["wilson_95"] == pytest.approx(expected)
    # Questions won, drawn, lost, drawn: one of two, both tails.
    assert summary["sign_test_p"] == 1.0
    by_turn, by_category = summary["by_turn"], summary["by_category"]
    assert list(by_turn) == ["1", "2"]
    counts = {name: [part[key]["count"] for key in ("win", "tie", "lose")] for name, part in by_turn.items()}
    assert counts == {"1": [2, 1, 1], "2": [1, 1, 1]}
    assert by_turn["1"]["win"]["wilson_95"] == pytest.approx(proportion_confint(2, 4, method="wilson"))
    assert by_turn["1"]["sign_test_p"] == 1.0  # two of three
    assert list(by_category) == ["writing", "math"]
    assert [by_category["writing"][key]["count"] for key in ("win", "tie", "lose")] == [3, 0, 1]
    assert by_category["math"]["judged"] == 2
    lines = [line.split() for line in result.output.splitlines()]
    assert ["turn", "2", "3", "33.3%", "33.3%", "33.3%", "1"] in lines
    assert ["writing", "4", "75.0%", "0.0%", "25.0%", "1"] in lines


def test_the_sign_test_counts_questions():
    """Five questions won in both turns are five wins, not ten; one that is won and lost is none."""
    rows = [{"id": str(n), "outcome": "win"} for n in range(5) for _ in range(2)]
    rows += [{"id": "5", "outcome": result} for result in ("win", "lose")]
    assert rates(rows)["sign_test_p"] == pytest.approx(2 / 2**5)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_one_turn_a_question_has_wilsons_interval(won):
    found = clustered_rate([(each, 1) for each in won])
    assert found["wilson_95"] == pytest.approx(proportion_confint(sum(won), len(won), method="wilson"))
    assert found["count"] == sum(won)


@given(st.integers(1, 4).flatmap(lambda size: st.lists(st.tuples(st.integers(0, size), st.just(size)), min_size=1)))
def test_rates_of_equally_many_turns_are_like_pass_rates(clusters):
    samples = [
        {"problem": str(number), "correct": n < hits, "answer": "", "degenerate": False, "finish_reason": "stop"}
        for number, (hits, size) in enumerate(clusters)
        for n in range(size)
    ]
    found, expected = clustered_rate(clusters), pass_rates(samples)
    assert found["rate"] == pytest.approx(expected["pass@1"])
    assert found["wilson_95"] == pytest.approx(expected["wilson_95"])


@given(st.lists(st.integers(1, 4).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), min_size=1, max_size=9))
def test_an_interval_holds_its_rate_and_is_no_wider_than_one_of_questions(clusters):
    found = clustered_rate(clusters)
    low, high = found["wilson_95"]
    assert -1e-9 <= low <= found["rate"] + 1e-9
    assert found["rate"] - 1e-9 <= high <= 1 + 1e-9
    widest = proportion_confint(found["rate"] * len(clusters), len(clusters), method="wilson")
    turns = sum(size for _, size in clusters)
    narrowest = proportion_confint(found["rate"] * turns, turns, method="wilson")
    assert narrowest[1] - narrowest[0] - 1e-9 <= high - low <= widest[1] - widest[0] + 1e-9


# --- what the judge sees ---------------------------------------------------------------------------------------------


def test_the_judge_sees_both_conversations_and_the_reference(files, server, tmp_path):
    assert compare(files, server, tmp_path / "out", "--concurrency", 1).exit_code == 0
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert len(asked) == 14
    q2_turn_2 = asked[6]
    assert q2_turn_2 == PROMPTS[True, False].format(
        question="Turn 1:\nq2 turn 1?\n\nTurn 2:\nq2 turn 2?",
        first="Answer to turn 1:\naa\n\nAnswer to turn 2:\na",
        second="Answer to turn 1:\nb\n\nAnswer to turn 2:\nbb",
    )
    assert asked[8] == PROMPTS[False, True].format(question="q3 turn 1?", reference="one", first="a", second="bb")
    assert "<reference>" not in asked[10]  # whose reference is empty
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["prompt"] == [PROMPTS[key] for key in ((False, False), (True, False), (False, True))]


def test_a_prompt_of_ones_own(files, server, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Q {question} R {reference}\n<answer_a>\n{first}\n</answer_a><answer_b>\n{second}\n</answer_b>")
    shown = compare(files, server, tmp_path / "out", "--prompt", prompt, "--show-prompt")
    assert shown.output.count("--- question q1 (turn") == 4
    assert "Turn 2:\nq1 turn 2? R (none)\n<answer_a>\nAnswer to turn 1:\n" in shown.output
    assert compare(files, server, tmp_path / "out", "--prompt", prompt).exit_code == 0
    assert any("Q q3 turn 1? R one\n" in str(request["messages"][0]["content"]) for request in server.requests)
    prompt.write_text("{question}\n<answer_a>\n{first}\n</answer_a><answer_b>\n{second}\n</answer_b>")
    assert compare(files, server, tmp_path / "other", "--prompt", prompt).exit_code == 0


def test_braces_of_a_reference_are_never_filled_in():
    odd = Exchange("1", ("Q {first}?",), (("{reference}",), ("{second}",)), reference="{question}")
    (there,), _ = both_orders("{question}|{reference}|{first}|{second}", odd)
    assert there["content"] == "Q {first}?|{question}|{reference}|{second}"


# --- left out --------------------------------------------------------------------------------------------------------


def test_turns_that_were_refused_or_not_judged_are_named(files, server, tmp_path):
    a, b = files
    rows = answered(1)
    rows[0] |= {"answers": ["b", ""], "refused": [None, "too long"]}
    write(b, rows)

    def shy(request):
        text = request["messages"][0]["content"]
        return "Hm." if "q2 turn 2" in text else prefer_longer_last_answer(request)

    server.answer = shy
    result = compare((a, b), server, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Replies without a verdict: 2, to questions q2 (turn 2). Run the same command" in result.output
    assert "Turns left out, because they were refused for A or B: 1, q1 (turn 2)" in result.output
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert summary["refused"] == ["q1 (turn 2)"]
    assert summary["unparseable"] == {"replies": 2, "questions": ["q2 (turn 2)"]}
    assert (summary["turns"], summary["judged"]) == (6, 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": [], "answers": []}, "no list of texts in `turns`"),
        ({"turns": ["Q?", 5], "answers": ["a", "b"]}, "no list of texts in `turns`"),
        ({"turns": ["Q?", "R?"]}, "no list of texts in `answers`"),
        ({"turns": ["Q?", "R?"], "answers": "ab"}, "no list of texts in `answers`"),
        ({"turns": ["Q?", "R?"], "answers": ["a"]}, "has 2 turns, but 1 answers"),
        ({"turns": ["Q?"], "answers": ["a"], "refused": "all"}, "`refused` must be a list"),
        ({"turns": ["Q?"], "answers": ["a"], "reference": ["x", "y"]}, "has 2 references, but 1 turns"),
        ({"turns": ["Q?", "S?"], "answers": ["a", "b"]}, "different questions with the id 1"),
    ],
)
def test_rows_that_are_no_answers(tmp_path, row, message):
    good = [{"id": "1", "turns": ["Q?", "R?"], "answers": ["a", "b"]}]
    paths = [write(tmp_path / "a.jsonl", good), write(tmp_path / "b.jsonl", [{"id": "1", **row}])]
    with pytest.raises(UserError, match=message):
        exchanges(load_answered(paths), paths)


def test_a_question_that_occurs_twice(tmp_path):
    rows = [{"id": "1", "turns": ["Q?"], "answers": ["a"]}] * 2
    with pytest.raises(UserError, match="'1' more than once"):
        load_answered([write(tmp_path / "a.jsonl", rows)])


def test_without_ids_questions_match_by_all_their_turns(tmp_path):
    a = [{"turns": ["Q?", turn], "answers": ["a", turn]} for turn in ("R?", "S?")]
    paths = [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", a[::-1])]
    found, _ = exchanges(load_answered(paths), paths)
    assert [(each.id, each.turn, each.answers) for each in found] == [
        ("1", 1, (("a",), ("a",))),
        ("1", 2, (("a", "R?"), ("a", "R?"))),
        ("2", 1, (("a",), ("a",))),
        ("2", 2, (("a", "S?"), ("a", "S?"))),
    ]
