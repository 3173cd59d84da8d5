"""An HTTP server in this process that answers as a test says, and a judge with OpenAI's API on top of it.

with judge_server(grade) as judge:
    RewardSpec(type="judge_group", model="any", url=judge.url)   # allowed by RewardPermissions(hosts=("127.0.0.1",))
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from typing import Any

import boto3
from botocore.config import Config


class Server(ThreadingHTTPServer):
    """Answers every POST by `reply(body) -> (status, headers, body)` and records the bodies and authorizations."""

    daemon_threads = True
    reply: Callable[[Any], tuple[int, dict[str, str], Any]]
    asked: list[Any]
    authorized: list[str | None]

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.server_port}"

    def results(self, make: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Answer with what `make` returns for the request."""
        self.reply = lambda body: (200, {}, make(body))


class Handler(BaseHTTPRequestHandler):
    """Answers and records the requests of a `Server`."""

    server: Server

    def do_POST(self) -> None:
        """Answer as the server's `reply` says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.authorized.append(self.headers["Authorization"])
        status, headers, answer = self.server.reply(body)
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def answering_server() -> Iterator[Server]:
    """Serve until the context ends; a test sets the `reply`."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.authorized = [], []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def aws_clients(server: Server) -> Callable[[str], Any]:
    """Return what gives clients of AWS, whose requests go to the server."""
    config = Config(read_timeout=0.3, retries={"total_max_attempts": 1})
    place = {"region_name": "us-east-1", "endpoint_url": server.url}
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    return cache(lambda name: boto3.client(name, config=config, **place, **keys))


def converse_reply(text: str) -> tuple[int, dict[str, str], Any]:
    """Return the response of Bedrock's Converse API with this text."""
    return (
        200,
        {},
        {
            "output": {"message": {"role": "assistant", "content": [{"text": text}]}},
            "stopReason": "end_turn",
            "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2},
            "metrics": {"latencyMs": 1},
        },
    )


# --- a judge ---


@contextmanager
def judge_server(grade: Callable[[str], Any]) -> Iterator[Server]:
    """Serve a judge that ranks the answers of a request by `grade`, the highest first and equals together."""
    with answering_server() as server:
        server.reply = lambda body: chat(json.dumps({"reason": "so it is", "ranking": ranking(request_text(body), grade)}))
        yield server


def request_text(body: dict[str, Any]) -> str:
    """Return the text of a request for a chat completion."""
    return str(body["messages"][0]["content"])


def answers_in(text: str) -> dict[str, str]:
    """Return the answers that a judge is to rank, by letter, in the order in which the judge reads them."""
    return {name: answer for name, _, answer in re.findall(r"<answer (\w+) (\w+)>\n(.*?)\n</answer \1 \2>", text, re.DOTALL)}


def ranking(text: str, grade: Callable[[str], Any]) -> list[list[str]]:
    """Return the letters of the answers in a request, the highest grade first and equal ones together."""
    answers = answers_in(text)
    ordered = sorted(answers, key=lambda name: grade(answers[name]), reverse=True)
    return [list(names) for _, names in groupby(ordered, key=lambda name: grade(answers[name]))]


def chat(text: str | None) -> tuple[int, dict[str, str], Any]:
    """Return an endpoint's response: a chat completion with this text."""
    return 200, {}, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
