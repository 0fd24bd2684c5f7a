"""An OpenAI-compatible server as the engine: what it is sent, and what becomes of its refusals and breakdowns."""

from __future__ import annotations

import json
import math

import pytest
from engine_cases import QUESTIONS, answers, jobs, settings
from typer.testing import CliRunner

from llamafactory_ext.evaluation import gsm8k
from llamafactory_ext.evaluation.asking import make_engine
from llamafactory_ext.evaluation.transformers_engine import TransformersEngine


def invoke(*words: object):
    return CliRunner().invoke(gsm8k.app, [str(word) for word in words])


def test_server_answers_like_the_model_after_a_retry(server, model32, adapters):
    changes = {"adapters": adapters, "base_url": server.url, "concurrency": 2}
    engine = make_engine("openai", settings("tiny", **changes))
    assert set(engine.versions()) == {"openai"}
    expected = answers(TransformersEngine(settings(model32, adapters=adapters)), jobs("base", "one"))
    assert answers(engine, jobs("base", "one")) == expected
    assert len(server.requests) == 7  # six questions, one asked again
    sent = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 12, "seed": 0}
    sent |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "return_token_ids": True}
    for request in server.requests:
        assert {name: value for name, value in request.items() if name not in ("model", "messages")} == sent
    assert engine.parameters() == sent


def test_a_server_that_breaks_keeps_what_it_answered(server, data, tmp_path):
    server.broken_after = 2  # the first is refused, the second answered
    words = ["--engine", "openai", "--model", "tiny", "--base-url", server.url, "--data", str(data)]
    words += ["--output", str(tmp_path / "out"), "--max-tokens", "12", "--concurrency", "1"]
    failed = CliRunner().invoke(gsm8k.app, words)
    assert failed.exit_code == 2
    assert "out of luck" in failed.output
    assert "run the same command to resume" in failed.output
    path = tmp_path / "out" / "base" / "generations.jsonl"
    assert len(path.read_text().splitlines()) == 1

    server.broken_after = math.inf
    assert CliRunner().invoke(gsm8k.app, words).exit_code == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [0, 1, 2]


def ask_server(server, data, output, *more):
    words = ("--engine", "openai", "--model", "tiny", "--base-url", server.url, "--data", data, "--output", output)
    return invoke(*words, "--max-tokens", 12, "--concurrency", 1, "--prompt", "plain", *more)


def test_a_problem_that_the_server_refuses_is_recorded_and_counts_as_unanswered(server, data, tmp_path):
    server.refuse = lambda question: 400 if question == QUESTIONS[1] else None
    output = tmp_path / "out"
    for requests in (4, 5):  # all three, one of them twice for its 500; then only what was refused
        result = ask_server(server, data, output)
        assert result.exit_code == 0, result.output
        assert len(server.requests) == requests
        assert "1 problems were refused: 2 (Error code: 400" in result.output
        scored = json.loads((output / "base" / "results.json").read_text())
        assert (scored["summary"]["problems"], scored["summary"]["missing"]) == (3, 1)
        assert [row.get("refused") is not None for row in scored["rows"]] == [False, True, False]
    server.refuse = lambda question: None
    result = ask_server(server, data, output)
    assert "were refused" not in result.output
    assert json.loads((output / "results.json").read_text())["base"]["missing"] == 0
    server.broken_after = 0
    assert ask_server(server, data, output).exit_code == 0  # nothing is left to ask
    assert len(server.requests) == 6


def test_a_server_that_refuses_every_problem_is_no_score(server, data, tmp_path):
    server.refuse = lambda question: 422
    result = ask_server(server, data, tmp_path / "out")
    assert result.exit_code == 2
    assert "The server refused all 3 questions to base (Error code: 422" in result.output
    assert not list((tmp_path / "out").glob("**/manifest.json"))


