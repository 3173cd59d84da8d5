"""Creating a run's SageMaker jobs, and waiting where SageMaker has no instance for them."""

import re
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from botocore.exceptions import ClientError
from msgspec import structs
from pydantic import ValidationError

from pipeline.aws import Aws, error_code
from pipeline.jobs.answers import OpponentGoneError, opponents
from pipeline.jobs.plan import instance_choices, job_request, load_plan
from pipeline.jobs.stopping import stop_if_over
from pipeline.jobs.training_job import NO_CAPACITY, describe
from pipeline.notify import events
from pipeline.notify.announcements import announce_failure, announce_waiting, notify
from pipeline.notify.events import RunEvent
from pipeline.observability import logger
from pipeline.runs.states import Run, RunState, StaleMoveError, backoff
from pipeline.settings import JobSettings, Settings
from tunedrop import object_keys
from tunedrop.object_keys import JobName

if TYPE_CHECKING:
    from tunedrop.config.model import ResolvedConfig

# A quota in the message of ResourceLimitExceeded. The API reference does not list the message; AWS's words are:
# "The account-level service limit 'ml.g5.4xlarge for spot training job usage' is 0 Instances, with current utilization of
# 0 Instances and a request delta of 1 Instances. …"
QUOTA = re.compile(r"service limit '(?P<name>[^']+)' is (?P<limit>\d+) .* request delta of (?P<requested>\d+) ")


class JobKind(NamedTuple):
    """How a kind of job appears in run states, events and messages."""

    title: str
    waiting: RunState
    running: RunState
    failed: RunState
    started: str


JOB_KINDS = {
    "train": JobKind("training job", RunState.WAITING, RunState.TRAINING, RunState.TRAINING_FAILED, events.STARTED),
    "test": JobKind("test job", RunState.TRAINED, RunState.TESTING, RunState.TESTING_FAILED, events.TESTS_STARTED),
}


class CreatedJob(NamedTuple):
    """A job that SageMaker accepted. `instance_type` is None until SageMaker selects one of several types."""

    name: str
    instance_type: str | None
    choices: int


class JobRefusedError(Exception):
    """SageMaker refuses the job as configured, for example for an unknown instance type."""


class NoInstanceError(Exception):
    """A quota or missing capacity refused the job. `quota_too_small`: every quota is too small, even without other jobs."""

    def __init__(self, kind: str, messages: list[str]):
        quotas = [QUOTA.search(message) for message in messages]
        self.quota_too_small = all(quota is not None and int(quota["limit"]) < int(quota["requested"]) for quota in quotas)
        limits = [
            f"'{quota['name']}' is {quota['limit']}" if quota else message
            for quota, message in zip(quotas, messages, strict=True)
        ]
        reason = f"{', '.join(dict.fromkeys(limits))}; no instance for the {JOB_KINDS[kind].title}"
        if self.quota_too_small:
            requested = max(int(quota["requested"]) for quota in quotas if quota)
            reason = f"{', '.join(dict.fromkeys(limits))}, and the {JOB_KINDS[kind].title} needs {requested}. "
            reason += "Raise the quota in Service Quotas (Amazon SageMaker): the run then starts automatically"
        super().__init__(f"SageMaker quota: {reason}"[:1024])


