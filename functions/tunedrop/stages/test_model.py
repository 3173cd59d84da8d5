"""A training job ended: start the inference tests, or say why there is no model to test."""

from msgspec import structs

from tunedrop import events
from tunedrop.announcements import announce_failure
from tunedrop.aws import Aws
from tunedrop.events import JobDetail, RunEvent
from tunedrop.layout import JobName
from tunedrop.observability import logger
from tunedrop.runs import Run, State
from tunedrop.stages.start_training import JobRefusedError, JobSettings, announce_waiting, create_job

# How SageMaker says that there was no machine to be had; it arrives late, as the reason of a failed job
# (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html).
CAPACITY_REASONS = ("CapacityError", "InsufficientCapacityError")


def run_of_job(name: str, prefix: str, aws: Aws) -> tuple[Run, JobName] | None:
    """Return the run a job belongs to; None if the run has gone on to another attempt, or the job is not ours."""
    try:
        job = JobName.parse(name, prefix)
    except ValueError as error:
        logger.warning("ignored a job", reason=str(error))
        return None
    run = aws.runs.get(job.run_id)
    if run is None or run.attempt != job.attempt:
        logger.info("ignored a job of no current attempt", job=name)
        return None
    return run, job


def training_ended(job: JobDetail, settings: JobSettings, aws: Aws) -> Run | None:
    """Move a run on after its training job ended; return it, or None if the job is of no current attempt."""
    found = run_of_job(job.TrainingJobName, settings.job_prefix, aws)
    if found is None or not job.final:
        return None
    run, _ = found
    if run.state in {State.VALIDATED, State.WAITING}:
        # The job ended before the move that followed its creation was written: write that move first.
        run = aws.runs.move(run, State.TRAINING, train_job=job.TrainingJobName)
    if run.state == State.TRAINING:
        run = _after_training(run, job, settings, aws)
    if run.state == State.TRAINED:
        return start_tests(run, settings, aws)
    if run.failed:
        announce_failure(run, settings, aws)
    return run


def _after_training(run: Run, job: JobDetail, settings: JobSettings, aws: Aws) -> Run:
    """Decide what the end of a training job means for its run, and move it there."""
    at_limit = job.SecondaryStatus in {"MaxRuntimeExceeded", "MaxWaitTimeExceeded"}
    if job.TrainingJobStatus == "Completed":
        return aws.runs.move(run, State.TRAINED, artifacts=job.artifacts)
    if job.TrainingJobStatus == "Failed":
        if job.FailureReason.startswith(CAPACITY_REASONS):
            return _wait_again(run, job.FailureReason[:1024], settings, aws)
        return aws.runs.move(run, State.TRAINING_FAILED, reason=job.FailureReason[:1024] or "SageMaker gave no reason")
    if at_limit and not job.started:
        return _wait_again(run, "no instance came within the waiting time", settings, aws)
    if at_limit and job.artifacts and _saved(job.artifacts, settings, aws):
        return aws.runs.move(run, State.TRAINED, artifacts=job.artifacts, bounded=True)
    if at_limit:
        reason = "the job reached its time limit before it had saved a model: raise compute.max_runtime"
        return aws.runs.move(run, State.TRAINING_FAILED, reason=reason)
    return aws.runs.move(run, State.CANCELLED, reason="the training job was stopped")


def _wait_again(run: Run, reason: str, settings: JobSettings, aws: Aws) -> Run:
    """Let a run whose job found no machine wait for its next attempt.

    The move comes last: with it the job is of an earlier attempt, whose event does nothing any more.
    """
    aws.runs.release(run)
    announce_waiting(structs.replace(run, attempt=run.attempt + 1, reason=reason), settings, aws)
    return aws.runs.move(run, State.WAITING, next_attempt=True, reason=reason)


def _saved(artifacts: str, settings: JobSettings, aws: Aws) -> bool:
    """Whether the job wrote its summary, which the trainer writes after the model."""
    prefix = f"s3://{settings.artifact_bucket}/"
    return aws.read(settings.artifact_bucket, artifacts.removeprefix(prefix).rstrip("/") + "/training.json") is not None


def start_tests(run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Start the test job of a trained run. Without room the run stays TRAINED, for `reconcile` to try again."""
    try:
        request = create_job("test", run, settings, aws)
    except JobRefusedError as error:
        run = aws.runs.move(run, State.TESTING_FAILED, reason=str(error)[:1024])
        announce_failure(run, settings, aws)
        return run
    if request is None:
        logger.info("no room for the test job yet", run_id=run.run_id)
        return run
    job = request["TrainingJobName"]
    testing = structs.replace(run, state=State.TESTING)
    event = RunEvent(detail_type=events.TESTS_STARTED, run=testing, extra={"test_job": job})
    events.put_event(aws.events, settings.event_bus, event)
    return aws.runs.move(run, State.TESTING, test_job=job)
