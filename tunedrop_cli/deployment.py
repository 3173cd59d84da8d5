"""A deployed stack, seen from a user's machine: upload a dataset, find its run, read what became of it.

The stack is the local one (`.tunedrop/`) or one on AWS; everything here works on both alike.
"""

import re
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import msgspec
import yaml
from boto3.dynamodb.conditions import Attr
from botocore.exceptions import ProfileNotFound

from local_app.stack import STACK_NAME, Outputs, Stack, StackError, outputs_of
from pipeline.aws import read_object
from pipeline.jobs.plan import instance_type_of
from pipeline.notify import events
from pipeline.runs.states import FINAL, Run, RunState
from pipeline.runs.table import RUN, RunTable, run_of_item
from tunedrop import event_bus, object_keys
from tunedrop.dataset.readers import refuse
from tunedrop_cli.redrive import redrive

SAVED_REPORTS = 20  # that come with the page of all runs
LOG_GROUP = "/aws/sagemaker/TrainingJobs"


class Place(NamedTuple):
    """Where a stack is, and how to reach it there.

    `connect` returns a boto3 `client` or `resource` (its first argument) of a service. `aws_options` are those that AWS's
    CLI needs for this place, `options` those of the `tunedrop` command.
    """

    connect: Callable[[str, str], Any]
    stack_name: str
    on_aws: bool
    aws_options: dict[str, str]
    options: dict[str, str]

    @classmethod
    def local(cls, stack: Stack) -> "Place":
        """Return the place of the stack on this machine. Raises StackError when it does not run."""
        stack.check_running()
        options = {"endpoint-url": stack.endpoint, "ca-bundle": str(stack.tls.authority), "region": stack.region}
        return cls(stack.connect, STACK_NAME, False, options, {})

    @classmethod
    def aws(cls, profile: str | None, region: str | None, stack_name: str) -> "Place":
        """Return the place of a stack on AWS. Raises StackError when there is no such profile."""
        try:
            session = boto3.Session(profile_name=profile, region_name=region)
        except ProfileNotFound as error:
            raise StackError(f"{error}. `aws configure list-profiles` lists them.") from None
        named = {"region": session.region_name, "profile": profile}
        options = {name: value for name, value in named.items() if value}
        return cls(
            lambda kind, service: getattr(session, kind)(service),
            stack_name,
            True,
            options,
            {"stack": stack_name, **options},
        )

    def aws_command(self, text: str) -> str:
        """Return a command of AWS's CLI as it is typed for this place."""
        return _with("aws " + text, self.aws_options)

    def command(self, text: str) -> str:
        """Return a command of ours as it is typed for this place."""
        return _with("tunedrop " + text, self.options)

    @property
    def release(self) -> str:
        """The command that stores a launch plan for the stack."""
        if not self.on_aws:
            return "tunedrop up"
        profile = f"AWS_PROFILE={shlex.quote(self.options['profile'])} " if "profile" in self.options else ""
        options = {name: value for name, value in self.options.items() if name != "profile"}
        return _with(f"{profile}python -m release", options)


def _with(command: str, options: dict[str, str]) -> str:
    return " ".join([command, *(f"--{name} {shlex.quote(value)}" for name, value in options.items())])


