"""A run's SageMaker jobs: creating one, finding the run of one, stopping them."""

from datetime import timedelta
from typing import Any

from botocore.exceptions import ClientError
from pydantic import ValidationError

from tunedrop import layout
from tunedrop.announcements import AnnounceSettings, announce_failure, announce_waiting
from tunedrop.aws import Aws, InstanceTypes, error_code
from tunedrop.events import NO_CAPACITY, JobDetail
from tunedrop.launch_plan import instance_choices, job_request, load_plan
from tunedrop.layout import JobName
from tunedrop.observability import logger
from tunedrop.run_config import RunConfig
from tunedrop.runs import Run, State, ago, backoff

# How SageMaker says that it knows no job of this name, or that there is nothing to stop.
NO_SUCH_JOB = frozenset({"ValidationException", "ResourceNotFound"})
# What a function has begun it has done by then, or died (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html).
LONGEST_INVOCATION = timedelta(minutes=15)


class JobSettings(AnnounceSettings):
    """The environment of the functions that create SageMaker jobs."""

    instance_types: InstanceTypes
    use_spot: bool
    max_concurrent_jobs: int


class JobRefusedError(Exception):
    """SageMaker does not accept the job as configured, an instance type it does not know for example."""


def create_job(kind: str, run: Run, settings: JobSettings, aws: Aws) -> dict[str, Any] | None:
    """Create a run's `train` or `test` job; None if SageMaker's quotas leave no room for it.

    Returns what the run should remember: `{kind}_job`, `instance_type`, `choices`. The job's name carries run and
    attempt, so a job that exists already is this very one. Attempts begin with one choice of instance after the other; a
    choice whose quota is full is passed over. Raises JobRefusedError.
    """
    raw = aws.read(settings.artifact_bucket, layout.run_key(run.run_id, "input/config.json"))
    assert raw is not None  # written before the run existed
    try:
        config = RunConfig.model_validate_json(raw)
    except ValidationError as error:  # it was valid for the version that validated it
        raise JobRefusedError(f"this version of Tunedrop does not take the run's config: {error}") from None
    plan = load_plan(aws, settings.artifact_bucket, run.plan)
    spot = settings.use_spot if config.compute.spot is None else config.compute.spot
    choices = instance_choices(config.compute, settings.instance_types, spot)
    name = str(JobName(settings.job_prefix, kind, run.run_id, run.attempt))
    for number in range(len(choices)):
        instances = choices[(run.attempt - 1 + number) % len(choices)]
        request = job_request(
            plan,
            kind,
            run,
            config,
            prefix=settings.job_prefix,
            data_bucket=settings.data_bucket,
            artifact_bucket=settings.artifact_bucket,
            instances=instances,
            spot=spot,
        )
        try:
            aws.sagemaker.create_training_job(**request)
        except ClientError as error:
            if error_code(error) == "ValidationException":
                raise JobRefusedError(f"SageMaker refused the job: {error.response['Error']['Message']}") from None
            if error_code(error) not in {*NO_CAPACITY, "ResourceInUse"}:
                raise
        else:
            return {f"{kind}_job": name, "instance_type": instances.get("InstanceType"), "choices": len(choices)}
    # A full quota may be full of this very job, whose creation somebody did not live to write down.
    job = describe(name, aws)
    return None if job is None else {f"{kind}_job": name, "instance_type": job.instance_type, "choices": len(choices)}


def describe(name: str, aws: Aws) -> JobDetail | None:
    """Return a job as SageMaker describes it, None if there is no such job."""
    try:
        return JobDetail.model_validate(aws.sagemaker.describe_training_job(TrainingJobName=name))
    except ClientError as error:
        if error_code(error) not in NO_SUCH_JOB:
            raise
        return None


def run_of_job(job: JobDetail, settings: AnnounceSettings, aws: Aws) -> Run | None:
    """Return the run whose current attempt a job belongs to, None for every other job.

    A job that found no machine has begun the run's next attempt; a second delivery of its event says again that the run
    waits, since whoever wrote it may have died before saying so.
    """
    try:
        name = JobName.parse(job.TrainingJobName, settings.job_prefix)
    except ValueError as error:
        logger.warning("ignored a job", reason=str(error))
        return None
    run = aws.runs.get(name.run_id)
    if run is not None and run.waits and run.attempt == name.attempt + 1:
        announce_waiting(run, settings, aws)
    if run is None or run.attempt != name.attempt:
        logger.info("ignored a job of no current attempt", job=job.TrainingJobName)
        return None
    return run


def wait_again(run: Run, to: State, reason: str, settings: AnnounceSettings, aws: Aws) -> Run:
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


def _stopped(name: str, aws: Aws) -> JobDetail | None:
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
