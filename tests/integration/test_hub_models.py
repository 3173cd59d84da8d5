"""A model of the hub is pinned to its commit: in the run's identity, in what the jobs load, and in what is published."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fake_stack import ARTIFACTS, PLAN, plan_request

from pipeline.runs.states import RunState
from pipeline.validation import hub
from pipeline.validation.hub import pin_model

MAIN, TAG, NEXT = "a" * 40, "b" * 40, "c" * 40


class Hub:
    """A hub with one model; `answers` has the status and the body for each path."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.has("main", MAIN)
        self.has("v1.0", TAG)
        this = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                this.requests.append((self.path, self.headers["Authorization"]))
                status, body = this.answers.get(self.path.partition("?")[0], (404, b'{"error": "Repository not found"}'))
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", body.decode())
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def has(self, revision: str, commit: str) -> None:
        self.answers[f"/api/models/org/thing-1B/revision/{revision}"] = (200, json.dumps({"sha": commit}).encode())


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    server = Hub()
    yield server
    server.server.shutdown()


def with_endpoint(world, url: str) -> None:
    """Release a plan whose jobs, and therefore validation, use this hub."""
    requests = {kind: plan_request(kind) | {"Environment": {"HF_ENDPOINT": url}} for kind in ("train", "test")}
    plan = {"digest": PLAN, "inference_image": None, **requests}
    world.aws.s3.put_object(Bucket=ARTIFACTS, Key=f"launch_plans/{PLAN}.json", Body=json.dumps(plan).encode())


def test_the_commit_is_the_runs_identity_and_what_is_loaded_and_published(world, the_hub):
    with_endpoint(world, the_hub.url)
    world.put("training_data/cars.yaml", b"model: org/thing-1B\nrewards: [{type: exact_match}]\n")
    first = world.drop()
    assert first.model == f"org/thing-1B@{MAIN}"
    assert world.read_json(f"runs/{first.run_id}/input/config.json")["model"] == first.model  # what both jobs load
    assert world.drop().run_id == first.run_id
    published = world.tested(world.trained(first))
    result = world.read_json(f"runs/{first.run_id}/result.json")
    package = world.aws.sagemaker.describe_model_package(ModelPackageName=published.model_package)
    assert result["config"]["model"] == package["CustomerMetadataProperties"]["base_model"] == first.model
    assert first.model in (world.aws.read(ARTIFACTS, f"runs/{first.run_id}/report.html") or b"").decode()
    the_hub.has("main", NEXT)  # the branch moves: the same config is another run
    moved = world.drop()
    assert (moved.run_id != first.run_id, moved.model) == (True, f"org/thing-1B@{NEXT}")


@pytest.mark.parametrize(
    ("model", "pinned", "requests"),
    [
        ("org/thing-1B", f"org/thing-1B@{MAIN}", 1),
        ("org/thing-1B@v1.0", f"org/thing-1B@{TAG}", 1),
        (f"org/thing-1B@{NEXT}", f"org/thing-1B@{NEXT}", 0),
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", 0),
    ],
)
def test_what_is_looked_up(the_hub, model, pinned, requests):
    assert pin_model(model, {"HF_ENDPOINT": the_hub.url, "HF_TOKEN": "token"}) == (pinned, [])
    assert [authorization for _, authorization in the_hub.requests] == ["Bearer token"] * requests


def test_a_renamed_model_is_followed(the_hub):
    the_hub.answers["/api/models/old/name/revision/main"] = (307, b"/api/models/org/thing-1B/revision/main")
    assert pin_model("old/name", {"HF_ENDPOINT": the_hub.url}) == (f"old/name@{MAIN}", [])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_model_that_the_hub_does_not_have_is_refused(the_hub, status):
    the_hub.answers["/api/models/org/thing-1B/revision/main"] = (status, b"{}")
    model, (problem,) = pin_model("org/thing-1B", {"HF_ENDPOINT": the_hub.url})
    assert (model, problem.code, problem.key) == ("org/thing-1B", "MODEL_MISSING", "model")
    assert str(status) in problem.message


@pytest.mark.parametrize(
    "answer", [(500, b""), (200, b"<html>"), (200, b"[]"), (200, b'{"sha": "main"}'), (200, b'{"sha": 5}'), (200, b"\xff")]
)
def test_an_answer_without_a_commit_is_refused(the_hub, answer):
    the_hub.answers["/api/models/org/thing-1B/revision/main"] = answer
    _, (problem,) = pin_model("org/thing-1B", {"HF_ENDPOINT": the_hub.url})
    assert problem.code == "MODEL_NOT_PINNED"


def test_without_network_the_receipt_names_the_ways_out(world, monkeypatch):
    monkeypatch.setattr(hub, "ATTEMPTS", 0)
    with socket.socket() as closed:  # nobody listens
        closed.bind(("127.0.0.1", 0))
        with_endpoint(world, f"http://127.0.0.1:{closed.getsockname()[1]}")
        world.put("training_data/cars.yaml", b"model: org/thing-1B\n")
        run = world.drop()
    assert run.state == RunState.REJECTED
    (problem,) = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    assert problem["code"] == "MODEL_NOT_PINNED"
    assert "cannot be reached" in problem["message"]
    assert "org/name@COMMIT" in problem["hint"]
    assert "drop --model" in problem["hint"]
    world.put("training_data/cars.yaml", b"model: org/thing-1B@" + MAIN.encode())
    assert world.drop().state == RunState.VALIDATED
