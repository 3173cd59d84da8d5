"""A run's SageMaker jobs: creating one, finding the run of one, stopping them."""

import re
from datetime import timedelta
from itertools import chain
from typing import Any

from botocore.exceptions import ClientError
from msgspec import structs
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.aws import Aws, error_code
from pipeline.jobs.plan import instance_choices, job_request, load_plan
from pipeline.notify import events
from pipeline.notify.announcements import AnnounceSettings, announce_failure, announce_waiting, notify
from pipeline.notify.events import RunEvent
from pipeline.observability import logger
from pipeline.runs.table import Run, RunState, ago, backoff
from tunedrop import object_keys
from tunedrop.config.model import ResolvedConfig
from tunedrop.object_keys import JobName

# How SageMaker says that there is no machine to be had: at once as an error's code, or late as a failed job's reason
# (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html#API_CreateTrainingJob_Errors).
NO_CAPACITY = ("ResourceLimitExceeded", "CapacityError", "InsufficientCapacityError")
JOBS = {"train": "training", "test": "test"}
# What a ResourceLimitExceeded says of the quota, in AWS's words, which the API reference does not list:
# "The account-level service limit 'ml.g5.4xlarge for spot training job usage' is 0 Instances, with current utilization of
# 0 Instances and a request delta of 1 Instances. …"
QUOTA = re.compile(r"service limit '(?P<name>[^']+)' is (?P<limit>\d+) .* request delta of (?P<asked>\d+) ")
# How SageMaker says that it knows no job of this name, or that there is nothing to stop.
NO_SUCH_JOB = frozenset({"ValidationException", "ResourceNotFound"})
# What a function has begun it has done by then, or died (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html).
LONGEST_INVOCATION = timedelta(minutes=15)


class JobSettings(AnnounceSettings):
    """The environment of the functions that create SageMaker jobs."""

    max_concurrent_jobs: int


class TrainingJob(BaseModel):
    """The part we read of DescribeTrainingJob's answer."""

    model_config = ConfigDict(extra="ignore")

    class _Transition(BaseModel):
        Status: str

    class _Artifacts(BaseModel):
        S3ModelArtifacts: str

    class _Resources(BaseModel):
        InstanceType: str | None = None
        SelectedInstanceType: str | None = None

    TrainingJobName: str
    TrainingJobStatus: str
    SecondaryStatus: str = ""
    FailureReason: str = ""
    ModelArtifacts: _Artifacts | None = None
    ResourceConfig: _Resources = _Resources()
    SecondaryStatusTransitions: list[_Transition] = []

    @property
    def artifacts(self) -> str | None:
        """The S3 URI of what the job left in /opt/ml/model."""
        return self.ModelArtifacts.S3ModelArtifacts if self.ModelArtifacts else None

    @property
    def started(self) -> bool:
        """Whether the job ever had an instance that ran its container."""
        return any(transition.Status == "Training" for transition in self.SecondaryStatusTransitions)

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.TrainingJobStatus in {"Completed", "Failed", "Stopped"}

    @property
    def at_limit(self) -> bool:
        """Whether SageMaker stopped the job at its time limit."""
        return self.SecondaryStatus in {"MaxRuntimeExceeded", "MaxWaitTimeExceeded"}

    @property
    def no_capacity(self) -> str | None:
        """Why the job found no machine; None if it found one."""
        if self.TrainingJobStatus == "Failed" and self.FailureReason.startswith(NO_CAPACITY):
            return self.FailureReason[:1024]
        if self.SecondaryStatus == "MaxWaitTimeExceeded" and not self.started:
            return "no instance came within the waiting time"
        return None

    @property
    def instance_type(self) -> str | None:
        """The instance type that the job ran on; of several on demand, the one that SageMaker selected."""
        return self.ResourceConfig.SelectedInstanceType or self.ResourceConfig.InstanceType


class JobRefusedError(Exception):
    """SageMaker does not accept the job as configured, an instance type it does not know for example."""


class NoRoomError(Exception):
    """SageMaker's quotas leave no room for the job. `too_small`: none of them could hold it, however long it waited."""

    def __init__(self, kind: str, messages: list[str]):
        quotas = [QUOTA.search(message) for message in messages]
        self.too_small = all(quota is not None and int(quota["limit"]) < int(quota["asked"]) for quota in quotas)
        found = [
            f"'{quota['name']}' is {quota['limit']}" if quota else message
            for quota, message in zip(quotas, messages, strict=True)
        ]
        reason = f"{', '.join(dict.fromkeys(found))}; no room for the {JOBS[kind]} job"
        if self.too_small:
            asked = max(int(quota["asked"]) for quota in quotas if quota)
            reason = f"{', '.join(dict.fromkeys(found))}, and the {JOBS[kind]} job needs {asked}. "
            reason += "Ask for more in Service Quotas (Amazon SageMaker): the run then starts by itself"
        super().__init__(f"SageMaker quota: {reason}"[:1024])


