"""Trackers: a real MLflow server gets a run, a resumed run goes on with its page, and a dead server costs one log line."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.aws import Aws
from pipeline.publish.trackers import log_verdict
from trainer import job as jobs
from trainer import trackers, train
from trainer.bounds import Bounds
from trainer.mlflow_run import SETTINGS
from trainer.packages import PackageError, import_all
from trainer.tracker_page import Facts
from tunedrop.config.parse import parse_run_config

RUN = "cars-0123456789ab"
CONFIG = parse_run_config({"model": "tiny", "rewards": [{"type": "contains", "text": "e"}]})


class Server:
    """`mlflow server`, which starts while the tests that do not need it run."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        store = [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--port", self.url.rpartition(":")[2], "--workers", "1", *store]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, process_group=0)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def runs(self) -> list[dict[str, Any]]:
        experiments = self.ask("api/2.0/mlflow/experiments/search", max_results=100)["experiments"]
        ids = [each["experiment_id"] for each in experiments]
        return self.ask("api/2.0/mlflow/runs/search", experiment_ids=ids).get("runs", [])

    def history(self, run: str, name: str) -> dict[int, float]:
        metrics = self.ask(f"api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key={name}")["metrics"]
        steps = {each.get("step", 0): each["value"] for each in metrics}
        assert len(steps) == len(metrics), "a step was logged twice"
        return steps

    def file(self, run: str, name: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/get-artifact?run_uuid={run}&path={name}", timeout=30) as response:
            return bytes(response.read())


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


@pytest.fixture
def server(started, monkeypatch) -> Server:
    for _ in range(1800):
        try:
            urllib.request.urlopen(started.url + "/health", timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", started.url)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
            monkeypatch.setattr(trackers, "STOP_SECONDS", 60.0)  # a busy machine
            return started
    pytest.fail("mlflow server did not start")


@pytest.fixture(autouse=True)
def _environment(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)


@pytest.fixture
def short(job):
    job.config(grpo={"max_steps": 3, "save_steps": 1}, learnability={"samples": 0})
    job.rows()
    job.heldout()
    return job


def run() -> None:
    train.train(train.parse_flags(["--run-id", RUN]))


def test_without_a_tracker_nothing_is_opened_or_sent(monkeypatch):
    """Accelerate imports mlflow wherever it is installed, and mlflow would report that to its makers."""
    assert trackers.services() == {}
    with trackers.tracked(CONFIG, RUN) as pages:
        assert pages == []
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    import_all([])
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_server_that_never_answers_neither_ends_nor_delays_a_training(short, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")  # no request ends before the training
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING, "trainer"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        run()
        lines = [each.message for each in caplog.records]
    assert short.training()["trackers"] == [{"name": "MLflow", "url": None, "error": "no answer in 1 seconds"}]
    assert lines[:1] == ["MLflow did not end the run: no answer in 1 seconds"]
    assert len(short.metrics()) == 3


def test_a_server_that_is_down_costs_one_line(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "trainer"), trackers.tracked(CONFIG, RUN) as pages:
        for step in (1, 2):
            pages[0]._inbox.put([{"step": step, "epoch": 1.0, "rewards": {}}])
            time.sleep(0.2)
        (about,) = pages.finish("complete")
    assert about["error"] == "ConnectionRefusedError: [Errno 111] Connection refused"
    lines = [each.message for each in caplog.records if "refused" in each.message]  # not of the test before
    assert lines == [f"MLflow did not get all of the run: {about['error']}"]


def test_a_container_without_the_package_is_said_before_the_training(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-app/app-ABC")
    with pytest.raises(PackageError, match="The container cannot import sagemaker_mlflow"):
        trackers.services()


def test_other_ranks_have_no_tracker(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("RANK", "1")
    with trackers.tracked(CONFIG, RUN) as pages:
        assert pages == []


def test_a_page_gets_each_point_once_and_what_it_missed(caplog):
    """A tracker that fails twice; then one that has the first points already, as after a restart."""
    written: list[tuple[int, dict[str, float]]] = []
    failures = [ConnectionError("gone"), ConnectionError("gone")]

    class Page:
        def __init__(self, _facts: Facts):
            self.about: dict[str, str | None] = {"url": "https://example.com/1"}
            self.steps = {"": 1}

        def write(self, figures, step):
            written.append((step, dict(figures)))

        def flush(self):
            if failures:
                raise failures.pop()

        def close(self, status, folder):
            written.append((-1, {f"{status} {folder}": 0.0}))

    with caplog.at_level(logging.WARNING, "trainer"):
        tracker = trackers.Tracker("it", Page, Facts("", "", {}, {}), "grpo")
        sft = {"phase": "sft", "step": 1, "max_steps": 5, "epoch": 1.0, "loss": 2.0, "rewards": {}}
        points = [{"step": n, "max_steps": 3, "kl": None, "loss": float("nan"), "rewards": {"a b": n}} for n in (1, 2)]
        tracker._inbox.put([sft, *points])
        about = tracker.finish("KILLED", None, 10)
    assert written == [(1, {"sft/epoch": 1.0, "sft/loss": 2.0}), (2, {"rewards/a b": 2.0}), (-1, {"KILLED None": 0.0})]
    assert about == {"name": "it", "url": "https://example.com/1", "error": None}
    assert len(caplog.records) <= 1


def test_mlflow_gets_a_run_that_is_resumed_as_one_run(short, server, monkeypatch):
    short.channel("training", "run.json", json.dumps({"run_id": RUN, "dataset": "a 'b'/cars"}))
    monkeypatch.setenv("TRAINING_JOB_NAME", f"demo-train-{RUN}-1")

    begin = Bounds.on_step_begin

    def interrupt(bounds, arguments, state, control, **_):
        begin(bounds, arguments, state, control)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Bounds, "on_step_begin", interrupt)
        run()
    (stopped,) = server.runs()
    assert stopped["info"]["status"] == "KILLED"
    assert list(server.history(stopped["info"]["run_id"], "reward")) == [1, 2]
    run()
    (found,) = server.runs()
    info, data = found["info"], found["data"]
    assert (info["status"], info["run_name"], info["run_id"]) == ("FINISHED", RUN, stopped["info"]["run_id"])
    assert server.history(info["run_id"], "reward") == {p["step"]: pytest.approx(p["reward"]) for p in short.metrics()}
    assert server.history(info["run_id"], "rewards/contains").keys() == {1, 2, 3}
    tags = {tag["key"]: tag["value"] for tag in data["tags"]}
    named = {"run_id": RUN, "job": f"demo-train-{RUN}-1", "dataset": "a 'b'/cars", "line": "a 'b'"}
    assert {f"tunedrop.{name}": value for name, value in named.items()}.items() <= tags.items()
    params = {each["key"]: each["value"] for each in data["params"]}
    assert (params["model"], params["grpo.max_steps"]) == ("tiny", "3")
    (tracker,) = short.training()["trackers"]
    assert tracker["url"] == f"{server.url}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}"
    assert (tracker["experiment"], tracker["error"]) == ("demo", None)
    for path in ("run_config.json", "metrics.jsonl", "rollouts/index.json"):
        assert server.file(info["run_id"], path) == (short.model / path).read_bytes()
    assert json.loads(server.file(info["run_id"], "training.json"))["steps"] == 3
    result = {"verdict": "APPROVED", "training": short.training(), "artifacts": {"report": "s3://a/report.html"}}
    log_verdict(result, "<p>the report", {"MLFLOW_TRACKING_URI": server.url}, Aws("unused"))
    tags = {tag["key"]: tag["value"] for tag in server.runs()[0]["data"]["tags"]}
    assert (tags["tunedrop.verdict"], tags["tunedrop.report"]) == ("APPROVED", "s3://a/report.html")
    assert server.file(info["run_id"], "report.html") == b"<p>the report"


def test_a_run_that_fails_is_failed_in_mlflow(server):
    with pytest.raises(jobs.JobError), trackers.tracked(CONFIG, "failing-0123456789ab"):
        raise jobs.JobError("no")
    (found,) = [each for each in server.runs() if each["info"]["run_name"] == "failing-0123456789ab"]
    assert found["info"]["status"] == "FAILED"
