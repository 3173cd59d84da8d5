"""The five handlers over moto: real events in, real (emulated) state behind, everything that was sent recorded."""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from fake_stack import ARTIFACTS, DATA, TABLE, create_resources
from moto import mock_aws

from tunedrop.aws import Aws, connect
from tunedrop.runs import Run

GOOD_DATA = b"".join(b'{"question": "%d+1?", "answer": "%d"}\n' % (n, n + 1) for n in range(30))
CONTEXT = SimpleNamespace(
    function_name="f",
    memory_limit_in_mb=128,
    invoked_function_arn="arn:aws:lambda:us-east-1:123456789012:function:f",
    aws_request_id="request",
    get_remaining_time_in_millis=lambda: 30_000,
)


@dataclass
class World:
    """A deployed stack in memory."""

    aws: Aws
    load_event: Callable[[str], dict[str, Any]]
    sent_events: list[dict[str, Any]] = field(default_factory=list)
    notifications: list[dict[str, Any]] = field(default_factory=list)
    job_requests: list[dict[str, Any]] = field(default_factory=list)
    failing_jobs: list[str] = field(default_factory=list)  # error codes that the next CreateTrainingJob calls answer
    uploads: int = 0
    calls: list[str] = field(default_factory=list)  # the operations of the last invocation, in order
    trouble_at: int = -1  # the call of the next invocation that trouble happens to
    trouble: Callable[[Callable[[], Any]], Any] | None = None  # what happens to it, given how to make it

    def put(self, key: str, body: bytes) -> str:
        """Put an object into the data bucket and return its version."""
        return self.aws.s3.put_object(Bucket=DATA, Key=key, Body=body)["VersionId"]

    def upload_event(self, key: str, body: bytes = GOOD_DATA, sequencer: str | None = None) -> dict[str, Any]:
        """Put a dataset and return the event that S3 would send."""
        event = self.load_event("validate_dataset.upload")
        self.uploads += 1
        event["detail"]["object"] |= {
            "key": key,
            "version-id": self.put(key, body),
            "sequencer": sequencer or f"{self.uploads:018X}",
        }
        return event

    def handle(self, function: str, event: dict[str, Any]) -> dict[str, Any]:
        """Invoke a handler."""
        self.calls.clear()
        return importlib.import_module(f"{function}.app").handler(event, CONTEXT)

    def drop(self, key: str = "training_data/cars.jsonl", body: bytes = GOOD_DATA) -> Run:
        """Upload a dataset, let it be validated, and return its run."""
        return self.run(self.handle("validate_dataset", self.upload_event(key, body))["run_id"])

    def start(self, run: Run) -> Run:
        """Deliver "Dataset Validated" for a run and return the run."""
        event = self.load_event("start_training.dataset_validated")
        event["detail"]["run_id"] = run.run_id
        self.handle("start_training", event)
        return self.run(run.run_id)

    def job_event(self, name: str, job: str) -> dict[str, Any]:
        """Return `events/<name>.json` for another job."""
        event = self.load_event(name)
        event["detail"]["TrainingJobName"] = job
        if "ModelArtifacts" in event["detail"]:
            event["detail"]["ModelArtifacts"]["S3ModelArtifacts"] = self.artifacts(job)
        return event

    def artifacts(self, job: str) -> str:
        """Return where a job's model lies."""
        kind, run_id = job.split("-", 2)[1], job.split("-", 2)[2].rpartition("-")[0]
        folder = {"train": "training", "test": "inference"}[kind]
        return f"s3://{ARTIFACTS}/runs/{run_id}/{folder}/{job}/output/model/"

    def save_training(self, run: Run) -> None:
        """Write what a training job writes, in the parts that publish_results reads."""
        prefix = self.artifacts(str(run.train_job)).removeprefix(f"s3://{ARTIFACTS}/")
        metrics = [{"step": n, "reward": n / 10, "rewards": {"exact_match": n / 10}} for n in range(1, 6)]
        self.write(prefix + "metrics.jsonl", b"\n".join(msgspec.json.encode(line) for line in metrics))
        self.write(prefix + "training.json", msgspec.json.encode({"steps": 5, "rows": 27, "seconds": 61.5}))

    def save_tests(self, run: Run, tests: list[dict[str, Any]]) -> None:
        """Write what a test job writes."""
        prefix = self.artifacts(str(run.test_job)).removeprefix(f"s3://{ARTIFACTS}/")
        self.write(prefix + "inference.json", msgspec.json.encode({"base_model": run.model, "seconds": 3.0, "tests": tests}))

    def trained(self, run: Run) -> Run:
        """Take a validated run to the end of its training, its test job started."""
        run = self.start(run)
        self.save_training(run)
        self.handle("test_model", self.job_event("test_model.train_completed", str(run.train_job)))
        return self.run(run.run_id)

    def tested(self, run: Run) -> Run:
        """Deliver the end of a run's test job, with thirty tests that the tuned model wins."""
        tests = [
            {
                "id": f"t{n}",
                "prompt": [{"role": "user", "content": f"<b>{n}+1?</b>"}],
                "reference": str(n + 1),
                "tags": [],
                "weight": 1.0,
                "must_pass": False,
                "base": {"text": "no <script>alert(1)</script>", "score": 0.0, "rewards": {"exact_match": 0.0}},
                "tuned": {"text": str(n + 1), "score": 1.0, "rewards": {"exact_match": 1.0}},
            }
            for n in range(30)
        ]
        self.save_tests(run, tests)
        self.handle("publish_results", self.job_event("publish_results.test_completed", str(run.test_job)))
        return self.run(run.run_id)

    def write(self, key: str, body: bytes) -> None:
        """Put an object into the artifact bucket."""
        self.aws.s3.put_object(Bucket=ARTIFACTS, Key=key, Body=body)

    def read_json(self, key: str) -> Any:
        """Read a JSON object of the artifact bucket."""
        return json.loads(self.aws.read(ARTIFACTS, key) or b"null")

    def run(self, run_id: str) -> Run:
        """Return a run as the table has it."""
        run = self.aws.runs.get(run_id)
        assert run is not None
        return run

    def upload_state(self, key: str) -> str:
        """Return the state of an upload item."""
        item = self.aws.runs.upload(key)
        assert item is not None
        return item["state"]

    @property
    def event_types(self) -> list[str]:
        """The detail types of our events, in the order they were put."""
        return [event["DetailType"] for event in self.sent_events]


