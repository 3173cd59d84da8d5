"""A deployed stack as the command sees it: upload a dataset, find its run, read the run's results.

The stack is local (`.tunedrop/`) or on AWS; this module does not distinguish the two.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml
from boto3.dynamodb.conditions import Attr

from local_app.stack import STACK_NAME, Outputs, Stack, StackError, read_outputs
from pipeline.aws import Aws, read_object
from pipeline.jobs.price import job_price, on_demand_prices
from pipeline.notify import events
from pipeline.runs.states import FINAL, Run, RunState
from pipeline.runs.table import RUN, run_of_item
from tunedrop import event_bus, object_keys
from tunedrop.dataset.readers import refuse
from tunedrop_cli.location import StackLocation
from tunedrop_cli.model_upload import upload_model
from tunedrop_cli.redrive import redrive

if TYPE_CHECKING:
    from pipeline.publish.index import IndexedRun

SAVED_REPORTS = 20  # reports that `save_index` downloads
LOG_GROUP = "/aws/sagemaker/TrainingJobs"


class _Session:
    """Makes a stack's clients for the functions' own code, which asks for them as of a boto3.Session."""

    def __init__(self, connect: Callable[[str, str], Any]):
        self._connect = connect

    def client(self, service: str, **_config: Any) -> Any:
        return self._connect("client", service)

    def resource(self, service: str, **_config: Any) -> Any:
        return self._connect("resource", service)


class Deployment:
    """A stack's clients and outputs. Reports are saved under `folder` on this machine."""

    def __init__(self, connect: Callable[[str, str], Any], outputs: Outputs, folder: Path):
        self.connect = connect
        self.outputs = outputs
        self.folder = folder
        self.aws = Aws(outputs.run_table, _Session(connect))
        self.s3 = self.aws.s3
        self.logs = connect("client", "logs")
        self.runs, self.lines, self.deployments = self.aws.runs, self.aws.lines, self.aws.deployments

    @classmethod
    def local(cls, stack: Stack) -> "Deployment":
        """Return the deployment on this machine. Raises StackError when it does not run."""
        return cls(stack.connect, stack.outputs, stack.folder)

    @classmethod
    def on_aws(cls, folder: Path, profile: str | None, region: str | None, stack_name: str = STACK_NAME) -> "Deployment":
        """Return a deployment on AWS. Raises StackError when the stack does not exist."""
        location = StackLocation.aws(profile, region, stack_name)
        outputs = read_outputs(location.connect("client", "cloudformation"), stack_name)
        if outputs is None:
            raise StackError(
                f"The stack '{stack_name}' is not deployed in {location.options['region']}. Deploy it with `make deploy`; "
                f"find the cause with `{location.command('doctor')}`."
            )
        return cls(location.connect, outputs, folder)

    # --- uploads ---

    def upload_model(self, folder: Path) -> str:
        """Make `models/<its name>/` equal to a base model's folder; return the name."""
        return upload_model(self.s3, self.outputs.data_bucket, folder)

    def drop(self, data: Path, config: Path | None = None, tests: Path | None = None, model: Path | None = None) -> Run:
        """Upload a dataset after its model, config and tests; return its run when it is validated or rejected.

        Raises StackError when no run begins.
        """
        return self._run_of_upload(*self.upload(data, config, tests, model))

    def upload(
        self, data: Path, config: Path | None = None, tests: Path | None = None, model: Path | None = None
    ) -> tuple[str, str]:
        """Upload a dataset after its model, config and tests; return its key and version.

        Raises StackError for a file that is not a dataset.
        """
        check_name(data)
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
        raise StackError(f"No receipt for {key} after {timeout:.0f} s. Read the log of the function validate_dataset.")

    def stop(self, run: Run, timeout: float = 120) -> Run:
        """Stop a run and return it when it has ended. It may end in another state than CANCELLED in the meantime.

        Raises StackError for a run that has ended already, and for one that has not ended after `timeout` seconds.
        """
        if run.state in FINAL:
            raise StackError(f"{run.run_id} has ended already: {in_words(run.state)}.")
        request = event_bus.entry(self.outputs.event_bus_name, events.STOP_REQUESTED, {"run_id": run.run_id})
        event_bus.put(self.connect("client", "events"), request)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            current = self.find(run.run_id)
            if current.state in FINAL:
                return current
            time.sleep(0.3)
        raise StackError(f"{run.run_id} has not ended after {timeout:.0f} s. Read the log of the function start_training.")

    # --- runs ---

    def all_runs(self) -> list[Run]:
        """Return every run, the newest first."""
        table = self.aws.table
        pages = table.meta.client.get_paginator("scan").paginate(
            TableName=table.name, FilterExpression=Attr("id").begins_with(RUN)
        )
        runs = [run_of_item(item) for page in pages for item in page["Items"]]
        return sorted(runs, key=lambda run: run.arrived, reverse=True)

    def find(self, name: str, others: Iterable[str] = ()) -> Run:
        """Return a run by its id, its dataset (the newest), or the beginning of its id.

        Raises StackError, which suggests similar names of runs, datasets and `others`.
        """
        exact = self.runs.get(name)
        if exact:
            return exact
        runs = self.all_runs()
        match = _of_dataset(name, runs) or next((run for run in runs if run.run_id.startswith(name)), None)
        if match is None:
            known = dict.fromkeys([*others, *(each for run in runs for each in (run.dataset, run.run_id))])
            raise unknown("run", name, known, "List the runs with `tunedrop runs`.")
        return match

    def named(self, name: str) -> Run | None:
        """Return a run by its id, or the newest run of a dataset; None if no run and no dataset has exactly this name."""
        return self.runs.get(name) or _of_dataset(name, self.all_runs())

    def read(self, run: Run, name: str) -> bytes | None:
        """Return the bytes of `runs/<run_id>/<name>`; None without this object."""
        return read_object(self.s3, self.outputs.artifact_bucket, object_keys.run_key(run.run_id, name))

    def read_json(self, run: Run, name: str) -> Any:
        """Return the JSON content of `runs/<run_id>/<name>`; None without this object."""
        raw = self.read(run, name)
        return None if raw is None else msgspec.json.decode(raw)

    def save_report(self, run: Run) -> Path:
        """Download a published run's report and return its path on this machine."""
        path = self.folder / "reports" / run.run_id / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.read(run, "report.html") or b"")
        return path

    def save_index(self) -> Path:
        """Download the page of all runs and the newest reports; return the page's path on this machine.

        Raises StackError before the first run is published.
        """
        page = read_object(self.s3, self.outputs.artifact_bucket, object_keys.INDEX)
        if page is None:
            raise StackError("No run has been published yet. `tunedrop runs` lists the runs and their states.")
        for run in [run for run in self.all_runs() if run.state == RunState.PUBLISHED][:SAVED_REPORTS]:
            self.save_report(run)
        path = self.folder / "reports" / "index.html"
        path.write_bytes(page)
        return path

    def index(self) -> "list[IndexedRun]":
        """Return the published runs of the page of all runs. Raises StackError for a page without their data."""
        from pipeline.publish.index import read_index

        page = read_object(self.s3, self.outputs.artifact_bucket, object_keys.INDEX)
        try:
            return read_index(page.decode()) if page else []
        except ValueError as error:
            raise StackError(str(error)) from None

    def spent(self, run: Run, job: str) -> float | None:
        """Return a job's cost until now in USD; None without a price, and before the job has a machine."""
        described = self.connect("client", "sagemaker").describe_training_job(TrainingJobName=job)
        started = described.get("TrainingStartTime")
        if started is None:
            return None
        ended = described.get("TrainingEndTime") or datetime.now(UTC)
        raw = read_object(self.s3, self.outputs.artifact_bucket, f"{object_keys.LAUNCH_PLANS}{run.plan}.json")
        prices = on_demand_prices(msgspec.json.decode(raw or b"{}"))
        return job_price((ended - started).total_seconds(), described["ResourceConfig"], prices)

    def redrive(self) -> Iterator[str]:
        """Send the events in the dead-letter queue to their functions again; yield each function's name."""
        sqs, functions = self.connect("client", "sqs"), self.connect("client", "lambda")
        yield from redrive(sqs, functions, self.outputs.dead_letter_queue_url)

    def undelivered(self) -> int:
        """Return about how many events are in the dead-letter queue."""
        attributes = self.connect("client", "sqs").get_queue_attributes(
            QueueUrl=self.outputs.dead_letter_queue_url, AttributeNames=["ApproximateNumberOfMessages"]
        )
        return int(attributes["Attributes"]["ApproximateNumberOfMessages"])

    def log_lines(self, job: str, positions: dict[str, str]) -> Iterator[str]:
        """Yield a job's log lines since the last call with the same `positions` (next token by stream)."""
        yield from (line for _, line in self.log_events(job, positions))

    def log_events(self, job: str, positions: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Yield a job's log lines as `log_lines` does, each with its stream (one per instance)."""
        try:
            streams = self.logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")["logStreams"]
        except self.logs.exceptions.ResourceNotFoundException:
            return
        for stream in (stream["logStreamName"] for stream in streams):
            while True:
                more = {"nextToken": positions[stream]} if stream in positions else {}
                page = self.logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **more)
                yield from ((stream, event["message"].rstrip("\n")) for event in page["events"])
                if not page["events"] or positions.get(stream) == page["nextForwardToken"]:
                    break
                positions[stream] = page["nextForwardToken"]


