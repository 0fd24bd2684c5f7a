"""What the tests' servers of a chat API share."""

from __future__ import annotations

import json
from typing import Any


class InJson:
    """Beside `BaseHTTPRequestHandler`: reads and answers requests in JSON, and logs none."""

    def request_body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