@contextmanager
def deployed(load_event: Callable[[str], dict[str, Any]]) -> Iterator[World]:
    """A deployed stack, empty but for a base model and a launch plan."""
    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        for name, value in create_resources().items():
            patch.setenv(name, value)
        world = World(connect(TABLE), load_event)
        _record(world, patch)
        yield world


@pytest.fixture
def deploy(load_event: Callable[[str], dict[str, Any]]) -> Callable[[], AbstractContextManager[World]]:
    """Make stacks, one after another."""
    return lambda: deployed(load_event)


@pytest.fixture
def world(load_event: Callable[[str], dict[str, Any]]) -> Iterator[World]:
    """One stack."""
    with deployed(load_event) as world:
        yield world


def _record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note what every client sends, make trouble where it was asked for, and mend what moto does unlike AWS."""
    make_api_call = BaseClient._make_api_call
    packages: dict[str, Any] = {}

    def call(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "CreateTrainingJob" and world.failing_jobs:
            code = world.failing_jobs.pop(0)
            raise ClientError({"Error": {"Code": code, "Message": f"{code} for {arguments['TrainingJobName']}"}}, operation)
        if operation == "CreateTrainingJob" and arguments["TrainingJobName"] in {
            request["TrainingJobName"] for request in world.job_requests
        }:  # moto would create it again
            raise ClientError({"Error": {"Code": "ResourceInUse", "Message": "names must be unique"}}, operation)
        if operation == "CreateModelPackage" and arguments["ClientToken"] in packages:
            return packages[arguments["ClientToken"]]  # moto would register it again
        answer = make_api_call(client, operation, arguments)
        if operation == "PutEvents":
            world.sent_events += arguments["Entries"]
        elif operation == "Publish":
            world.notifications.append(arguments)
        elif operation == "DescribeTrainingJob":  # moto answers as if every output were compressed
            answer["ModelArtifacts"] = {"S3ModelArtifacts": world.artifacts(arguments["TrainingJobName"])}
        elif operation == "CreateTrainingJob":
            world.job_requests.append(arguments)
        elif operation == "CreateModelPackage":
            packages[arguments["ClientToken"]] = answer
        return answer

    def recording(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        world.calls.append(operation)
        trouble = world.trouble if len(world.calls) - 1 == world.trouble_at else None
        return trouble(lambda: call(client, operation, arguments)) if trouble else call(client, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", recording)