def _of_dataset(name: str, runs: Iterable[Run]) -> Run | None:
    return next((run for run in runs if run.dataset == name), None)


def check_name(data: Path) -> None:
    """Raise StackError for a file whose upload would start no run."""
    if problem := refuse(data.name, size=0):
        raise StackError(f"{data.name}: {problem}")
    if not object_keys.is_dataset(f"{object_keys.TRAINING_DATA}{data.name}"):
        raise StackError(f"{data.name}: a file whose name begins with . or _ starts no run. Rename it.")


def unknown(kind: str, name: str, known: Iterable[str], advice: str) -> StackError:
    """Return the error for a name that no run or line has. It suggests names that look alike."""
    close = [f"'{each}'" for each in get_close_matches(name, list(known))]
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return StackError(f"There is no {kind} '{name}'. {hint}{advice}")


def line_of_run(run: Run) -> str:
    """Return the name of a run's line."""
    return run.line or object_keys.line_of(run.dataset)


def line_beside(run: Run) -> str:
    """Return the name of a run's line, or an empty text if the line has the dataset's name."""
    line = line_of_run(run)
    return "" if line == run.dataset else line


def in_words(state: RunState) -> str:
    """Return a run's state for people, for example `training failed`."""
    return state.lower().replace("_", " ")


def with_model(config: bytes, model: str | None) -> bytes:
    """Return a config that names `model`. Raises StackError when the config names another model."""
    if model is None:
        return config
    try:
        content = yaml.safe_load(config)
    except yaml.YAMLError:
        return config  # the receipt will name the error
    named = content.get("model") if isinstance(content, dict) else None
    if named not in {None, model}:
        raise StackError(f"The config names the model '{named}', --model names the folder '{model}': remove one of them.")
    return config if named else re.sub(rb"\A(\xef\xbb\xbf)?", b"model: " + model.encode() + b"\n", config, count=1)
