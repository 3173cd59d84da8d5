"""A container for the emulator's tests: it keeps to vLLM's contract with SageMaker, starts at once, and fails on demand.

    python vllm_container.py --model FOLDER --port PORT

The model's folder has a file `version`. It is read at the start, as a server loads its model: the folder may go while the
last requests are answered. The environment can make it unhealthy (`UNHEALTHY=1`) or end it at once (`CRASH=1`). An adapter
is a folder with a file `version`; one that says `broken` is refused, and one that says `deadly` ends the process. The body
of an invocation can have `sleep` (seconds), `status` (the answer's), `die`, and `stream` with `parts` and `pause` (seconds),
as server-sent events with `documents`. With a file `answers.json`, the answers by question, the model answers with chat
completions.
"""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """The contract's routes."""

    version: str
    answers: dict[str, str]
    adapters: dict[str, str]
    protocol_version = "HTTP/1.1"  # with chunks: a stream that breaks off is no stream that ends

    def do_GET(self) -> None:
        """GET /ping."""
        self._answer(503 if os.environ.get("UNHEALTHY") else 200, {})

    def do_DELETE(self) -> None:
        """DELETE /adapters/{name}."""
        self._answer(200 if self.adapters.pop(self.path.rpartition("/")[2], None) else 404, {})

    def do_POST(self) -> None:
        """POST /adapters and POST /invocations."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['SERVING_TOKEN']}":
            self._answer(401, {})
        elif self.path == "/adapters":
            version = (Path(body["src"]) / "version").read_text()
            if version == "deadly":
                os._exit(3)
            if version == "broken":
                self._answer(400, {"error": "a broken adapter"})
            else:
                self.adapters[body["name"]] = version
                self._answer(200, {})
        else:
            self._invoke(body)

    def _invoke(self, body: dict[str, Any]) -> None:
        adapter = self.headers["X-Amzn-SageMaker-Adapter-Identifier"]
        if adapter and adapter not in self.adapters:
            self._answer(404, {"error": f"no adapter {adapter}"})
            return
        if self.answers:
            text = self.answers[body["messages"][-1]["content"]]
            self._answer(200, {"choices": [{"message": {"content": text}}]})
            return
        version = self.adapters[adapter] if adapter else self.version
        time.sleep(body.get("sleep", 0))
        if body.get("die"):
            os._exit(3)
        if body.get("stream"):
            self._stream(version, body)
            return
        headers = {name: value for name, value in self.headers.items() if name not in ("Authorization", "Host")}
        self._answer(body.get("status", 200), {"version": version, "pid": os.getpid(), "headers": headers})

    def _stream(self, version: str, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(body["parts"]):
            part = f"{version} {number}\n"
            if body.get("documents"):
                part = f"data: {json.dumps({'part': part})}\n\n"
            self.wfile.write(f"{len(part):x}\r\n{part}\r\n".encode())
            time.sleep(body["pause"])
        if body.get("documents"):
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if os.environ.get("CRASH"):
        sys.exit(1)
    version, answers = options.model / "version", options.model / "answers.json"
    Handler.version = version.read_text() if version.exists() else ""
    Handler.answers = json.loads(answers.read_text()) if answers.exists() else {}
    Handler.adapters = {}
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
