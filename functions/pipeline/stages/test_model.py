"""A training job ended: start the inference tests, or record why the run has no model."""

from typing import Any

import msgspec

from pipeline.aws import Aws
from pipeline.jobs.launch import launch, wait_for_next_attempt
from pipeline.jobs.stopping import end_stopped
from pipeline.jobs.training_job import TrainingJob, run_of_job
from pipeline.notify.announcements import announce_failure, announce_waiting
from pipeline.runs.states import Run, RunState
from pipeline.settings import JobSettings
from tunedrop.object_keys import folder_key


def training_ended(name: str, settings: JobSettings, aws: Aws) -> Run | None:
    """Move a run on after the end of its training job and return it; None for a running job or an earlier attempt's job."""
    pair = run_of_job(name, settings, aws)
    if pair is None or not pair[1].final:
        return None
    run, job = pair
    if run.state in {RunState.VALIDATED, RunState.WAITING}:
        # The job ended before start_training recorded its creation: record the creation first.
        run = aws.runs.move(run, RunState.TRAINING, train_job=name, reason=None, not_before=None)
    if run.state == RunState.TRAINING:
        run = _after_training(run, job, settings, aws)
    if run.state == RunState.TRAINED:
        run = launch("test", run, settings, aws)
        if run.waits:
            announce_waiting(run, settings, aws)
    elif run.state == RunState.CANCELLED:  # perhaps long ago: this event may be late, and the test job still ending
        end_stopped(run, settings, aws)
    elif run.failed:
        announce_failure(run, settings, aws)
    return run


def _after_training(run: Run, job: TrainingJob, settings: JobSettings, aws: Aws) -> Run:
    """Move a run to the state that its ended training job leads to."""
    trained: dict[str, Any] = {"artifacts": job.artifacts, "instance_type": job.instance_type}
    if job.TrainingJobStatus == "Completed":
        bounded = bool((_summary(job, settings, aws) or {}).get("bounded"))  # the trainer ended early, within its limit
        return aws.runs.move(run, RunState.TRAINED, **trained, bounded=bounded)
    if job.no_capacity:
        return wait_for_next_attempt(run, RunState.WAITING, job.no_capacity, settings, aws)
    if job.TrainingJobStatus == "Failed":
        return aws.runs.move(run, RunState.TRAINING_FAILED, reason=job.FailureReason[:1024] or "SageMaker gave no reason")
    if job.at_limit and _summary(job, settings, aws) is not None:
        return aws.runs.move(run, RunState.TRAINED, **trained, bounded=True)
    if job.at_limit:
        reason = "the job reached its time limit before it saved a model: raise compute.max_runtime"
        return aws.runs.move(run, RunState.TRAINING_FAILED, reason=reason)
    return aws.runs.move(run, RunState.CANCELLED, reason="the training job was stopped")


def _summary(job: TrainingJob, settings: JobSettings, aws: Aws) -> dict[str, Any] | None:
    """Return the job's training.json, which the trainer writes after the model; None without one."""
    folder = folder_key(job.artifacts or "", settings.artifact_bucket)
    raw = aws.read(settings.artifact_bucket, f"{folder}training.json")
    return None if raw is None else msgspec.json.decode(raw)
