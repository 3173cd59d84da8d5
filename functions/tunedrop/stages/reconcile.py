"""The net below the events: look at every open run and do what a lost event should have made happen."""

from collections.abc import Callable
from datetime import datetime, timedelta

from tunedrop.announcements import announce_failure
from tunedrop.aws import Aws
from tunedrop.events import JobDetail
from tunedrop.observability import logger
from tunedrop.runs import FINAL, Run, StaleMoveError, State, now
from tunedrop.stages import publish_results, start_training, test_model, validate_dataset
from tunedrop.stages.publish_results import PublishSettings
from tunedrop.stages.start_training import JobSettings
from tunedrop.stages.validate_dataset import ValidateSettings

# Events are usually handled within seconds; a run that moved this recently needs no help.
MINIMUM_AGE = timedelta(minutes=2)


class ReconcileSettings(ValidateSettings, JobSettings, PublishSettings):
    """The environment of reconcile: whatever the other functions need."""


def reconcile(settings: ReconcileSettings, aws: Aws, minimum_age: timedelta = MINIMUM_AGE) -> int:
    """Help every open run that has not moved for `minimum_age`; return how many were looked at.

    A run whose turn raises is logged and left for the next time, so that one broken run does not hide the others; the
    first error is raised at the end.
    """
    before = (datetime.fromisoformat(now()) - minimum_age).isoformat(timespec="microseconds")
    errors: list[Exception] = []
    looked_at = 0
    for state in State:
        for run in aws.runs.open_runs(state):
            if run.updated > before:
                continue
            looked_at += 1
            try:
                _help(run, settings, aws)
            except StaleMoveError as error:
                logger.info("an event was faster", detail=str(error))
            except Exception as error:  # noqa: BLE001 - raised again below, after the others had their turn
                logger.exception("a run could not be helped", run_id=run.run_id)
                errors.append(error)
    start_training.start_waiting(settings, aws)
    if errors:
        raise errors[0]
    return looked_at


def _help(run: Run, settings: ReconcileSettings, aws: Aws) -> None:
    if run.state in {State.VALIDATED, State.REJECTED}:
        validate_dataset.announce(run, settings, aws)
    elif run.state == State.TRAINING:
        _ended(run.train_job, lambda job: test_model.training_ended(job, settings, aws), aws)
    elif run.state == State.TRAINED:
        test_model.start_tests(run, settings, aws)
    elif run.state == State.TESTING:
        _ended(run.test_job, lambda job: publish_results.testing_ended(job, settings, aws), aws)
    elif run.state == State.TESTED:
        publish_results.announce(publish_results.publish(run, settings, aws), settings, aws)
    elif run.state == State.PUBLISHED:
        publish_results.announce(run, settings, aws)
    elif run.state in FINAL:
        announce_failure(run, settings, aws)


def _ended(name: str | None, then: Callable[[JobDetail], object], aws: Aws) -> None:
    """Describe a job and, if it has ended, do what its event should have done."""
    job = JobDetail.model_validate(aws.sagemaker.describe_training_job(TrainingJobName=name))
    if job.final:
        then(job)
