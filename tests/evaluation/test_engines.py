"""The engines on a tiny model, and the command line from question to table. vLLM's tests run where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gsm8k
import pytest
import tiny
from engines import Job, Sampling, Settings, make_engine
from transformers_engine import TransformersEngine
from typer.testing import CliRunner

QUESTIONS = ["How many?", "Tom has 3 pens and buys 4 more pens at the market. How many pens has he?", "1 + 1?"]


@pytest.fixture(scope="module")
def model32(tmp_path_factory):
    """Wild weights, so that the answers differ; attention heads of a size that vLLM supports."""
    shape = {
        "hidden_size": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "max_position_embeddings": 1024,
    }
    return tiny.make_model(tmp_path_factory.mktemp("tiny32") / "model", dtype="float32", **shape)


@pytest.fixture(scope="module")
def adapters(model32, tmp_path_factory):
    """Two LoRA adapters whose random weights change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model32), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"question": text, "answer": f"so\n#### {index}"} for index, text in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def jobs(*runs: str) -> list[Job]:
    return [
        Job(run, index, [{"role": "user", "content": text}])
        for run in runs or ("base",)
        for index, text in enumerate(QUESTIONS)
    ]


def settings(model, **changes) -> Settings:
    return Settings(**{"model": str(model), "adapters": {}, "sampling": Sampling(max_tokens=12), **changes})


def answers(engine, asked) -> dict[tuple[str, int], str]:
    return {(job.run, job.index): generation.text for job, generation in engine.generate(asked)}


def tokens(engine, asked) -> dict[tuple[str, int], list[int]]:
    """Where texts cannot be compared: vLLM leaves out the bytes of a last, unfinished character."""
    return {(job.run, job.index): generation.token_ids for job, generation in engine.generate(asked)}


# --- transformers ----------------------------------------------------------------------------------------------------


def test_batches_answer_like_single_prompts(model32):
    one_by_one = answers(TransformersEngine(settings(model32, batch_size=1)), jobs())
    together = answers(TransformersEngine(settings(model32, batch_size=3)), jobs())
    assert together == one_by_one
    assert len(set(together.values())) > 1


def test_tokens_and_finish_reason(model32):
    for _, generation in TransformersEngine(settings(model32)).generate(jobs()):
        assert generation.finish_reason == "length"  # random weights never stop
        assert len(generation.token_ids) == 12


def test_a_penalty_in_the_models_own_settings_is_overruled(model32, tmp_path):
    penalized = tmp_path / "penalized"
    shutil.copytree(model32, penalized)
    config = json.loads((penalized / "generation_config.json").read_text())
    (penalized / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 9.0}))
    assert answers(TransformersEngine(settings(penalized)), jobs()) == answers(
        TransformersEngine(settings(model32)), jobs()
    )


def test_who_reads_the_answers_is_not_in_the_engines_modes(model32, adapters):
    """Neither inference mode, in which nothing can be trained, nor the adapter switched off, as for the base model."""
    import torch

    replies = TransformersEngine(settings(model32, adapters=adapters, batch_size=1)).generate(jobs("base", "one"))
    for _ in replies:
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_adapters_in_one_load(model32, adapters):
    adapters = {"beta0.1": adapters["one"], "beta0.2": adapters["two"]}  # dots, as names of a sweep's cells have
    everything = answers(TransformersEngine(settings(model32, adapters=adapters)), jobs("base", *adapters))
    base = answers(TransformersEngine(settings(model32)), jobs())
    for index in range(len(QUESTIONS)):
        assert everything["base", index] == base["base", index]
        assert len({everything[run, index] for run in ("base", *adapters)}) == 3


# --- an OpenAI-compatible server -------------------------------------------------------------------------------------


@pytest.fixture
def server(model32, adapters):
    """The chat API over the tiny model; it answers 500 to the first question, and for good after `broken_after`.

    `server.refuse(question)` says with which status, if with any, a question is refused.
    """
    engine = TransformersEngine(settings(model32, adapters=adapters))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if http.key_status:
                return self.reply(http.key_status, {"error": {"message": "no such key"}})
            served = [{"id": name, "object": "model"} for name in ("tiny", "one", "two")]
            self.reply(200, {"object": "list", "data": served})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                http.requests.append(request)
                if len(http.requests) == 1 or len(http.requests) > http.broken_after:
                    return self.reply(500, {"error": {"message": "out of luck"}})
                if status := http.refuse(request["messages"][-1]["content"]):
                    return self.reply(status, {"error": {"message": f"refused with {status}"}})
                run = "base" if request["model"] == "tiny" else request["model"]
                ((_, generation),) = engine.generate([Job(run, 0, request["messages"])])
            message = {"role": "assistant", "content": generation.text}
            choice = {
                "index": 0,
                "message": message,
                "finish_reason": generation.finish_reason,
                "token_ids": generation.token_ids,
            }
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.requests, http.broken_after, http.key_status, http.refuse = [], math.inf, None, lambda question: None
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield http
    http.shutdown()


