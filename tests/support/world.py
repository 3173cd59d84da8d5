"""The handlers over moto: real events in, real (emulated) state behind, everything that was sent recorded."""

import copy
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import boto3
import msgspec
import pytest
import quick_aws
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from fake_serving import FakeServing
from fake_stack import ARTIFACTS, DATA, OWN_RULES, PREFIX, TABLE, create_resources
from made_up import PROOFS
from moto import mock_aws
from moto.dynamodb.models import DynamoDBBackend
from moto.dynamodb.models.dynamo_type import DynamoType
from moto.dynamodb.models.table import Table

from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.quotas import check_quotas
from pipeline.aws import Aws, connect
from pipeline.runs.states import Run
from tunedrop.object_keys import JobName

quick_aws.quick_moto()

# A job as the quota of all types together sees it.
ALL_INSTANCES = {"ResourceConfig": {"InstanceType": "Instances across all types", "InstanceCount": 1}}
GOOD_DATA = b"".join(b'{"question": "%d+1?", "answer": "%d"}\n' % (n, n + 1) for n in range(30))
# What an event and DescribeTrainingJob say of a job's status.
STATUS = ("TrainingJobStatus", "SecondaryStatus", "FailureReason", "SecondaryStatusTransitions")
# What a test job writes of thirty tests that the tuned model wins.
WON: list[dict[str, Any]] = [
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
# What a training job writes to training.json, in the parts that are read.
TRAINING = {"steps": 5, "max_steps": 5, "ended": "complete", "rows": 27, "seconds": 61.5, "proofs": PROOFS}
# What a test job writes to inference.json beside outcomes, in the parts that are read.
TESTED: dict[str, Any] = {
    "generation": {"dtype": "bfloat16", "limit": 64, "seed": 42, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "rewards": [{"type": "exact_match"}],
    "chat_template_kwargs": {},
}
CONTEXT = SimpleNamespace(
    function_name="f",
    memory_limit_in_mb=128,
    invoked_function_arn="arn:aws:lambda:us-east-1:123456789012:function:f",
    aws_request_id="request",
    get_remaining_time_in_millis=lambda: 30_000,
)


def sample_event(job: str, status: str) -> dict[str, Any]:
    """Return a "SageMaker Training Job State Change" event as AWS's sample has it: times as text, no transitions.

    https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html
    """
    arn = f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{job}"
    return {
        "version": "0",
        "id": "844e2571-85d4-695f-b930-0153b71dcb42",
        "detail-type": "SageMaker Training Job State Change",
        "source": "aws.sagemaker",
        "account": "123456789012",
        "time": "2018-10-06T12:26:13Z",
        "region": "us-east-1",
        "resources": [arn],
        "detail": {
            "TrainingJobName": job,
            "TrainingJobArn": arn,
            "TrainingJobStatus": status,
            "SecondaryStatus": status,
            "HyperParameters": {"Hyper": "Parameters"},
            "AlgorithmSpecification": {"TrainingImage": "TrainingImage", "TrainingInputMode": "TrainingInputMode"},
            "RoleArn": "arn:aws:iam::123456789012:role/SMRole",
            "OutputDataConfig": {"KmsKeyId": "KmsKeyId", "S3OutputPath": "S3OutputPath"},
            "ResourceConfig": {"InstanceType": "InstanceType", "InstanceCount": 3, "VolumeSizeInGB": 20},
            "VpcConfig": {},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60},
            "CreationTime": "1583831889050",
            "TrainingStartTime": "1583831889050",
            "TrainingEndTime": "1583831889050",
            "LastModifiedTime": "1583831889050",
            "SecondaryStatusTransitions": [],
            "Tags": {},
        },
    }


class KilledError(Exception):
    """The process is gone. (An ordinary exception, since transfers run in threads.)"""


@dataclass
class World:
    """A deployed stack in memory."""

    aws: Aws
    load_event: Callable[[str], dict[str, Any]]
    sent_events: list[dict[str, Any]] = field(default_factory=list)
    notifications: list[dict[str, Any]] = field(default_factory=list)
    job_requests: list[dict[str, Any]] = field(default_factory=list)
    failing_jobs: list[str] = field(default_factory=list)  # error codes that the next CreateTrainingJob calls answer
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # what DescribeTrainingJob says of a job's status
    quota: int | None = None  # how many instances the account may run at a time
    quotas: dict[str, int] = field(default_factory=dict)  # the same by the name of a type's quota
    troubles: dict[str, Callable[[Callable[[], Any]], Any]] = field(default_factory=dict)  # by operation, once
    groups: set[str] = field(default_factory=set)  # model package groups
    packages: dict[str, Any] = field(default_factory=dict)  # what CreateModelPackage answered, by client token
    deleted_packages: set[str] = field(default_factory=set)
    serving: FakeServing = field(default_factory=FakeServing)
    group_is_there: str = "ValidationException"  # how the registry says so of one that is to be made again
    uploads: int = 0
    calls: list[str] = field(default_factory=list)  # the operations of the last invocation, in order
    dead: bool = False  # this invocation makes no more calls
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
        try:
            answer: dict[str, Any] = importlib.import_module(f"{function}.app").handler(event, CONTEXT)
            if self.dead:
                raise KilledError
            return answer
        finally:
            self.dead = False

    def trouble_happens(
        self,
        trouble: Callable[[Callable[[], Any], Callable[[], Any]], Any],
        at: int,
        again: Callable[[], Any] = lambda: None,
    ) -> None:
        """Let trouble happen to one call of the next invocation; it may make the call, and have `again` happen before."""

        def once(call: Callable[[], Any]) -> Any:
            self.trouble_at = -1
            return trouble(call, again)

        self.trouble, self.trouble_at = once, at

    def next_call(self, operation: str, trouble: Callable[[Callable[[], Any]], Any]) -> None:
        """Let trouble happen to the next call of an operation."""
        self.troubles[operation] = trouble

    def drop(self, key: str = "training_data/cars.jsonl", body: bytes = GOOD_DATA) -> Run:
        """Upload a dataset, let it be validated, and return its run."""
        return self.run(self.handle("validate_dataset", self.upload_event(key, body))["run_id"])

    def start(self, run: Run) -> Run:
        """Deliver "Dataset Validated" for a run and return the run."""
        event = self.load_event("start_training.dataset_validated")
        event["detail"]["run_id"] = run.run_id
        self.handle("start_training", event)
        return self.run(run.run_id)

    def job_event(self, name: str, job: str, **described: Any) -> dict[str, Any]:
        """Let a job be as `events/<name>.json` has it, with `described` on top, and return the event that tells of it.

        The event's body is that of AWS's own sample, which says little of the job: DescribeTrainingJob says the rest.
        """
        detail = self.load_event(name)["detail"] | described
        self.jobs[job] = {key: detail[key] for key in (*STATUS, *described) if key in detail}
        return sample_event(job, detail["TrainingJobStatus"])

    def own_events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the events of our bus that rules take, as EventBridge delivers them: who gets each, and the event."""
        return [
            (function, self.delivered(entry))
            for entry in self.sent_events
            for function, types in OWN_RULES.items()
            if entry["DetailType"] in types
        ]

    def delivered(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry of PutEvents as EventBridge delivers it."""
        event = self.load_event("start_training.dataset_validated")
        moment = entry["Time"].strftime("%Y-%m-%dT%H:%M:%SZ")
        return event | {"detail-type": entry["DetailType"], "time": moment, "detail": json.loads(entry["Detail"])}

    def packages_of(self, group: str) -> list[dict[str, Any]]:
        """Return the summaries of a group's model packages."""
        if group not in self.groups:
            return []
        summaries: list[dict[str, Any]] = self.aws.sagemaker.list_model_packages(ModelPackageGroupName=group)[
            "ModelPackageSummaryList"
        ]
        return summaries

    @property
    def active_jobs(self) -> list[str]:
        """The names of the jobs that have not ended."""
        return [name for name, job in self.jobs.items() if job["TrainingJobStatus"] in {"InProgress", "Stopping"}]

    def check_quotas(self, request: dict[str, Any]) -> None:
        """Refuse a CreateTrainingJob request that is above a quota, in AWS's words."""
        running = [each for each in self.job_requests if each["TrainingJobName"] in self.active_jobs]
        try:
            check_quotas(request, running, lambda name: self.quotas.get(name, 100))
            if self.quota is not None:
                check_quotas(ALL_INSTANCES, [ALL_INSTANCES] * len(running), lambda _: self.quota or 0)
        except ServiceError as error:
            answer = {"Error": {"Code": error.code, "Message": error.message}}
            raise ClientError(answer, "CreateTrainingJob") from None

    def artifacts(self, job: str) -> str:
        """Return where a job's model lies."""
        name = JobName.parse(job, PREFIX)
        folder = {"train": "training", "test": "inference"}[name.kind]
        return f"s3://{ARTIFACTS}/runs/{name.run_id}/{folder}/{job}/output/model/"

    def save_training(self, run: Run) -> None:
        """Write what a training job writes, in the parts that publish_results reads."""
        prefix = self.artifacts(str(run.train_job)).removeprefix(f"s3://{ARTIFACTS}/")
        metrics = [{"step": n, "reward": n / 10, "rewards": {"exact_match": n / 10}} for n in range(1, 6)]
        self.write(prefix + "metrics.jsonl", b"\n".join(msgspec.json.encode(line) for line in metrics))
        self.write(prefix + "training.json", msgspec.json.encode(TRAINING))
        self.write(prefix + "merged/config.json", b"{}")
        header = msgspec.json.encode({"lora.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        self.write(prefix + "adapter/adapter_config.json", b"{}")
        self.write(prefix + "adapter/adapter_model.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))

    def save_tests(self, run: Run, tests: list[dict[str, Any]], suite: Sequence[dict[str, Any]] = ()) -> None:
        """Write what a test job writes."""
        prefix = self.artifacts(str(run.test_job)).removeprefix(f"s3://{ARTIFACTS}/")
        (request,) = [each for each in self.job_requests if each["TrainingJobName"] == run.test_job]
        models = ["base", "tuned", *(["champion"] if "champion" in request["HyperParameters"] else [])]
        inference = {"base_model": run.model, "seconds": 3.0, "tests": tests, "suite": suite, **TESTED}
        inference["asked"] = {name: {"answers": len(tests), "asked": len(tests)} for name in models}
        self.write(prefix + "inference.json", msgspec.json.encode(inference))
        for name in models:
            self.write(f"{prefix}answers_{name}.jsonl", b"{}\n")

    def trained(self, run: Run) -> Run:
        """Take a validated run to the end of its training, its test job started."""
        run = self.start(run)
        self.save_training(run)
        self.handle("test_model", self.job_event("test_model.train_completed", str(run.train_job)))
        return self.run(run.run_id)

    def tested(self, run: Run, tests: list[dict[str, Any]] = WON) -> Run:
        """Deliver the end of a run's test job; without other tests, with thirty tests that the tuned model wins."""
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


@cache
def client(service: str) -> Any:
    """Return a client that all stacks share: making one reads the service's whole model."""
    return boto3.Session().client(service)


@contextmanager
def deployed(load_event: Callable[[str], dict[str, Any]]) -> Iterator[World]:
    """A deployed stack, empty but for a base model and a launch plan."""
    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        for name, value in create_resources(client).items():
            patch.setenv(name, value)
        patch.setattr("deploy_model.app.SECONDS", 0)  # one look for an event
        _roll_back_items(patch)
        world = World(connect(TABLE), load_event)
        _record(world, patch)
        yield world


def _roll_back_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let moto keep the items of a transaction to roll back to, not a copy of the whole table."""
    transact = DynamoDBBackend.transact_write_items

    def transact_write_items(backend: Any, transact_items: list[dict[str, Any]]) -> None:
        before = []
        for [operation] in (item.values() for item in transact_items):
            items = backend.get_table(operation["TableName"]).items
            key = DynamoType(operation.get("Key", operation.get("Item"))["id"])
            before.append((items, key, copy.deepcopy(items.get(key))))
        try:
            transact(backend, transact_items)
        except Exception:
            for items, key, item in before:
                items.pop(key, None)
                if item is not None:
                    items[key] = item
            raise

    monkeypatch.setattr(DynamoDBBackend, "transact_write_items", transact_write_items)
    monkeypatch.setattr(Table, "__deepcopy__", lambda table, _: table, raising=False)


def _refuse(world: World, operation: str, arguments: dict[str, Any]) -> None:
    """Raise what AWS answers to a call that it refuses and moto takes."""
    job, group = arguments.get("TrainingJobName", ""), arguments.get("ModelPackageGroupName")

    def refusal(code: str, message: str) -> ClientError:
        return ClientError({"Error": {"Code": code, "Message": message}}, operation)

    match operation:
        case "CreateTrainingJob":
            if world.failing_jobs:
                code = world.failing_jobs.pop(0)
                raise refusal(code, f"{code} for {job}")
            world.check_quotas(arguments)
            if job in {request["TrainingJobName"] for request in world.job_requests}:
                raise refusal("ResourceInUse", "names must be unique")
        case "StopTrainingJob" if world.jobs.get(job, {}).get("TrainingJobStatus") not in {"InProgress", "Stopping"}:
            raise refusal("ValidationException", "nothing to stop")
        case "DescribeModelPackage" if arguments["ModelPackageName"] in world.deleted_packages:
            raise refusal("ValidationException", "no such package")
        case "CreateModelPackage" | "ListModelPackages" if group not in world.groups:
            raise refusal("ResourceNotFound", "no such group")
        case "CreateModelPackageGroup" if group in world.groups:
            raise refusal(world.group_is_there, "already exists")


def _answer(world: World, operation: str, arguments: dict[str, Any], ask_moto: Callable[[], Any]) -> Any:
    """Answer a call that AWS takes: by moto, but where moto has no such operation or answers unlike AWS."""
    match operation:
        case "StopTrainingJob":  # moto has none
            world.jobs[arguments["TrainingJobName"]] = {"TrainingJobStatus": "Stopping", "SecondaryStatus": "Stopping"}
            return {}
        case "CreateModelPackage":
            token = arguments["ClientToken"]
            if token not in world.packages:  # moto would register it again
                world.packages[token] = ask_moto()
            return world.packages[token]
        case "DeleteModelPackage":  # moto has none
            world.deleted_packages.add(arguments["ModelPackageName"])
            return {}
        case "ListModelPackages":
            answer = ask_moto()
            there = [
                each for each in answer["ModelPackageSummaryList"] if each["ModelPackageArn"] not in world.deleted_packages
            ]
            return answer | {"ModelPackageSummaryList": there}
        case "DescribeTrainingJob":  # moto completes every job at once, and answers as if every output were compressed
            job = arguments["TrainingJobName"]
            answer = {key: value for key, value in ask_moto().items() if key not in STATUS}
            return answer | {"ModelArtifacts": {"S3ModelArtifacts": world.artifacts(job)}} | world.jobs[job]
    return ask_moto()


def _note(world: World, operation: str, arguments: dict[str, Any]) -> None:
    """Note what a call that succeeded has sent or made."""
    match operation:
        case "PutEvents":
            world.sent_events += arguments["Entries"]
        case "Publish":
            world.notifications.append(arguments)
        case "CreateTrainingJob":
            world.job_requests.append(arguments)
            world.jobs[arguments["TrainingJobName"]] = {"TrainingJobStatus": "InProgress", "SecondaryStatus": "Starting"}
        case "CreateModelPackageGroup":
            world.groups.add(arguments["ModelPackageGroupName"])


def _record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note what every client sends, make trouble where it was asked for, and mend what moto does unlike AWS."""
    make_api_call = BaseClient._make_api_call

    def call(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if FakeServing.has(operation):
            # The checks that an HTTP request would have had.
            client._serializer.serialize_to_request(arguments, client.meta.service_model.operation_model(operation))
            try:
                return world.serving.answer(operation, arguments)
            except ClientError as error:  # the service's own class, where its model has one
                raise client.exceptions.from_code(error.response["Error"]["Code"])(error.response, operation) from None
        _refuse(world, operation, arguments)
        answer = _answer(world, operation, arguments, lambda: make_api_call(client, operation, arguments))
        _note(world, operation, arguments)
        return answer

    def recording(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if world.dead:
            raise KilledError
        world.calls.append(operation)
        trouble = world.trouble if len(world.calls) - 1 == world.trouble_at else world.troubles.pop(operation, None)
        try:
            return trouble(lambda: call(client, operation, arguments)) if trouble else call(client, operation, arguments)
        except KilledError:
            world.dead = True
            raise

    monkeypatch.setattr(BaseClient, "_make_api_call", recording)