def create_job(kind: str, run: Run, settings: JobSettings, aws: Aws) -> dict[str, Any]:
    """Create a run's `train` or `test` job.

    Returns what the run should remember: `{kind}_job`, `instance_type`, `choices`. The job's name carries run and
    attempt, so a job that exists already is this very one. Attempts begin with one choice of instances after the other; a
    choice that SageMaker refuses, for its quota or as such, is passed over. Raises JobRefusedError, or NoRoomError where
    a quota refused the job.
    """
    raw = aws.read(settings.artifact_bucket, object_keys.run_key(run.run_id, "input/config.json"))
    assert raw is not None  # written before the run existed
    try:
        config = ResolvedConfig.model_validate_json(raw)
    except ValidationError as error:  # it was valid for the version that validated it
        raise JobRefusedError(f"this version of Tunedrop does not take the run's config: {error}") from None
    plan = load_plan(aws, settings.artifact_bucket, run.plan)
    choices = instance_choices(config.compute)
    first = (run.attempt - 1) % len(choices)
    name = str(JobName(settings.job_prefix, kind, run.run_id, run.attempt))
    refused: list[str] = []
    no_room: list[str] = []
    for instances in chain.from_iterable(choices[first:] + choices[:first]):
        request = job_request(
            plan,
            kind,
            run,
            config,
            prefix=settings.job_prefix,
            data_bucket=settings.data_bucket,
            artifact_bucket=settings.artifact_bucket,
            instances=instances,
        )
        try:
            aws.sagemaker.create_training_job(**request)
        except ClientError as error:
            message = error.response["Error"]["Message"]
            logger.info("SageMaker refused a job", code=error_code(error), detail=message)
            if error_code(error) == "ResourceInUse":
                break
            if error_code(error) == "ValidationException":
                refused.append(message)
            elif error_code(error) in NO_CAPACITY:
                no_room.append(message)
            else:
                raise
        else:
            return {f"{kind}_job": name, "instance_type": instances.get("InstanceType"), "choices": len(choices)}
    # A full quota may be full of this very job, whose creation somebody did not live to write down.
    job = describe(name, aws)
    if job is not None:
        return {f"{kind}_job": name, "instance_type": job.instance_type, "choices": len(choices)}
    if no_room:
        raise NoRoomError(kind, no_room)
    raise JobRefusedError(f"SageMaker refused the job: {'; '.join(dict.fromkeys(refused))}")


def wait_for_room(run: Run, to: RunState, error: NoRoomError, settings: AnnounceSettings, aws: Aws) -> Run:
    """Let a run wait for a quota's room, WAITING or, for the tests, TRAINED.

    A quota that is too small is announced once, before the move: waiting alone would never end.
    """
    reason = str(error)
    if error.too_small:
        seen = aws.runs.get(run.run_id)  # not the index's word, which lags: the event has this run tried again at once
        if seen is None or seen.reason != reason:
            waiting = structs.replace(run, state=to, reason=reason)
            announce_waiting(waiting, settings, aws)
            notify(aws, settings.topic_arn, RunEvent(detail_type=events.WAITING, run=waiting))
    return aws.runs.move(run, to, reason=reason)


def describe(name: str, aws: Aws) -> TrainingJob | None:
    """Return a job as SageMaker describes it, None if there is no such job."""
    try:
        return TrainingJob.model_validate(aws.sagemaker.describe_training_job(TrainingJobName=name))
    except ClientError as error:
        if error_code(error) not in NO_SUCH_JOB:
            raise
        return None


def run_of_job(name: str, settings: AnnounceSettings, aws: Aws) -> tuple[Run, TrainingJob] | None:
    """Return the run whose current attempt a job belongs to, and the job; None for every other job.

    A job that found no machine has begun the run's next attempt; a second delivery of its event says again that the run
    waits, since whoever wrote it may have died before saying so. Raises LookupError for a job that SageMaker does not know.
    """
    try:
        parsed = JobName.parse(name, settings.job_prefix)
    except ValueError as error:
        logger.warning("ignored a job", reason=str(error))
        return None
    run = aws.runs.get(parsed.run_id)
    if run is not None and run.waits and run.attempt == parsed.attempt + 1:
        announce_waiting(run, settings, aws)
    if run is None or run.attempt != parsed.attempt:
        logger.info("ignored a job of no current attempt", job=name)
        return None
    job = describe(name, aws)
    if job is None:
        raise LookupError(f"SageMaker knows no training job '{name}'")
    return run, job


def wait_again(run: Run, to: RunState, reason: str, settings: AnnounceSettings, aws: Aws) -> Run:
    """Let a run whose job found no machine wait for its next attempt, WAITING or, for the tests, TRAINED."""
    run = aws.runs.move(run, to, next_attempt=True, reason=reason, not_before=backoff(run))
    announce_waiting(run, settings, aws)
    return run


def end_stopped(run: Run, settings: AnnounceSettings, aws: Aws) -> None:
    """Stop what job a run that ended may have, and announce its end, unless that is for the end of a job to do."""
    jobs = [_stopped(str(JobName(settings.job_prefix, kind, run.run_id, run.attempt)), aws) for kind in ("train", "test")]
    if any(job is not None and not job.final for job in jobs):
        return
    if run.train_job is None and jobs[0] is None and run.updated > ago(LONGEST_INVOCATION) and aws.runs.has_place(run):
        return  # its job may be being created: whoever does so stops it, or `reconcile` comes by again
    announce_failure(run, settings, aws)


def _stopped(name: str, aws: Aws) -> TrainingJob | None:
    """Ask a job to stop and return it as it is then, None if there is no such job."""
    try:
        aws.sagemaker.stop_training_job(TrainingJobName=name)
    except ClientError as error:
        if error_code(error) not in NO_SUCH_JOB:
            raise
    return describe(name, aws)


def stop_if_over(run: Run, settings: AnnounceSettings, aws: Aws) -> None:
    """Stop the job that was created for a run while the run ended: cancelled, or refused a job before it got this one."""
    there = aws.runs.get(run.run_id)
    if there is not None and there.failed and there.attempt == run.attempt:
        end_stopped(there, settings, aws)
