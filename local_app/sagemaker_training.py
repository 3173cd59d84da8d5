"""Training jobs: what CreateTrainingJob refuses, the state machine behind DescribeTrainingJob, and its events.

A job's record is its DescribeTrainingJob response. Every change of status writes the record and the event that tells
about it in one transaction; one thread per running job drives it from Starting to its end, through interruptions.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from local_app.job_runner import JobRun, Outcome
from local_app.sagemaker_model import Json, ServiceError, not_found, page, service_model
from local_app.sagemaker_services import Services
from local_app.sagemaker_state import Store
from local_app.sandbox import find_sandbox
from tunedrop.instances import has_local_disk

logger = logging.getLogger(__name__)

FINAL = ("Completed", "Failed", "Stopped")
MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Uploading": "Uploading generated training model",
    "Completed": "Training job completed",
    "Stopping": "Stopping the training job",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Resource released as training job exceeded max runtime",
    "MaxWaitTimeExceeded": "Training job stopped as it exceeded the max wait time",
    "Interrupted": "Training job interrupted: Spot capacity was taken back",
}
EVENT_MEMBERS = (
    *("TrainingJobName", "TrainingJobArn", "ModelArtifacts", "TrainingJobStatus", "SecondaryStatus", "FailureReason"),
    *("HyperParameters", "AlgorithmSpecification", "RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig"),
    *("VpcConfig", "StoppingCondition", "CreationTime", "TrainingStartTime", "TrainingEndTime", "LastModifiedTime"),
    *("SecondaryStatusTransitions", "FinalMetricDataList", "EnableNetworkIsolation"),
    *("EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining", "CheckpointConfig"),
    *("TrainingTimeInSeconds", "BillableTimeInSeconds"),
)
TIMES = ("CreationTime", "TrainingStartTime", "TrainingEndTime", "LastModifiedTime", "StartTime", "EndTime", "Timestamp")


class TrainingJobs:
    """The training jobs of one account and region, and the processes that run them."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        services: Services,
        arn_prefix: str,
        *,
        max_jobs: int,
        without_capacity: Collection[str],
        grace: float,
        checkpoint_interval: float,
    ) -> None:
        self._store, self._folder, self._services, self._arn_prefix = store, folder, services, arn_prefix
        self._max_jobs, self._without_capacity, self._grace = max_jobs, without_capacity, grace
        self._checkpoint_interval = checkpoint_interval
        self._sandbox = find_sandbox()
        self._lock = threading.Lock()  # taken before the store's; guards _runs together with a job's status
        self._runs: dict[str, JobRun] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._closing = False
        self.changed = threading.Event()  # set when there is an event to deliver

    # -------------------------------------------------------------------------------------------------- operations

    def create_training_job(self, request: Json) -> Json:
        """Check, store and start a job; answers at once, as AWS does."""
        check_request(request)
        self._check_role(request["RoleArn"])
        name = request["TrainingJobName"]
        with self._lock, self._store.transaction():
            if self._store.get("job", name):
                raise ServiceError(
                    "ResourceInUse",
                    f"Training job names must be unique within an AWS account and region, "
                    f"and {self._arn(name)} exists already.",
                )
            running = sum(job["TrainingJobStatus"] not in FINAL for job in self._store.all("job"))
            if running >= self._max_jobs:
                raise ServiceError(
                    "ResourceLimitExceeded",
                    f"The account-level service limit 'Number of instances across all training jobs' is {self._max_jobs} "
                    f"Instances, with current utilization of {running} Instances and a request delta of 1 Instances. "
                    "Please use AWS Service Quotas to request an increase for this quota.",
                )
            job = new_job(request, self._arn(name))
            self._store.put("tags", job["TrainingJobArn"], {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])})
            self._record(job, "Starting", "InProgress", "Starting the training job")
        self._start(name)
        self.changed.set()
        return {"TrainingJobArn": job["TrainingJobArn"]}

    def _check_role(self, role_arn: str) -> None:
        try:
            _ = self._services.assume(role_arn).credentials
        except ClientError as error:
            raise ServiceError(
                "ValidationException",
                f"Could not assume role {role_arn}. Please ensure that the role exists and allows principal "
                "'sagemaker.amazonaws.com' to assume the role.",
            ) from error

    def describe_training_job(self, request: Json) -> Json:
        """Return the job's record."""
        return self._get(request["TrainingJobName"])

    def list_training_jobs(self, request: Json) -> Json:
        """Return summaries, filtered and paged."""
        jobs = [
            job
            for job in self._store.all("job")
            if request.get("StatusEquals", job["TrainingJobStatus"]) == job["TrainingJobStatus"]
        ]
        result = page(jobs, request, "TrainingJobName")
        result["TrainingJobSummaries"] = [fitting("TrainingJobSummary", job) for job in result.pop("items")]
        return result

    def stop_training_job(self, request: Json) -> Json:
        """Ask a job to stop: its process gets SIGTERM, and SIGKILL after the grace time."""
        name = request["TrainingJobName"]
        with self._lock:
            job = self._get(name)
            if job["TrainingJobStatus"] in FINAL:
                raise ServiceError(
                    "ValidationException",
                    f"The request was rejected because the training job is in status {job['TrainingJobStatus']}.",
                )
            if job["TrainingJobStatus"] != "Stopping":
                self._move(name, "Stopping")
            if name in self._runs:
                self._runs[name].stop("Stopped")
        return {}

    def interrupt(self, name: str) -> None:
        """Take a spot job's instance away, as AWS does; raises ServiceError (409) for a job that has none."""
        with self._lock:
            job = self._get(name)
            if not job.get("EnableManagedSpotTraining") or job["SecondaryStatus"] not in ("Downloading", "Training"):
                kind = "spot" if job.get("EnableManagedSpotTraining") else "on-demand"
                raise ServiceError(
                    "Conflict",
                    f"Only a spot job that is Downloading or Training can be interrupted; {name} is {kind} and in status "
                    f"{job['TrainingJobStatus']}/{job['SecondaryStatus']}.",
                    409,
                )
            self._runs[name].stop("Interrupted")

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in each status."""
        result: dict[str, int] = {}
        for job in self._store.all("job"):
            result[job["TrainingJobStatus"]] = result.get(job["TrainingJobStatus"], 0) + 1
        return result

    # --------------------------------------------------------------------------------------------------- lifecycle

    def resume(self) -> None:
        """Take up the jobs that ran when the emulator ended. Their processes died with it, as in a spot interruption."""
        for job in self._store.all("job"):
            name = job["TrainingJobName"]
            if job["TrainingJobStatus"] in FINAL:
                continue
            logger.warning(
                "%s was %s when the emulator ended: it goes on from its checkpoints", name, job["SecondaryStatus"]
            )
            if job["TrainingJobStatus"] == "InProgress" and job["SecondaryStatus"] != "Starting":
                self._move(name, "Interrupted", message="The machine that ran the training job went away")
                self._move(name, "Starting")
            self._start(name)

    def close(self) -> None:
        """End all processes (SIGTERM, SIGKILL within five seconds). The jobs stay open and go on after resume()."""
        with self._lock:
            self._closing = True
            runs, threads = list(self._runs.values()), list(self._threads.values())
            for run in runs:
                run.stop("Shutdown")
        deadline = time.monotonic() + min(5, self._grace)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for run in runs:
            run.kill()
        for thread in threads:
            thread.join(5)

    def _start(self, name: str) -> None:
        """Start the thread that drives the job."""
        thread = threading.Thread(target=self._drive, args=(name,), name=name, daemon=True)
        with self._lock:
            self._threads[name] = thread
        thread.start()

    def _drive(self, name: str) -> None:
        """Run a job to its end, as often as it takes."""
        try:
            while self._run_once(name):
                pass
        except Exception as error:  # the last line of defence: no job may hang without a status
            logger.exception("%s", name)
            self._end(name, Outcome("Failed", f"InternalServerError: We encountered an internal error. {error!r}"[:1024]))
        finally:
            with self._lock:
                self._runs.pop(name, None)
                self._threads.pop(name, None)

    def _run_once(self, name: str) -> bool:
        """Run the job once; True when it was interrupted and has to run again."""
        with self._lock:
            if self._closing:
                return False
            job = self._get(name)
            run = JobRun(
                job,
                self._folder / name,
                self._services.assume(job["RoleArn"]),
                self._sandbox,
                lambda secondary: self._move(name, secondary),
                grace=self._grace,
                checkpoint_interval=self._checkpoint_interval,
            )
            self._runs[name] = run
            if job["TrainingJobStatus"] == "Stopping":
                run.stop("Stopped")
        preferences = [choice["InstanceType"] for choice in job["ResourceConfig"].get("InstancePreferences", [])]
        choices = preferences or [job["ResourceConfig"]["InstanceType"]]
        available = [choice for choice in choices if choice not in self._without_capacity]
        if available and preferences:
            job["ResourceConfig"]["SelectedInstanceType"] = available[0]
            self._change(name, ResourceConfig=job["ResourceConfig"])
        if not available:
            outcome = Outcome(
                "Failed",
                "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML "
                "instance type or after some time.",
            )
        else:
            (self._folder / name).mkdir(mode=0o700, exist_ok=True)
            outcome = run.run()
        with self._lock:
            if outcome.status == "Shutdown":
                return False
            job = self._get(name)
            if outcome.status == "Interrupted" and job["TrainingJobStatus"] == "InProgress":
                self._move(name, "Interrupted", **training_time(job, outcome))
                self._move(name, "Starting")
                return True
            if job["TrainingJobStatus"] == "Stopping" and outcome.status in ("Completed", "Interrupted"):
                outcome.status = "Stopped"
            self._end(name, outcome)
            run.discard()
            return False

    def _end(self, name: str, outcome: Outcome) -> None:
        """Move the job to its final status."""
        job = self._get(name)
        final: Json = training_time(job, outcome)
        if outcome.failure_reason:
            final["FailureReason"] = outcome.failure_reason
        if outcome.metrics:
            final["FinalMetricDataList"] = outcome.metrics
        if "TrainingStartTime" in job:
            final["TrainingEndTime"] = time.time()
        status = outcome.status if outcome.status in ("Completed", "Failed") else "Stopped"
        self._move(name, outcome.status, status, outcome.failure_reason, **final)

    def _move(self, name: str, secondary: str, status: str = "", message: str = "", **changes: Any) -> None:
        """Enter a secondary status, with its transition and its event."""
        with self._store.transaction():
            job = self._get(name) | changes
            if job["TrainingJobStatus"] == "Stopping" and secondary in ("Downloading", "Training"):
                return  # it was told to stop meanwhile, and the run notices
            if not status:
                status = "Stopping" if secondary == "Stopping" else job["TrainingJobStatus"]
            if secondary == "Downloading":
                job.setdefault("TrainingStartTime", time.time())
            self._record(job, secondary, status, message or MESSAGES[secondary])
        self.changed.set()

    def _change(self, name: str, **changes: Any) -> None:
        with self._store.transaction():
            self._store.put("job", name, self._get(name) | changes)

    def _record(self, job: Json, secondary: str, status: str, message: str) -> None:
        now = time.time()
        transitions = job["SecondaryStatusTransitions"]
        if transitions:
            transitions[-1]["EndTime"] = now
        transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": message})
        if status in FINAL:
            transitions[-1]["EndTime"] = now
        job |= {"TrainingJobStatus": status, "SecondaryStatus": secondary, "LastModifiedTime": now}
        self._store.put("job", job["TrainingJobName"], job)
        self._store.enqueue(state_change_event(job, self._store.get("tags", job["TrainingJobArn"]) or {}))
        logger.info("%s: %s/%s %s", job["TrainingJobName"], status, secondary, job.get("FailureReason", ""))

    def _get(self, name: str) -> Json:
        job = self._store.get("job", name)
        if job is None:
            raise not_found()
        return job

    def _arn(self, name: str) -> str:
        return f"{self._arn_prefix}:training-job/{name}"


# ------------------------------------------------------------------------------------------------- requests and records


def check_request(request: Json) -> None:
    """Raise ServiceError for what botocore's model cannot say: AWS's rules between members, then what only runs there."""
    for refused, message in (*_aws_rules(request), *_local_limits(request)):
        if refused:
            raise ServiceError("ValidationException", message)


def _aws_rules(request: Json) -> list[tuple[bool, str]]:
    resources, condition = request.get("ResourceConfig", {}), request.get("StoppingCondition", {})
    specification = request.get("AlgorithmSpecification", {})
    runtime, wait = condition.get("MaxRuntimeInSeconds", 86_400), condition.get("MaxWaitTimeInSeconds")
    spot = request.get("EnableManagedSpotTraining", False)
    preferences = [preference["InstanceType"] for preference in resources.get("InstancePreferences", [])]
    types = preferences or [resources.get("InstanceType", "")]
    disks = [kind for kind in types if kind and has_local_disk(kind)]
    channels = [channel["ChannelName"] for channel in request.get("InputDataConfig", [])]
    keys = [tag["Key"] for tag in request.get("Tags", [])]
    return [
        (
            spot and (wait is None or wait < runtime),
            "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds",
        ),
        (not spot and wait is not None, "MaxWaitTimeInSeconds is supported for managed spot training only"),
        (
            bool(disks) and "VolumeKmsKeyId" in resources,
            f"VolumeKmsKeyId is not supported for instance type {''.join(disks[:1])}, which encrypts its local storage",
        ),
        (
            ("TrainingImage" in specification) == ("AlgorithmName" in specification),
            "You must specify either TrainingImage or AlgorithmName in AlgorithmSpecification, and not both",
        ),
        (
            bool(preferences) == ("InstanceType" in resources),
            "ResourceConfig must have either InstanceType or InstancePreferences",
        ),
        (bool(preferences) and spot, "InstancePreferences cannot be used with managed spot training"),
        (len(set(channels)) < len(channels), "Duplicate channel names are not allowed in InputDataConfig"),
        (len(set(keys)) < len(keys), "Duplicate tag keys are not allowed"),
        *(
            (not _compiles(definition["Regex"]), f"Invalid regex in metric definition {definition['Name']}")
            for definition in specification.get("MetricDefinitions", [])
        ),
    ]


def _local_limits(request: Json) -> list[tuple[bool, str]]:
    resources, specification = request.get("ResourceConfig", {}), request.get("AlgorithmSpecification", {})
    channels = request.get("InputDataConfig", [])
    sources = [channel["DataSource"].get("S3DataSource", {}) for channel in channels]
    modes = [specification.get("TrainingInputMode"), *(channel.get("InputMode", "File") for channel in channels)]
    checkpoints = request.get("CheckpointConfig", {}).get("LocalPath", "/opt/ml/checkpoints")
    here = "The local SageMaker emulator runs"
    return [
        (
            "InstanceGroups" in resources
            or any(p.get("InstanceCount", 1) > 1 for p in resources.get("InstancePreferences", [])),
            f"{here} instances of one type: set ResourceConfig.InstanceCount",
        ),
        (
            "ContainerEntrypoint" not in specification,
            f"{here} AlgorithmSpecification.ContainerEntrypoint (ModelTrainer's SourceCode sets it), not an image's own",
        ),
        (not set(modes) <= {"File", "FastFile"}, f"{here} TrainingInputMode File and FastFile, not Pipe"),
        (
            any(source.get("S3DataType") != "S3Prefix" for source in sources),
            f"{here} channels with an S3DataSource of S3DataType S3Prefix, not manifests or file systems",
        ),
        (
            not re.fullmatch(r"/opt/ml/(?!(input|output|model|tmp|home)\b)[^/.]+/?", checkpoints),
            f"{here} jobs with a CheckpointConfig.LocalPath of the form /opt/ml/<folder>, not {checkpoints}",
        ),
    ]


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups > 0
    except re.error:
        return False


def new_job(request: Json, arn: str) -> Json:
    """Build the record of a new job: its DescribeTrainingJob response before the first status."""
    name, output = request["TrainingJobName"], request["OutputDataConfig"]
    artifacts = "model/" if output.get("CompressionType") == "NONE" else "model.tar.gz"
    job = fitting("DescribeTrainingJobResponse", request) | {
        "TrainingJobArn": arn,
        "ModelArtifacts": {"S3ModelArtifacts": f"{output['S3OutputPath'].rstrip('/')}/{name}/output/{artifacts}"},
        "StoppingCondition": {"MaxRuntimeInSeconds": 86_400} | request.get("StoppingCondition", {}),  # AWS's default
        "CreationTime": time.time(),
        "SecondaryStatusTransitions": [],
    }
    for switch in ("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining"):
        job.setdefault(switch, False)
    return job


def fitting(shape: str, values: Json) -> Json:
    """Keep the members of `values` that a structure of the service model has."""
    members = service_model().shape_for(shape).members
    return {name: value for name, value in values.items() if name in members}


def training_time(job: Json, outcome: Outcome) -> Json:
    """Return how long the job has trained, over all its runs; nothing (not 0) before it has, as AWS has it."""
    seconds = job.get("TrainingTimeInSeconds", 0) + outcome.seconds
    return {"TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": seconds} if seconds else {}


def state_change_event(job: Json, tags: dict[str, str]) -> Json:
    """Build EventBridge's "SageMaker Training Job State Change" for the job as it is now.

    Source: "Events that SageMaker AI sends to EventBridge" in the developer guide; times inside `detail` are
    milliseconds since 1970, as numbers.
    """
    _, _, _, region, account, _ = job["TrainingJobArn"].split(":", 5)
    detail = {member: _milliseconds(member, job[member]) for member in EVENT_MEMBERS if member in job}
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "SageMaker Training Job State Change",
        "source": "aws.sagemaker",
        "account": account,
        "time": datetime.fromtimestamp(job["LastModifiedTime"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": region,
        "resources": [job["TrainingJobArn"]],
        "detail": detail | {"Tags": tags},
    }


def _milliseconds(member: str, value: Any) -> Any:
    if member in TIMES:
        return int(value * 1000)
    if member in ("SecondaryStatusTransitions", "FinalMetricDataList"):
        return [{name: _milliseconds(name, part) for name, part in item.items()} for item in value]
    return value
