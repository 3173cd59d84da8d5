"""A run was validated, or a place became free: start training jobs, as many as there is room for."""

from typing import Any

from botocore.exceptions import ClientError
from msgspec import structs

from tunedrop import events, launch_plan, layout
from tunedrop.announcements import AnnounceSettings, announce_failure
from tunedrop.aws import Aws, InstanceTypes, error_code
from tunedrop.events import RunEvent
from tunedrop.observability import logger
from tunedrop.run_config import RunConfig
from tunedrop.runs import Run, StaleMoveError, State

OLDEST = 10  # waiting runs that one freed place is offered to


class JobSettings(AnnounceSettings):
    """The environment of the functions that create SageMaker jobs."""

    instance_types: InstanceTypes
    use_spot: bool
    max_concurrent_jobs: int


class JobRefusedError(Exception):
    """SageMaker does not accept the job as configured, an instance type it does not know for example."""


def create_job(kind: str, run: Run, settings: JobSettings, aws: Aws) -> dict[str, Any] | None:
    """Create a run's `train` or `test` job and return its request; None if the account's quota leaves no room.

    The job's name carries run and attempt, so a job that exists already is this very one. Raises JobRefusedError.
    """
    raw = aws.read(settings.artifact_bucket, layout.run_key(run.run_id, "input/config.json"))
    assert raw is not None  # written before the run existed
    config = RunConfig.model_validate_json(raw)
    request = launch_plan.job_request(
        launch_plan.load_plan(aws, settings.artifact_bucket, run.plan),
        kind,
        run,
        config,
        prefix=settings.job_prefix,
        data_bucket=settings.data_bucket,
        artifact_bucket=settings.artifact_bucket,
        instance_types=settings.instance_types,
        spot=settings.use_spot if config.compute.spot is None else config.compute.spot,
    )
    try:
        aws.sagemaker.create_training_job(**request)
    except ClientError as error:
        if error_code(error) == "ResourceLimitExceeded":
            return None
        if error_code(error) == "ValidationException":
            raise JobRefusedError(f"SageMaker refused the job: {error.response['Error']['Message']}") from None
        if error_code(error) != "ResourceInUse":
            raise
    return request


def start_run(run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Start a validated or waiting run's training job, or leave it waiting for room; return the run as it is then."""
    if run.state not in {State.VALIDATED, State.WAITING}:
        return run
    try:
        request = create_job("train", run, settings, aws) if aws.runs.acquire(run, settings.max_concurrent_jobs) else None
    except JobRefusedError as error:
        run = aws.runs.move(run, State.TRAINING_FAILED, reason=str(error)[:1024])
        announce_failure(run, settings, aws)
        return run
    if request is None:
        if run.state == State.VALIDATED:
            announce_waiting(run, settings, aws)
            run = aws.runs.move(run, State.WAITING)  # before the release: a run started elsewhere keeps its place
        aws.runs.release(run)
        return run
    job, instance = request["TrainingJobName"], request["ResourceConfig"]["InstanceType"]
    event = RunEvent(
        detail_type=events.STARTED,
        run=structs.replace(run, state=State.TRAINING),
        extra={"training_job": job, "instance_type": instance},
    )
    events.put_event(aws.events, settings.event_bus, event)
    return aws.runs.move(run, State.TRAINING, train_job=job, instance_type=instance)


def announce_waiting(run: Run, settings: JobSettings, aws: Aws) -> None:
    """Say that a run is about to wait.

    Everything but a run's end is announced before the move that follows: whoever dies in between announces it again.
    """
    event = RunEvent(detail_type=events.WAITING, run=structs.replace(run, state=State.WAITING))
    events.put_event(aws.events, settings.event_bus, event)


def start_waiting(settings: JobSettings, aws: Aws) -> None:
    """Start the oldest waiting runs until there is no more room."""
    for run in aws.runs.open_runs(State.WAITING, limit=OLDEST):
        try:
            if start_run(run, settings, aws).state == State.WAITING:
                return
        except StaleMoveError as error:
            logger.info("another delivery was faster", detail=str(error))
