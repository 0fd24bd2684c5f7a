"""A server with the chat API that replies by a rule of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from json_server import InJson


class RefusalError(Exception):
    """A status and a message."""


class CutOffError(Exception):
    """A reply that ends at the token limit: its text."""


@contextmanager
def chat_server() -> Iterator[Any]:
    """`server.answer(request)` is the reply's text; a RefusalError or CutOffError is what happens instead of it.

    `server.requests` are those so far, `server.rejects` the fields of a request that it does not take. It serves `m`.
    """

    class Handler(InJson, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

        def do_POST(self) -> None:
            request = self.request_body()
            http.requests.append(request)
            reason = "stop"
            try:
                for name in http.rejects & set(request):
                    raise RefusalError(400, f"Unsupported parameter: '{name}' is not supported with this model.")
                text = http.answer(request)
            except CutOffError as cut:
                text, reason = str(cut), "length"
            except RefusalError as refusal:
                status, message = refusal.args
                return self.reply(status, {"error": {"message": message}})
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    http: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.requests, http.rejects = [], set()
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield http
    finally:
        http.shutdown()
