"""Approved means serving, with real models on this machine: asked, replaced under requests, refused, asleep: `make soak`."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos import bring_up
from local_app import base_model
from local_app.stack import PROJECT
from pipeline.runs.deployments import Deployment as Item
from pipeline.runs.deployments import Stage
from pipeline.runs.states import Run
from tunedrop_cli.deployment import Deployment

pytestmark = pytest.mark.soak

SAMPLE = PROJECT / "tunedrop_cli/sample"
SERVING = {"EndpointInstanceType": "ml.g5.xlarge", "EndpointBakeMinutes": "0", "EndpointIdleMinutes": "2"}
LINE = "numbers"
MINUTES = 60.0


class Application:
    """A local app that serves, and the runs that were dropped there."""

    def __init__(self, folder: Path):
        self.folder, self.stack = folder, bring_up(folder / "state", SERVING)
        self.deployment = Deployment.local(self.stack)
        self.model = base_model.fetch(PROJECT / ".tunedrop/models")

    def tunedrop(self, *arguments: str | Path, code: int = 0) -> str:
        command = [str(Path(sys.executable).with_name("tunedrop")), "--state", str(self.stack.folder), *map(str, arguments)]
        done = subprocess.run(command, check=False, cwd=self.folder, capture_output=True, text=True, timeout=1800)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def drop(self, name: str, steps: int) -> Run:
        """Drop the counting sample, trained for so many steps, wait for the run's end, and return the run."""
        for suffix, file in ((".jsonl", "counting.jsonl"), (".tests.json", "counting.tests.json")):
            (self.folder / f"{name}{suffix}").write_text((SAMPLE / file).read_text())
        config = (SAMPLE / "counting.yaml").read_text().replace("max_steps: 10", f"max_steps: {steps}")
        (self.folder / f"{name}.yaml").write_text(config + f"line: {LINE}\n")
        files = [self.folder / f"{name}{suffix}" for suffix in (".jsonl", ".yaml", ".tests.json")]
        self.tunedrop("drop", files[0], "--config", files[1], "--tests", files[2], "--model", self.model, "--wait")
        return self.deployment.find(name)

    def wait(self, done: Callable[[Item], bool], minutes: float = 10) -> Item:
        """Wait until the line's deployment is done with something, and return the deployment."""
        deadline = time.monotonic() + minutes * MINUTES
        while not done(item := self.deployment.deployments.get(LINE)):
            assert time.monotonic() < deadline, item
            time.sleep(2)
        return item

    def recorded(self, run: Run) -> dict[str, str]:
        """Return the tuned model's answers in a run's test job, by question."""
        tested = self.deployment.read_json(run, f"inference/{run.test_job}/output/model/inference.json")
        return {each["prompt"][-1]["content"]: each["tuned"]["text"] for each in tested["tests"]}

    @contextmanager
    def constant_requests(self, item: Item, body: bytes) -> Iterator[Counter[str]]:
        """Ask the line's name again and again, in two threads; count the answers, and what failed."""
        runtime = self.stack.connect("client", "sagemaker-runtime")
        answers: Counter[str] = Counter()
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                try:
                    answer = runtime.invoke_endpoint(
                        EndpointName=item.endpoint,
                        InferenceComponentName=item.component,
                        ContentType="application/json",
                        Body=body,
                    )
                    answers[json.loads(answer["Body"].read())["choices"][0]["message"]["content"]] += 1
                except Exception as error:  # noqa: BLE001 - counted
                    answers[f"failed: {error}"] += 1

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield answers
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def servers() -> list[psutil.Process]:
    """Return the processes that serve models."""
    return [each for each in psutil.process_iter(["cmdline"]) if "local_app.serving" in (each.info["cmdline"] or [])]


@pytest.fixture
def application(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    application = Application(tmp_path)
    yield application
    application.stack.down()


def test_an_approved_model_answers_until_a_better_one_does(application, say):
    first = application.drop("counting", steps=10)
    assert first.verdict == "APPROVED"
    began = time.monotonic()
    item = application.wait(lambda item: item.run == first.run_id)
    say(f"deployed {time.monotonic() - began:.0f} s after the drop's end: {item.answered}")
    recorded = application.recorded(first)
    question = next(iter(recorded))
    assert application.tunedrop("ask", LINE, question).strip().splitlines()[-1] == recorded[question].strip()
    assert application.tunedrop("ask", LINE, question, "--base", "--json")

    # Another model under constant requests: none fails, and the answers change over. The first model slept meanwhile.
    second = application.drop("again", steps=5)
    assert application.tunedrop("ask", LINE, question)
    system = {"role": "system", "content": "Reply with one number."}
    answers = application.recorded(second)
    changed = next((each for each in answers if answers[each] != recorded[each]), question)
    body = {"messages": [system, {"role": "user", "content": changed}], "max_tokens": 32, "temperature": 0}
    with application.constant_requests(item, json.dumps(body).encode()) as seen:
        if second.verdict != "APPROVED":
            application.tunedrop("approve", second.run_id)
        item = application.wait(lambda item: item.run == second.run_id or second.run_id in item.refused)
        time.sleep(5)
    say(f"{seen.total()} requests during the change: {dict(seen)}")
    assert item.run == second.run_id, item.refused
    assert not [answer for answer in seen if answer.startswith("failed")]
    assert answers[changed] in seen

    # A wrong adapter: the first run's archive in the place of the third's.
    third = application.drop("wrong", steps=3)
    s3, bucket = application.deployment.s3, application.deployment.outputs.artifact_bucket
    right, wrong = (f"{str(run.artifacts).removeprefix(f's3://{bucket}/')}adapter.tar.gz" for run in (third, first))
    s3.copy_object(Bucket=bucket, Key=right, CopySource={"Bucket": bucket, "Key": wrong})
    if third.verdict != "APPROVED":
        application.tunedrop("approve", third.run_id)
    item = application.wait(lambda item: third.run_id in item.refused and item.stage == Stage.IDLE)
    say(f"the wrong adapter: {item.refused[third.run_id]}")
    assert item.run == second.run_id
    assert "does not answer as the tested model" in item.refused[third.run_id]

    # Asleep after two minutes without a request, and awake for the next question.
    deadline = time.monotonic() + 10 * MINUTES
    while servers():
        assert time.monotonic() < deadline
        time.sleep(2)
    began = time.monotonic()
    told = application.tunedrop("ask", LINE, changed)
    say(f"the first question after the sleep took {time.monotonic() - began:.0f} s")
    assert told.strip().splitlines()[-1] == answers[changed].strip()
    application.tunedrop("undeploy", LINE)
    application.wait(lambda item: item.run is None and item.stage == Stage.IDLE and not item.unused)
    assert not servers()
