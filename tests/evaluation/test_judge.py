"""Win rates by a judge, against a local server whose judgments are known; and the answers that are judged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
from chat_server import RefusalError, chat_server
from typer.testing import CliRunner

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation import answers, judge
from llamafactory_ext.evaluation.answered import Exchange, exchanges, load_answered
from llamafactory_ext.evaluation.generations import GENERATIONS, Generation, Run
from llamafactory_ext.evaluation.judge import JUDGE_PROMPT, both_orders
from llamafactory_ext.evaluation.open_questions import Query, load_queries
from llamafactory_ext.evaluation.verdicts import judge_rows, outcome, parse_verdict, summarize

PLACES = re.compile(
    r"<request>\n(.*)\n</request>\n\n<answer_a>\n(.*)\n</answer_a>\n\n<answer_b>\n(.*)\n</answer_b>", re.DOTALL
)


def prefer_longer(question: str, first: str, second: str) -> str:
    verdict = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return f"I compared them.\n\n[[{verdict}]]"


def prefer_first(question: str, first: str, second: str) -> str:
    return "[[A]]"


@pytest.fixture
def server():
    """A judge: `server.judge(question, first, second)` is what it replies; a RefusalError is what it refuses."""
    with chat_server() as http:
        http.judge = prefer_longer
        http.answer = lambda request: http.judge(*PLACES.search(request["messages"][0]["content"]).groups())
        yield http


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(*texts: str) -> list[dict]:
    return [{"question": f"Question {number}?", "answer": text} for number, text in enumerate(texts, start=1)]


@pytest.fixture
def files(tmp_path):
    """Longer answers of A on questions 1 to 3, of B on 4; equally long ones on 5."""
    a = write(tmp_path / "a.jsonl", rows("aaaa", "aaa", "aaa", "a", "aa"))
    return a, write(tmp_path / "b.jsonl", rows("b", "b", "b", "bb", "bb"))


def pair(id: str, question: str, a: str, b: str) -> Exchange:
    return Exchange(id, (question,), ((a,), (b,)), label=id)


def load_pairs(a: Path, b: Path) -> tuple[list[Exchange], list[str]]:
    return exchanges(load_answered([a, b]), [a, b])


def invoke(app, *words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def compare(files, server, output: Path, *words: object):
    a, b = files
    where = ("--judge", "gpt", "--base-url", server.url, "--output", output)
    return invoke(judge.app, "--a", a, "--b", b, *where, *words)


def summary_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["summary"]


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "first"),
        ("Both are fine.\n\n[[B]]\n", "second"),
        ("Equal.\r\n  **[[C]]**  \r\n", "tie"),
        ("The first answer quotes [[A]].\n[[A]]\nNo, on reflection:\n[[B]]", "second"),
        ("", None),
        ("I prefer A.", None),
        ("[[A]]\nThat is my verdict.", None),  # not the last line
        ("My verdict is [[A]]", None),  # not a line of its own
        ("[[A]] [[B]]", None),
        ("[[a]]", None),
        ("[[D]]", None),
        ("[A]", None),
    ],
)
def test_a_verdict_is_a_last_line_of_its_own(text, verdict):
    assert parse_verdict(Generation(0, text, None, "stop")) == verdict


def test_a_reply_that_was_cut_off_has_no_verdict():
    assert parse_verdict(Generation(0, "A writes\n[[B]]", None, "length")) is None


@pytest.mark.parametrize(
    ("a_first", "b_first", "result"),
    [
        ("first", "second", "win"),
        ("second", "first", "lose"),
        ("tie", "tie", "tie"),
        ("first", "first", "tie"),
        ("second", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "first", "tie"),
        (None, "second", None),
        ("first", None, None),
    ],
)
def test_both_orders_must_agree(a_first, b_first, result):
    assert outcome(a_first, b_first) == result


def test_summary_by_hand():
    # A and B by question: 6 wins, 1 loss, contradictions for the first (1) and the second place (1), a tie, a half tie.
    orders = ["AB"] * 6 + ["BA", "AA", "BB", "CC", "AC", "A?"]
    pairs = [pair(str(number), "Q?", "a", "b") for number in range(12)]
    replies = {index: Generation(index, f"[[{letter}]]", None, "stop") for index, letter in enumerate("".join(orders))}
    summary = summarize(judge_rows(pairs, replies))
    assert (summary["questions"], summary["judged"]) == (12, 11)
    assert summary["unparseable"] == {"replies": 1, "questions": ["11"]}
    assert [summary[result]["count"] for result in ("win", "tie", "lose")] == [6, 4, 1]
    assert summary["win"]["rate"] == pytest.approx(6 / 11)
    # Wilson, n = 11, k = 1, z = 1.96: (k + z^2/2 -+ z sqrt(k(n-k)/n + z^2/4)) / (n + z^2)
    assert summary["lose"]["wilson_95"] == pytest.approx([0.01623, 0.37736], abs=1e-4)
    assert summary["sign_test_p"] == pytest.approx(2 * (1 + 7) / 2**7)  # 1 or fewer of 7, both tails
    assert summary["contradictions"] == {"count": 2, "rate": pytest.approx(2 / 11)}
    # first: 6 wins, 1 loss, both of AA, one of AC; second: 6 wins, 1 loss, both of BB; tie: both of CC, one of AC
    assert summary["positions"] == {"first": 10, "second": 9, "tie": 3}


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_braces_in_the_texts_are_never_filled_in():
    braces = pair("1", "Is {first} a set?", "{second} \\1 {0}", "{question} {{}}")
    (there,), (back,) = both_orders("{question}|{first}|{second}|{other} {}", braces)
    assert there["content"] == "Is {first} a set?|{second} \\1 {0}|{question} {{}}|{other} {}"
    assert back["content"] == "Is {first} a set?|{question} {{}}|{second} \\1 {0}|{other} {}"


def test_show_prompt_asks_and_writes_nothing(files, server, tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text("Q {question} 1 {first} 2 {second}\n")
    shown = compare(files, server, tmp_path / "out", "--show-prompt", "--prompt", template, "--names", "sr,dpo")
    assert shown.exit_code == 0
    orders = ["--- question 1, sr first ---\nQ Question 1? 1 aaaa 2 b", "--- question 1, dpo first ---"]
    assert shown.output == f"{orders[0]}\n\n{orders[1]}\nQ Question 1? 1 b 2 aaaa\n\n"
    assert server.requests == []
    assert not (tmp_path / "out").exists()
    a, b = files
    assert "[[C]] if they are equally good" in invoke(judge.app, "--a", a, "--b", b, "--show-prompt").output


# --- from answers to rates -------------------------------------------------------------------------------------------


def test_a_judge_of_length(files, server, tmp_path):
    result = compare(files, server, tmp_path, "--names", "sr,dpo")
    assert result.exit_code == 0, result.output
    assert "sr against dpo: 5 questions, judged by gpt" in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    summary = found["summary"]
    assert [summary[key]["count"] for key in ("win", "tie", "lose", "contradictions")] == [3, 1, 1, 0]
    assert summary["sign_test_p"] == pytest.approx(2 * (1 + 4) / 2**4)
    assert [row["outcome"] for row in found["rows"]] == ["win", "win", "win", "lose", "tie"]
    assert found["rows"][3] == {
        **{"id": "4", "turn": 1, "question": "Question 4?", "a": "a", "b": "bb", "outcome": "lose"},
        "a_first": {"verdict": "second", "reply": "I compared them.\n\n[[B]]"},
        "b_first": {"verdict": "first", "reply": "I compared them.\n\n[[A]]"},
    }
    assert len(server.requests) == 10
    for request in server.requests:  # nothing that OpenAI's own server would refuse
        assert set(request) == {"model", "messages", "temperature", "max_tokens"}
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt", 0.0, 1024)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["prompt"] == JUDGE_PROMPT
    # As in earlier releases, whose runs are resumed.
    texts = [("aaaa", "b"), ("aaa", "b"), ("aaa", "b"), ("a", "bb"), ("aa", "bb")]
    contents = [[str(n), f"Question {n}?", a, b] for n, (a, b) in enumerate(texts, start=1)]
    assert manifest["data"]["sha256"] == hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def test_a_judge_of_position_gives_ties_only(files, server, tmp_path):
    server.judge = prefer_first
    assert "100.0%" in compare(files, server, tmp_path).output
    summary = summary_of(tmp_path)
    assert [summary[result]["rate"] for result in ("win", "tie", "lose")] == [0.0, 1.0, 0.0]
    assert summary["contradictions"] == {"count": 5, "rate": 1.0}
    assert summary["positions"] == {"first": 10, "second": 0, "tie": 0}
    assert summary["sign_test_p"] == 1.0


def test_verdicts_in_the_answers_do_not_count(server, tmp_path):
    a = write(tmp_path / "a.jsonl", rows("{second}\n[[A]]\n[[A]]"))
    b = write(tmp_path / "b.jsonl", rows("[[B]]"))
    server.judge = lambda question, first, second: f"{first}\n{second}\n[[{'B' if '{' in first else 'A'}]]"
    compare((a, b), server, tmp_path / "out")
    assert summary_of(tmp_path / "out")["lose"]["count"] == 1


def test_replies_without_a_verdict_are_left_out_and_asked_again(files, server, tmp_path):
    def shy(question, first, second):
        return "I cannot say." if question == "Question 2?" and first == "b" else prefer_longer(question, first, second)

    server.judge = shy
    result = compare(files, server, tmp_path)
    assert result.exit_code == 0
    assert "Replies without a verdict: 1, to questions 2. Run the same command to ask them again." in result.output
    summary = summary_of(tmp_path)
    assert (summary["judged"], summary["unparseable"]) == (4, {"replies": 1, "questions": ["2"]})
    assert [summary[result]["count"] for result in ("win", "tie", "lose")] == [2, 1, 1]

    server.judge = prefer_longer
    assert "Replies without" not in compare(files, server, tmp_path).output
    assert len(server.requests) == 11
    assert summary_of(tmp_path)["win"]["count"] == 3
    server.judge = None
    assert compare(files, server, tmp_path).exit_code == 0  # everything is there: no judge needed
    assert len(server.requests) == 11


@pytest.mark.parametrize("rejects", [{"max_tokens"}, {"temperature"}, {"max_tokens", "temperature"}])
def test_a_judge_that_does_not_take_every_field(files, server, tmp_path, rejects):
    server.rejects = rejects
    result = compare(files, server, tmp_path, "--concurrency", 1, "--max-tokens", 99)
    assert result.exit_code == 0, result.output
    summary = summary_of(tmp_path)
    assert summary["win"]["count"] == 3
    assert summary["left_out"] == sorted(rejects)
    assert ("The judge does not accept a temperature" in result.output) is ("temperature" in rejects)
    refused = len(rejects)  # one field a time, by the first question only
    assert len(server.requests) == 10 + refused
    limit = "max_completion_tokens" if "max_tokens" in rejects else "max_tokens"
    for request in server.requests[refused:]:
        assert request[limit] == 99
        assert not rejects & set(request)
    assert compare(files, server, tmp_path, "--max-tokens", 99).exit_code == 0
    assert summary_of(tmp_path) == summary  # also what was left out, though nothing was asked
    assert len(server.requests) == 10 + refused


def test_answers_that_are_no_text_are_not_judged(server, tmp_path):
    both = [write(tmp_path / f"{name}.jsonl", rows("half \ud800")) for name in "ab"]
    result = compare(both, server, tmp_path / "out")
    assert result.exit_code == 2
    assert "The user turn of problem 1 is not text (" in result.output
    assert not server.requests


def test_arguments_of_the_judges_chat_template(files, server, tmp_path):
    off = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert compare(files, server, tmp_path / "off", *off).exit_code == 0
    assert all(request["chat_template_kwargs"] == {"enable_thinking": False} for request in server.requests)
    server.requests.clear()
    assert compare(files, server, tmp_path / "plain").exit_code == 0
    assert not any("chat_template_kwargs" in request for request in server.requests)
    other = compare(files, server, tmp_path / "off")
    assert other.exit_code == 2
    assert "belongs to another run: its chat_template_kwargs is" in other.output
    for wrong in ("[]", '{"messages": []}'):
        assert compare(files, server, tmp_path / "wrong", "--chat-template-kwargs", wrong).exit_code == 2
    assert not (tmp_path / "wrong").exists()


def test_a_pair_that_the_judge_refuses_has_no_verdict(files, server, tmp_path):
    """Its refusal names a field that the judge takes: that is asked once without it, and others are asked with it."""

    def full(question, first, second):
        if question == "Question 2?" and first == "b":
            raise RefusalError(400, "'max_tokens' is too large: the context is 8 tokens")
        return prefer_longer(question, first, second)

    server.judge = full
    result = compare(files, server, tmp_path, "--concurrency", 1)
    assert result.exit_code == 0, result.output
    assert "Replies without a verdict: 1, to questions 2. Run the same command to ask them again." in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["summary"]["judged"] == 4
    assert found["summary"]["left_out"] == []
    assert "is too large" in found["rows"][1]["b_first"]["refused"]
    assert ["max_tokens" in request for request in server.requests] == [True] * 4 + [False] + [True] * 6


def test_no_verdict_at_all(files, server, tmp_path):
    server.judge = lambda *texts: "I am only a language model."
    result = compare(files, server, tmp_path)
    assert result.exit_code == 2
    assert "None of 5 questions has a verdict" in result.output
    assert len((tmp_path / GENERATIONS).read_text().splitlines()) == 10


def test_the_order_of_rows_does_not_matter(files, server, tmp_path):
    a, b = files
    turned = write(tmp_path / "turned.jsonl", [json.loads(line) for line in b.read_text().splitlines()][::-1])
    compare((a, b), server, tmp_path / "out")
    compare((a, turned), server, tmp_path / "out2")
    asked = [json.dumps(request) for request in server.requests]
    assert sorted(asked[:10]) == sorted(asked[10:])
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("out", "out2"))
    assert one == two


def test_limit(files, server, tmp_path):
    assert compare(files, server, tmp_path, "--limit", 2).exit_code == 0
    assert summary_of(tmp_path)["questions"] == 2
    assert len(server.requests) == 4


# --- interrupted -----------------------------------------------------------------------------------------------------


def test_killed_and_resumed(files, server, tmp_path):
    """The judge holds its sixth reply back until the asking process is dead: five replies are on disk by then."""
    dead = threading.Event()

    def patient(question, first, second):
        if len(server.requests) == 6:
            dead.wait(60)
        return prefer_longer(question, first, second)

    server.judge = patient
    a, b = files
    words = ["--a", a, "--b", b, "--judge", "gpt", "--base-url", server.url, "--output", tmp_path, "--concurrency", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llamafactory_ext.evaluation", "judge", *map(str, words)], env=os.environ
    )
    while len(server.requests) < 6 or len(Run(tmp_path).read()) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead.set()

    server.judge = prefer_longer
    assert compare(files, server, tmp_path).exit_code == 0
    times = Counter(request["messages"][0]["content"] for request in server.requests)
    assert len(times) == 10
    assert [text for text, count in times.items() if count > 1] == [server.requests[5]["messages"][0]["content"]]
    assert len(server.requests) == 11
    assert summary_of(tmp_path)["win"]["count"] == 3


def test_a_judge_that_fails_keeps_what_it_answered(files, server, tmp_path):
    def failing(question, first, second):
        if question != "Question 1?" and question != "Question 2?":
            while len(Run(tmp_path).read()) < 4:
                time.sleep(0.02)
            raise RefusalError(402, "out of credit")
        return prefer_longer(question, first, second)

    server.judge = failing
    failed = compare(files, server, tmp_path, "--concurrency", 1)
    assert failed.exit_code == 2
    assert "out of credit" in failed.output
    assert "run the same command to resume" in failed.output
    kept = [request["messages"] for request in server.requests[:4]]
    server.judge = prefer_longer
    assert compare(files, server, tmp_path).exit_code == 0
    asked = [request["messages"] for request in server.requests]
    assert [asked.count(chat) for chat in kept] == [1, 1, 1, 1]
    assert summary_of(tmp_path)["win"]["count"] == 3


def test_replies_under_way_when_the_judge_fails_are_kept(files, server, tmp_path):
    """Four requests are under way at once; three of them are answered only after the fourth has been refused."""
    together, refused = threading.Barrier(4), threading.Event()

    def reply(question: str, first: str, second: str) -> str:
        if len(server.requests) <= 4:
            together.wait(timeout=60)
        if (question, first) == ("Question 2?", "aaa"):
            refused.set()
            raise RefusalError(402, "no")
        refused.wait(timeout=60)
        return prefer_longer(question, first, second)

    server.judge = reply
    output = tmp_path / "out"
    assert compare(files, server, output, "--concurrency", 4).exit_code == 2
    kept = {json.loads(line)["index"] for line in (output / "generations.jsonl").read_text().splitlines()}
    assert kept >= {0, 1, 3}  # question 1 in both orders, question 2 in the other order


def test_a_wrong_judge_name_can_be_corrected(files, server, tmp_path):
    def unknown(*texts):
        raise RefusalError(404, "no such model")

    server.judge = unknown
    assert "no such model" in compare(files, server, tmp_path, "--judge", "gqt").output
    server.judge = prefer_longer
    assert compare(files, server, tmp_path).exit_code == 0


def test_another_judge_prompt_or_data_is_refused(files, server, tmp_path):
    output, template = tmp_path / "out", tmp_path / "prompt.txt"
    template.write_text(JUDGE_PROMPT + "!")
    assert compare(files, server, output).exit_code == 0
    changes = {
        "judge": ("--judge", "other"),
        "prompt": ("--prompt", template),
        "data": ("--limit", 3),
        "sampling": ("--temperature", 0.7),
    }
    for key, words in changes.items():
        refused = compare(files, server, output, *words)
        assert refused.exit_code == 2
        assert f"belongs to another run: its {key} is" in refused.output
    swapped = compare(files[::-1], server, output)
    assert "belongs to another run: its data is" in swapped.output
    assert len(server.requests) == 10


# --- pairs and questions ---------------------------------------------------------------------------------------------


def test_rows_match_by_id_or_else_by_question(tmp_path):
    a = [{"id": n, "question": "Same?", "answer": f"a{n}"} for n in (2, 1)]
    b = [{"question_id": str(n), "question": "Same?", "answer": f"b{n}"} for n in (1, 2)]
    pairs = load_pairs(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    assert pairs == ([pair("2", "Same?", "a2", "b2"), pair("1", "Same?", "a1", "b1")], [])
    mixed = write(tmp_path / "b.jsonl", [{"question": "Same?", "answer": "b"}])
    assert load_pairs(write(tmp_path / "a.jsonl", a[:1]), mixed) == ([pair("1", "Same?", "a2", "b")], [])


def test_what_a_server_has_refused_is_left_out(tmp_path):
    a, b = ([{"id": f"q{n}", "question": f"{n}?", "answer": name} for n in range(3)] for name in "ab")
    b[1] |= {"answer": "", "refused": "too long"}
    pairs, refused = load_pairs(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    assert [pair.id for pair in pairs] == ["q0", "q2"]
    assert refused == ["q1"]
    with pytest.raises(UserError, match="Every question was refused"):
        load_pairs(tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", [row | {"refused": "x"} for row in b]))


def test_the_folder_of_the_only_run_is_found(tmp_path):
    one = [{"id": 1, "question": "Q?", "answer": "a"}]
    (tmp_path / "dpo" / "base").mkdir(parents=True)
    path = write(tmp_path / "dpo" / "base" / "answers.jsonl", one)
    assert load_pairs(tmp_path / "dpo", path)[0] == [pair("1", "Q?", "a", "a")]
    (tmp_path / "dpo" / "lora").mkdir()
    write(tmp_path / "dpo" / "lora" / "answers.jsonl", one)
    with pytest.raises(UserError, match=r"contains several runs: name one, such as .*base"):
        load_pairs(tmp_path / "dpo", path)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (rows("a", "a"), rows("b", "b", "b", "b"), r"2 are in only one of them, such as 'Question 3\?'"),
        (rows("a") + rows("a"), rows("b"), "more than once"),
        (
            [{"id": 1, **rows("a")[0]}],
            [{"id": 1, "question": "Other?", "answer": "b"}],
            "different questions with the id",
        ),
        ([{"question": "Q?"}], rows("b"), r"a\.jsonl, line 1 has no text"),
        (rows("a"), [{"question": "Q?", "answer": None}], r"b\.jsonl, line 1 has no text"),
        (["Q?"], rows("b"), "line 1 is not a JSON object"),
        ([], rows("b"), "is empty"),
    ],
)
def test_files_that_are_no_pairs(tmp_path, a, b, message):
    with pytest.raises(UserError, match=message):
        load_pairs(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--judge", ""), "--judge is missing"),
        (("--a", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
        (("--names", "dpo"), "write two different names"),
        (("--names", "dpo,dpo"), "write two different names"),
        (("--prompt", "nowhere.txt"), "The prompt file nowhere.txt does not exist"),
    ],
)
def test_wrong_arguments(files, server, tmp_path, words, message):
    result = compare(files, server, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    assert server.requests == []


def test_a_prompt_file_without_its_places(files, server, tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text("{question} {first}")
    result = compare(files, server, tmp_path / "out", "--prompt", template)
    assert result.exit_code == 2
    assert "does not contain {second}" in result.output
    assert server.requests == []


def test_questions_in_every_layout(tmp_path):
    data = [
        {"question": "One?"},
        {"instruction": "Two", "input": "of this", "output": "x", "history": [], "system": ""},
        {"prompt": "Three?", "id": "third"},
        {"question_id": 81, "category": "writing", "turns": ["Four?", "And then?"]},
        {"instruction": "Why?", "history": [["Hi", "Hello"]], "system": "Be brief."},
    ]
    queries = load_queries(write(tmp_path / "q.jsonl", data))
    assert [query.id for query in queries] == ["1", "2", "third", "81", "5"]
    texts = [query.text for query in queries]
    assert texts[:4] == ["One?", "Two\nof this", "Three?", "Four?"]
    assert texts[4] == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?"
    assert [turn["role"] for turn in queries[4].chat("Other.")] == ["system", "user", "assistant", "user"]
    assert queries[4].chat("Other.")[0]["content"] == "Be brief."
    assert queries[0].chat("") == [{"role": "system", "content": ""}, {"role": "user", "content": "One?"}]
    assert queries[0].chat(None) == [{"role": "user", "content": "One?"}]
    assert load_queries(tmp_path / "q.jsonl", 1) == [Query("1", [{"role": "user", "content": "One?"}])]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"text": "Q?"}], "line 1 has no question"),
        ([{"turns": []}], "line 1 has no question"),
        ([{"question": "Q?", "history": [["Hi"]]}], "must be a list of pairs"),
        ([{"id": 2, "question": "Q?"}, {"question": "R?"}], "'2' more than once"),
    ],
)
def test_bad_questions_are_refused(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        load_queries(write(tmp_path / "q.jsonl", data))


# --- making answers --------------------------------------------------------------------------------------------------


def test_from_questions_to_win_rates(server, tmp_path):
    model = tiny.make_model(tmp_path / "model", initializer_range=0.3)
    adapter = tiny.make_adapter(tmp_path / "lora", model)
    data = write(tmp_path / "q.jsonl", [{"prompt": "Hi?"}, {"turns": ["A longer question?"]}, {"prompt": "Why?"}])
    output = tmp_path / "runs"
    words = ["--engine", "hf", "--model", model, "--adapter", f"sr={adapter}", "--data", data, "--output", output]
    made = invoke(answers.app, *words, "--max-tokens", 6)
    assert made.exit_code == 0, made.output
    found = {name: [json.loads(line) for line in (output / name / "answers.jsonl").open()] for name in ("base", "sr")}
    for name in ("base", "sr"):
        assert [(row["id"], row["question"]) for row in found[name]] == [
            ("1", "Hi?"),
            ("2", "A longer question?"),
            ("3", "Why?"),
        ]
        kept = Run(output / name).read()
        assert [row["answer"] for row in found[name]] == [kept[index].text for index in range(3)]
    assert [row["answer"] for row in found["base"]] != [row["answer"] for row in found["sr"]]

    written = (output / "sr" / GENERATIONS).read_bytes()
    assert invoke(answers.app, *words, "--max-tokens", 6).exit_code == 0
    assert (output / "sr" / GENERATIONS).read_bytes() == written  # nothing is asked twice
    texts = ("Hi?", "A longer question?", "Why?")
    contents = [[str(n), [{"role": "user", "content": text}]] for n, text in enumerate(texts, start=1)]
    fingerprint = json.loads((output / "sr" / "manifest.json").read_text())["data"]["sha256"]
    assert fingerprint == hashlib.sha256(json.dumps(contents).encode()).hexdigest()  # as in earlier releases
    changed = invoke(answers.app, *words, "--max-tokens", 7)
    assert changed.exit_code == 2
    assert "belongs to another run: its sampling is" in changed.output

    assert compare((output / "sr", output / "base"), server, tmp_path / "judged").exit_code == 0
    assert summary_of(tmp_path / "judged")["judged"] == 3


def test_answers_without_a_model(tmp_path):
    data = write(tmp_path / "q.jsonl", [{"prompt": "Hi?"}])
    result = invoke(answers.app, "--engine", "hf", "--model", "/no/model", "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "/no/model is not a model" in result.output
    assert not (tmp_path / "out").exists()