class Deployment:
    """A stack's clients and outputs; `folder` is where reports are kept on this machine."""

    def __init__(self, connect: Callable[[str, str], Any], outputs: Outputs, folder: Path):
        self.connect = connect
        self.outputs = outputs
        self.folder = folder
        self.s3 = connect("client", "s3")
        self.logs = connect("client", "logs")
        self._table = connect("resource", "dynamodb").Table(outputs.run_table)
        self.runs = RunTable(self._table)

    @classmethod
    def local(cls, stack: Stack) -> "Deployment":
        """Return the stack that runs on this machine. Raises StackError when none does."""
        return cls(stack.connect, stack.outputs, stack.folder)

    @classmethod
    def on_aws(cls, folder: Path, profile: str | None, region: str | None, stack_name: str = STACK_NAME) -> "Deployment":
        """Return a stack on AWS. Raises StackError when there is no such stack."""
        place = Place.aws(profile, region, stack_name)
        outputs = outputs_of(place.connect("client", "cloudformation"), stack_name)
        if outputs is None:
            raise StackError(
                f"There is no deployed stack '{stack_name}' in {place.options['region']}. Deploy it with `make deploy`; "
                f"`{place.command('doctor')}` says more."
            )
        return cls(place.connect, outputs, folder)

    # --- dropping ---

    def upload_model(self, folder: Path) -> str:
        """Upload a base model's folder to `models/<its name>/`, but for files that are there already; return the name."""
        prefix = object_keys.model_prefix(folder.name)
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.outputs.data_bucket, Prefix=prefix)
        there = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = prefix + file.relative_to(folder).as_posix()
            if there.get(key) != file.stat().st_size:
                self.s3.upload_file(str(file), self.outputs.data_bucket, key)
        return folder.name

    def drop(self, data: Path, config: Path | None = None, tests: Path | None = None, model: Path | None = None) -> Run:
        """Upload a dataset, what belongs to it first, and return its run once it is validated or rejected.

        Raises StackError when nothing comes of the upload.
        """
        return self._run_of_upload(*self.upload(data, config, tests, model))

    def upload(
        self, data: Path, config: Path | None = None, tests: Path | None = None, model: Path | None = None
    ) -> tuple[str, str]:
        """Upload a dataset, what belongs to it first, and return its key and version. Raises StackError for no dataset."""
        if problem := refuse(data.name, size=0):
            raise StackError(f"{data.name}: {problem}")
        bucket, dataset = self.outputs.data_bucket, object_keys.dataset_of(data.name)
        name = self.upload_model(model) if model else None
        if config or name:
            raw = with_model(config.read_bytes() if config else b"", name)
            self.s3.put_object(Bucket=bucket, Key=object_keys.config_key(dataset), Body=raw)
        if tests:
            self.s3.upload_file(str(tests), bucket, object_keys.tests_keys(dataset)[0])
        key = f"{object_keys.TRAINING_DATA}{data.name}"
        with data.open("rb") as body:
            return key, self.s3.put_object(Bucket=bucket, Key=key, Body=body)["VersionId"]

    def _run_of_upload(self, key: str, version: str, timeout: float = 900) -> Run:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            item = self.runs.upload(key)
            if item and item["version_id"] == version and item.get("run_id"):
                run = self.runs.get(item["run_id"])
                assert run is not None  # written before the upload item names it
                return run
            time.sleep(0.3)
        raise StackError(f"No receipt for {key} after {timeout:.0f} s: look at the log of the function validate_dataset.")

    def stop(self, run: Run, timeout: float = 120) -> Run:
        """Ask for a run to be stopped and return it once it has ended, which it may have done meanwhile in another way.

        Raises StackError for a run that has ended already, or when nothing comes of the request.
        """
        if run.state in FINAL:
            raise StackError(f"{run.run_id} has ended already: {run.state.lower().replace('_', ' ')}.")
        request = event_bus.entry(self.outputs.event_bus_name, events.STOP_REQUESTED, {"run_id": run.run_id})
        event_bus.put(self.connect("client", "events"), request)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            now = self.find(run.run_id)
            if now.state in FINAL:
                return now
            time.sleep(0.3)
        raise StackError(f"{run.run_id} goes on after {timeout:.0f} s: look at the log of the function start_training.")

    # --- looking ---

    def all_runs(self) -> list[Run]:
        """Return every run, the newest first."""
        pages = self._table.meta.client.get_paginator("scan").paginate(
            TableName=self._table.name, FilterExpression=Attr("id").begins_with(RUN)
        )
        runs = [run_of_item(item) for page in pages for item in page["Items"]]
        return sorted(runs, key=lambda run: run.arrived, reverse=True)

    def find(self, name: str) -> Run:
        """Return a run by its id, the beginning of its id, or its dataset (the newest). Raises StackError."""
        exact = self.runs.get(name)
        if exact:
            return exact
        found = [run for run in self.all_runs() if run.dataset == name or run.run_id.startswith(name)]
        if not found:
            raise StackError(f"There is no run '{name}'. `tunedrop runs` lists them.")
        return found[0]

    def read(self, run: Run, name: str) -> bytes | None:
        """Return the bytes of `runs/<run_id>/<name>`, None if it is not there."""
        return read_object(self.s3, self.outputs.artifact_bucket, object_keys.run_key(run.run_id, name))

    def read_json(self, run: Run, name: str) -> Any:
        """Return the content of `runs/<run_id>/<name>`, None if it is not there."""
        raw = self.read(run, name)
        return None if raw is None else msgspec.json.decode(raw)

    def save_report(self, run: Run) -> Path:
        """Download a published run's report and return its path on this machine."""
        path = self.folder / "reports" / run.run_id / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.read(run, "report.html") or b"")
        return path

    def save_index(self) -> Path:
        """Download the page of all runs, and the newest reports that it links to; return its path on this machine.

        Raises StackError when no run has been published yet.
        """
        page = read_object(self.s3, self.outputs.artifact_bucket, object_keys.INDEX)
        if page is None:
            raise StackError("No run has been published yet. `tunedrop runs` says how far they are.")
        for run in [run for run in self.all_runs() if run.state == RunState.PUBLISHED][:SAVED_REPORTS]:
            self.save_report(run)
        path = self.folder / "reports" / "index.html"
        path.write_bytes(page)
        return path

    def spent(self, run: Run, job: str) -> float | None:
        """Return what a job has cost so far in USD, None where no price is known or it has no machine yet."""
        described = self.connect("client", "sagemaker").describe_training_job(TrainingJobName=job)
        raw = read_object(self.s3, self.outputs.artifact_bucket, f"{object_keys.LAUNCH_PLANS}{run.plan}.json")
        prices = (msgspec.json.decode(raw or b"{}").get("prices") or {}).get("on_demand", {})
        resources, started = described["ResourceConfig"], described.get("TrainingStartTime")
        price = prices.get(instance_type_of(resources))
        if price is None or started is None:
            return None
        ended = described.get("TrainingEndTime") or datetime.now(UTC)
        return float((ended - started).total_seconds() / 3600 * price * resources.get("InstanceCount", 1))

    def redrive(self) -> Iterator[str]:
        """Give the events in the dead-letter queue to their functions again; yield each function's name."""
        sqs, functions = self.connect("client", "sqs"), self.connect("client", "lambda")
        yield from redrive(sqs, functions, self.outputs.dead_letter_queue_url)

    def log_lines(self, job: str, seen: dict[str, str]) -> Iterator[str]:
        """Yield the log lines of a job that came since the last call with the same `seen` (stream → position)."""
        try:
            streams = self.logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")["logStreams"]
        except self.logs.exceptions.ResourceNotFoundException:
            return
        for stream in (stream["logStreamName"] for stream in streams):
            while True:
                more = {"nextToken": seen[stream]} if stream in seen else {}
                page = self.logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **more)
                yield from (event["message"].rstrip("\n") for event in page["events"])
                if not page["events"] or seen.get(stream) == page["nextForwardToken"]:
                    break
                seen[stream] = page["nextForwardToken"]


def with_model(config: bytes, model: str | None) -> bytes:
    """Return a config that names `model`. Raises StackError when it names another."""
    if model is None:
        return config
    try:
        given = yaml.safe_load(config)
    except yaml.YAMLError:
        return config  # its receipt will say what is wrong with it
    named = given.get("model") if isinstance(given, dict) else None
    if named not in {None, model}:
        raise StackError(f"The config names the model '{named}', --model the folder '{model}': leave one of them out.")
    return config if named else re.sub(rb"\A(\xef\xbb\xbf)?", b"model: " + model.encode() + b"\n", config, count=1)