def test_server_answers_like_the_model_after_a_retry(server, model32, adapters):
    changes = {"adapters": adapters, "base_url": server.url, "concurrency": 2}
    engine = make_engine("openai", settings("tiny", **changes))
    assert set(engine.versions()) == {"openai"}
    expected = answers(TransformersEngine(settings(model32, adapters=adapters)), jobs("base", "one"))
    assert answers(engine, jobs("base", "one")) == expected
    assert len(server.requests) == 7  # six questions, one asked again
    for request in server.requests:
        assert (request["temperature"], request["repetition_penalty"], request["max_tokens"]) == (0.0, 1.0, 12)
        assert request["return_token_ids"] is True


def test_a_server_that_breaks_keeps_what_it_answered(server, model32, data, tmp_path, monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    server.broken_after = 2  # the first is refused, the second answered
    words = ["--engine", "openai", "--model", "tiny", "--base-url", server.url, "--data", str(data)]
    words += ["--output", str(tmp_path / "out"), "--max-tokens", "12", "--concurrency", "1"]
    failed = CliRunner().invoke(gsm8k.app, words)
    assert failed.exit_code == 2
    assert "out of luck" in failed.output
    assert "goes on from there" in failed.output
    path = tmp_path / "out" / "base" / "generations.jsonl"
    assert len(path.read_text().splitlines()) == 1

    server.broken_after = math.inf
    assert CliRunner().invoke(gsm8k.app, words).exit_code == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [0, 1, 2]


def ask_server(server, data, output):
    words = ("--engine", "openai", "--model", "tiny", "--base-url", server.url, "--data", data, "--output", output)
    return invoke(*words, "--max-tokens", 12, "--concurrency", 1, "--prompt", "plain")


def test_a_problem_that_the_server_refuses_is_recorded_and_counts_as_unanswered(server, data, tmp_path):
    server.refuse = lambda question: 400 if question == QUESTIONS[1] else None
    output = tmp_path / "out"
    for requests in (4, 5):  # all three, one of them twice for its 500; then only what was refused
        result = ask_server(server, data, output)
        assert result.exit_code == 0, result.output
        assert len(server.requests) == requests
        assert "the server refused 1 problems, which the same command asks again: 2 (Error code: 400" in result.output
        scored = json.loads((output / "base" / "results.json").read_text())
        assert (scored["summary"]["problems"], scored["summary"]["missing"]) == (3, 1)
        assert [row.get("refused") is not None for row in scored["rows"]] == [False, True, False]
    server.refuse = lambda question: None
    result = ask_server(server, data, output)
    assert "the server refused" not in result.output
    assert json.loads((output / "results.json").read_text())["base"]["missing"] == 0
    server.broken_after = 0
    assert ask_server(server, data, output).exit_code == 0  # nothing is left to ask
    assert len(server.requests) == 6


def test_a_server_that_refuses_every_problem_is_no_score(server, data, tmp_path):
    server.refuse = lambda question: 422
    result = ask_server(server, data, tmp_path / "out")
    assert result.exit_code == 2
    assert "The server refused every question to base, 3 of them (Error code: 422" in result.output
    assert not list((tmp_path / "out").glob("**/manifest.json"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses the key (Error code: 401"),
        (403, "refuses the key (Error code: 403"),
        (404, "does not know what it is asked for (Error code: 404"),
        (402, "refuses to answer (Error code: 402"),
        (200, "does not answer (its reply holds no answer"),
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


def test_what_may_pass_is_asked_again(server, monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
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


def test_wrong_server_or_model_name_is_named(server, monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    with pytest.raises(gsm8k.UserError, match="does not answer"):
        make_engine("openai", settings("tiny", base_url="http://127.0.0.1:1/v1")).versions()
    with pytest.raises(gsm8k.UserError, match="serves tiny, one, two, not large"):
        make_engine("openai", settings("large", base_url=server.url)).versions()


# --- the command line ------------------------------------------------------------------------------------------------


def invoke(*words: object):
    return CliRunner().invoke(gsm8k.app, [str(word) for word in words])


def test_from_questions_to_scores_and_again(model32, adapters, data, tmp_path):
    output = tmp_path / "out"
    words = ["--engine", "hf", "--model", model32, "--data", data, "--output", output, "--max-tokens", 12]
    words += [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    first = invoke(*words)
    assert first.exit_code == 0, first.output
    summaries = json.loads((output / "results.json").read_text())
    assert list(summaries) == ["base", "one", "two"]
    assert summaries["one"]["problems"] == 3
    manifest = json.loads((output / "one" / "manifest.json").read_text())
    assert manifest["sampling"]["repetition_penalty"] == 1.0
    assert set(manifest["adapter"]) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" in manifest["model"]["files"]

    written = {path: path.read_bytes() for path in output.glob("*/generations.jsonl")}
    assert invoke(*words).exit_code == 0  # nothing is asked twice
    assert {path: path.read_bytes() for path in written} == written

    changed = invoke(*words, "--temperature", 0.5)
    assert changed.exit_code == 2
    assert "holds another run: its sampling is" in changed.output

    (output / "one" / "results.json").unlink()
    assert invoke("--score-only", "--data", data, "--output", output).exit_code == 0
    assert json.loads((output / "one" / "results.json").read_text())["summary"] == summaries["one"]


def test_compare_on_the_command_line(model32, adapters, data, tmp_path):
    from compare import app

    output = tmp_path / "out"
    invoke(
        *("--engine", "hf", "--model", model32, "--data", data, "--output", output, "--max-tokens", 4),
        *("--adapter", f"one={adapters['one']}"),
    )
    result = CliRunner().invoke(app, [str(output / "base"), str(output / "one"), "--output", str(tmp_path / "c.json")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "c.json").read_text())
    assert row["problems"] == 3
    assert CliRunner().invoke(app, [str(output / "base")]).exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": ""}, "--model is missing"),
        ({"--model": "/no/such/model"}, "There is no model at"),
        ({"--model": "nobody/has-this"}, "neither a folder nor to be had from the hub"),
        ({"--data": "/no/such.jsonl"}, "There is no data file"),
        ({"--adapter": "dpo"}, "write NAME=DIR"),
        ({"--adapter": "base=/x"}, "write NAME=DIR"),
        ({"--adapter": "dpo=/no/such"}, "holds no adapter_config.json"),
        ({"--prompt": "polite"}, "neither paper nor plain"),
        ({"--max-model-len": 20}, "raise --max-model-len"),
    ],
)
def test_wrong_arguments(model32, data, tmp_path, changes, message):
    words = {"--engine": "hf", "--model": model32, "--data": data, "--output": tmp_path / "out", **changes}
    result = invoke(*[part for item in words.items() for part in item])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_model_without_chat_template(model32, data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model32, bare)
    (bare / "chat_template.jinja").unlink()
    result = invoke("--engine", "hf", "--model", bare, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "has no chat template" in result.output


def test_score_only_without_runs(data, tmp_path):
    result = invoke("--score-only", "--data", data, "--output", tmp_path)
    assert result.exit_code == 2
    assert "holds no runs" in result.output


def test_evaluation_imports_neither_llamafactory_nor_the_plugin():
    import ast

    for path in Path(gsm8k.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not [name for name in names if name.startswith("llamafactory")], path


def test_lora_rank_above_vllms_limit(tmp_path):
    from vllm_engine import _lora_rank

    (tmp_path / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(gsm8k.UserError, match="rank 1024, above vLLM's 512"):
        _lora_rank(str(tmp_path))


# --- vLLM, where it is installed -------------------------------------------------------------------------------------


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-eval"
)


@needs_vllm
@pytest.mark.slow
def test_vllm_answers_like_transformers(model32, adapters):
    """Base and adapters in one load: the base must not get an adapter's answers."""
    changes = {"dtype": "float32", "adapters": adapters, "max_model_len": 1024}
    vllm = tokens(make_engine("vllm", settings(model32, **changes)), jobs("base", "one", "two"))
    hf = tokens(TransformersEngine(settings(model32, adapters=adapters)), jobs("base", "one", "two"))
    assert vllm == hf


@needs_vllm
@pytest.mark.slow
def test_vllm_replicas_share_the_jobs(model32):
    changes = {"dtype": "float32", "data_parallel": 2, "max_model_len": 1024}
    vllm = tokens(make_engine("vllm", settings(model32, **changes)), jobs())
    assert vllm == tokens(TransformersEngine(settings(model32)), jobs())
