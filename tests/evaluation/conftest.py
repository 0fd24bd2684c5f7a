"""A tiny model whose answers differ, two adapters of it, a server, and problems to score them on."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
from engine_cases import QUESTIONS, settings
from json_server import InJson

from llamafactory_ext.evaluation.engines import Job
from llamafactory_ext.evaluation.transformers_engine import TransformersEngine


@pytest.fixture(scope="session")
def model32(tmp_path_factory):
    """Wild weights, so that the answers differ; attention heads of a size that vLLM supports."""
    shape = {
        "hidden_size": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "max_position_embeddings": 1024,
    }
    return tiny.make_model(tmp_path_factory.mktemp("tiny32") / "model", dtype="float32", **shape)


@pytest.fixture(scope="session")
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


@pytest.fixture
def server(model32, adapters, monkeypatch):
    """The chat API over the tiny model; it answers 500 to the first question, and for good after `broken_after`.

    `server.refuse(question)` says with which status, if with any, a question is refused; requests with fields in
    `server.unknown` are refused with `unknown_status`.
    """
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    engine = TransformersEngine(settings(model32, adapters=adapters))
    lock = threading.Lock()

    class Handler(InJson, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if http.key_status:
                return self.reply(http.key_status, {"error": {"message": "no such key"}})
            served = [{"id": name, "object": "model"} for name in ("tiny", "one", "two")]
            self.reply(200, {"object": "list", "data": served})

        def do_POST(self) -> None:
            request = self.request_body()
            with lock:
                http.requests.append(request)
                if len(http.requests) == 1 or len(http.requests) > http.broken_after:
                    return self.reply(500, {"error": {"message": "out of luck"}})
                if named := sorted(http.unknown & request.keys()):
                    return self.reply(http.unknown_status, {"error": {"message": f"Unknown field: {named[0]}"}})
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

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.requests, http.broken_after, http.key_status, http.refuse = [], math.inf, None, lambda question: None
    http.unknown, http.unknown_status = set(), 400
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield http
    http.shutdown()