def launch(kind: str, run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Create a run's `train` or `test` job, announce it, and return the run in its new state.

    Without an instance the run waits. A refused job ends the run. The announcement comes before the move: a delivery that
    ends between the two announces again.
    """
    job_kind = JOB_KINDS[kind]
    try:
        job = create_job(kind, run, settings, aws)
    except JobRefusedError as error:
        run = aws.runs.move(run, job_kind.failed, reason=str(error)[:1024])
        announce_failure(run, settings, aws)
        return run
    except NoInstanceError as error:
        return wait_for_instance(run, job_kind.waiting, error, settings, aws)
    attributes: dict[str, Any]
    running = structs.replace(run, state=job_kind.running, reason=None)
    if kind == "train":
        details = {"training_job": job.name, "instance_type": job.instance_type}
        attributes = {"train_job": job.name, "instance_type": job.instance_type}
    else:
        details = attributes = {"test_job": job.name}  # the run's instance_type is the training job's
    events.put_event(aws.events, settings.event_bus, RunEvent(detail_type=job_kind.started, run=running, extra=details))
    try:
        return aws.runs.move(run, job_kind.running, reason=None, not_before=None, choices=job.choices, **attributes)
    except StaleMoveError:
        stop_if_over(run, settings, aws)
        raise


def create_job(kind: str, run: Run, settings: JobSettings, aws: Aws) -> CreatedJob:
    """Create a run's `train` or `test` job.

    The job's name carries run and attempt: an existing job of this name is this very job. Each attempt begins with the next
    instance choice; a choice that SageMaker refuses is skipped. Raises JobRefusedError, or NoInstanceError after a refusal
    for a quota or capacity.
    """
    config = _read_config(run, settings, aws)
    plan = load_plan(aws, settings.artifact_bucket, run.plan)
    try:
        beside = opponents(run, config, settings.artifact_bucket, aws) if kind == "test" else None
    except OpponentGoneError as error:
        raise JobRefusedError(str(error)) from None
    choices = instance_choices(config.compute)
    first = (run.attempt - 1) % len(choices)
    name = str(JobName(settings.job_prefix, kind, run.run_id, run.attempt))
    refused: list[str] = []
    without_instance: list[str] = []
    for instances in chain.from_iterable(choices[first:] + choices[:first]):
        request = job_request(plan, kind, run, config, settings, instances=instances, opponents=beside)
        try:
            aws.sagemaker.create_training_job(**request)
        except ClientError as error:
            code, message = error_code(error), error.response["Error"]["Message"]
            logger.info("SageMaker refused a job", code=code, detail=message)
            if code == "ResourceInUse":
                break
            if code == "ValidationException":
                refused.append(message)
            elif code in NO_CAPACITY:
                without_instance.append(message)
            else:
                raise
        else:
            return CreatedJob(name, instances.get("InstanceType"), len(choices))
    # An earlier delivery may have created this very job, which then fills the quota.
    job = describe(name, aws)
    if job is not None:
        return CreatedJob(name, job.instance_type, len(choices))
    if without_instance:
        raise NoInstanceError(kind, without_instance)
    raise JobRefusedError(f"SageMaker refused the job: {'; '.join(dict.fromkeys(refused))}")


def _read_config(run: Run, settings: JobSettings, aws: Aws) -> "ResolvedConfig":
    from tunedrop.config.model import ResolvedConfig  # late: most invocations create no job

    raw = aws.read(settings.artifact_bucket, object_keys.run_key(run.run_id, "input/config.json"))
    assert raw is not None  # written before the run
    try:
        return ResolvedConfig.model_validate_json(raw)
    except ValidationError as error:  # another version of Tunedrop validated the config
        raise JobRefusedError(f"this version of Tunedrop does not accept the run's config: {error}") from None


def wait_for_instance(run: Run, to: RunState, error: NoInstanceError, settings: Settings, aws: Aws) -> Run:
    """Let a run wait until SageMaker has an instance: in WAITING, or in TRAINED for its test job.

    A quota that is too small needs a person: it is announced once, before the move.
    """
    reason = str(error)
    if error.quota_too_small:
        current = aws.runs.get(run.run_id)  # the index lags, and the announcement has this run tried again at once
        if current is None or current.reason != reason:
            waiting = structs.replace(run, state=to, reason=reason)
            announce_waiting(waiting, settings, aws)
            notify(aws, settings.topic_arn, RunEvent(detail_type=events.WAITING, run=waiting))
    return aws.runs.move(run, to, reason=reason)


def wait_for_test(run: Run, reason: str, settings: Settings, aws: Aws) -> Run:
    """Let a tested run wait for another test job, which starts at once: the training stays valid."""
    run = aws.runs.move(run, RunState.TRAINED, next_attempt=True, reason=reason, not_before=None)
    announce_waiting(run, settings, aws)
    return run


def wait_for_next_attempt(run: Run, to: RunState, reason: str, settings: Settings, aws: Aws) -> Run:
    """Let a run whose job never got an instance wait for its next attempt: in WAITING, or in TRAINED for its test job."""
    run = aws.runs.move(run, to, next_attempt=True, reason=reason, not_before=backoff(run))
    announce_waiting(run, settings, aws)
    return run