def test_a_system_turn_that_every_question_is_refused_for(server, data, tmp_path):
    server.refuse = lambda question: 400
    result = ask_server(server, data, tmp_path / "out", "--system", "Brief")
    assert "change what it does not accept, such as --system, or use another server" in result.output


def test_what_is_no_text_is_not_asked(server, tmp_path):
    data, output = tmp_path / "half.jsonl", tmp_path / "out"
    data.write_text('{"question": "half \\ud800", "answer": "#### 1"}\n')
    result = ask_server(server, data, output)
    assert result.exit_code == 2
    assert "The user turn of problem 1 is not text (" in result.output
    assert not server.requests
    assert not output.exists()


@pytest.mark.parametrize("status", [400, 422])
def test_fields_that_a_server_does_not_take_are_left_out_and_told(server, data, tmp_path, status):
    server.unknown, server.unknown_status = {"top_k", "return_token_ids", "seed", "max_tokens"}, status
    result = ask_server(server, data, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "the server does not accept return_token_ids, seed, top_k, so its own values apply" in result.output
    assert len(server.requests) == 1 + 4 + 3  # a 500, each field once, three questions
    for request in server.requests[-3:]:
        assert not server.unknown & request.keys()
        assert (request["max_completion_tokens"], request["min_p"]) == (12, 0.0)
    rows = [json.loads(line) for line in (tmp_path / "out/base/generations.jsonl").read_text().splitlines()]
    assert all(row["left_out"] == sorted(server.unknown) for row in rows)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("repetition_penalty", ("--repetition-penalty", "1.1")),
        ("temperature", ()),
        ("top_p", ()),
        ("chat_template_kwargs", ("--chat-template-kwargs", '{"enable_thinking": false}')),
    ],
)
def test_a_field_that_was_asked_for_is_never_left_out(server, data, tmp_path, field, words):
    server.unknown = {field}
    result = ask_server(server, data, tmp_path / "out", *words)
    assert result.exit_code == 2
    refusal = f"The server refused all 3 questions to base (Error code: 400 - Unknown field: {field})"
    assert refusal in result.output


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "rejects the API key (Error code: 401"),
        (403, "rejects the API key (Error code: 403"),
        (404, "does not have this model or path (Error code: 404"),
        (402, "rejects the requests (Error code: 402"),
        (200, "does not answer (its reply contains no answer"),
    ],
)
def test_what_will_not_pass_stops_at_once(server, data, tmp_path, status, message):
    server.requests.append("the first is answered with 500")
    server.refuse = lambda question: status
    result = ask_server(server, data, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    asked = [request["messages"][0]["content"] for request in server.requests[1:]]
    assert len(set(asked)) == len(asked)  # none twice
    if status != 200:
        server.key_status = status
        assert message in ask_server(server, data, tmp_path / "out").output  # already by the list of its models
        assert len(server.requests) == 1 + len(asked)


def test_what_may_pass_is_asked_again(server):
    busy = [429, 503, 408, 409]
    server.refuse = lambda question: busy.pop() if busy else None
    engine = make_engine("openai", settings("tiny", base_url=server.url, concurrency=1))
    assert len(answers(engine, jobs())) == 3
    assert len(server.requests) == 3 + 4 + 1


def test_nothing_more_is_asked_when_nobody_wants_the_rest(server):
    engine = make_engine("openai", settings("tiny", base_url=server.url, concurrency=1))
    replies = engine.generate(jobs(*["base"] * 10))
    next(replies)
    replies.close()
    assert len(server.requests) <= 4  # the first twice, and what was under way


def test_wrong_server_or_model_name_is_named(server):
    with pytest.raises(gsm8k.UserError, match="does not answer"):
        make_engine("openai", settings("tiny", base_url="http://127.0.0.1:1/v1")).versions()
    with pytest.raises(gsm8k.UserError, match="serves tiny, one, two, not large"):
        make_engine("openai", settings("large", base_url=server.url)).versions()
