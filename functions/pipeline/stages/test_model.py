"""A training job ended: start the inference tests, or say why there is no model to test."""

from typing import Any

import msgspec
from msgspec import structs

from pipeline.aws import Aws
from pipeline.jobs.launch import (
    JobRefusedError,
    JobSettings,
    NoRoomError,
    TrainingJob,
    create_job,
    run_of_job,
    stop_if_over,
    wait_again,
    wait_for_room,
)
from pipeline.notify import events
from pipeline.notify.announcements import announce_failure, announce_waiting
from pipeline.notify.events import RunEvent
from pipeline.runs.table import Run, RunState, StaleMoveError


def training_ended(name: str, settings: JobSettings, aws: Aws) -> Run | None:
    """Move a run on if its training job has ended; return it, or None if the job runs, or is of no current attempt."""
    found = run_of_job(name, settings, aws)
    if found is None or not found[1].final:
        return None
    run, job = found
    if run.state in {RunState.VALIDATED, RunState.WAITING}:
        # The job ended before the move that followed its creation was written: write that move first.
        run = aws.runs.move(run, RunState.TRAINING, train_job=name, reason=None, not_before=None)
    if run.state == RunState.TRAINING:
        run = _after_training(run, job, settings, aws)
    if run.state == RunState.TRAINED:
        run = start_tests(run, settings, aws)
        if run.waits:
            announce_waiting(run, settings, aws)
    elif run.failed:
        announce_failure(run, settings, aws)
    return run


def _after_training(run: Run, job: TrainingJob, settings: JobSettings, aws: Aws) -> Run:
    """Decide what the end of a training job means for its run, and move it there."""
    trained: dict[str, Any] = {"artifacts": job.artifacts, "instance_type": job.instance_type}
    if job.TrainingJobStatus == "Completed":
        bounded = bool((_summary(job, settings, aws) or {}).get("bounded"))  # it ended itself in time for its limit
        return aws.runs.move(run, RunState.TRAINED, **trained, bounded=bounded)
    if job.no_capacity:
        return wait_again(run, RunState.WAITING, job.no_capacity, settings, aws)
    if job.TrainingJobStatus == "Failed":
        return aws.runs.move(run, RunState.TRAINING_FAILED, reason=job.FailureReason[:1024] or "SageMaker gave no reason")
    if job.at_limit and _summary(job, settings, aws) is not None:
        return aws.runs.move(run, RunState.TRAINED, **trained, bounded=True)
    if job.at_limit:
        reason = "the job reached its time limit before it had saved a model: raise compute.max_runtime"
        return aws.runs.move(run, RunState.TRAINING_FAILED, reason=reason)
    return aws.runs.move(run, RunState.CANCELLED, reason="the training job was stopped")


def _summary(job: TrainingJob, settings: JobSettings, aws: Aws) -> dict[str, Any] | None:
    """Return the job's training.json, which the trainer writes after the model; None if there is none."""
    folder = (job.artifacts or "").removeprefix(f"s3://{settings.artifact_bucket}/").rstrip("/")
    raw = aws.read(settings.artifact_bucket, f"{folder}/training.json")
    return None if raw is None else msgspec.json.decode(raw)


def start_tests(run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Start the test job of a trained run. Without room the run stays TRAINED with that reason, and keeps its place."""
    try:
        job = create_job("test", run, settings, aws)
    except JobRefusedError as error:
        run = aws.runs.move(run, RunState.TESTING_FAILED, reason=str(error)[:1024])
        announce_failure(run, settings, aws)
        return run
    except NoRoomError as error:
        return wait_for_room(run, RunState.TRAINED, error, settings, aws)
    testing = structs.replace(run, state=RunState.TESTING, reason=None)
    event = RunEvent(detail_type=events.TESTS_STARTED, run=testing, extra={"test_job": job["test_job"]})
    events.put_event(aws.events, settings.event_bus, event)
    try:
        return aws.runs.move(
            run, RunState.TESTING, test_job=job["test_job"], choices=job["choices"], reason=None, not_before=None
        )
    except StaleMoveError:
        stop_if_over(run, settings, aws)
        raise
