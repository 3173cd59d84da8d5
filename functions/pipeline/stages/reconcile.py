"""The net below the events: look at every open run and upload, and do what a lost event should have made happen."""

from datetime import datetime, timedelta

from pipeline.aws import Aws
from pipeline.jobs.launch import JobSettings, end_stopped
from pipeline.notify.announcements import announce_failure, request_validation
from pipeline.observability import logger, metrics
from pipeline.runs.table import FINAL, Run, RunState, StaleMoveError, ago, now
from pipeline.stages import publish_results, start_training, test_model, validate_dataset
from pipeline.stages.publish_results import PublishSettings

# Events are usually handled within seconds; a run that moved this recently needs no help.
MINIMUM_AGE = timedelta(minutes=2)
# As long as validate_dataset may take, and Lambda's two retries of it.
VALIDATION_AGE = timedelta(minutes=20)
# What is wrong with a dataset becomes a receipt; what ends the function this often is for a person to look at.
MOST_VALIDATIONS = 10


class ReconcileSettings(JobSettings, PublishSettings):
    """The environment of reconcile: whatever the other functions need."""


def reconcile(
    settings: ReconcileSettings,
    aws: Aws,
    minimum_age: timedelta = MINIMUM_AGE,
    validation_age: timedelta = VALIDATION_AGE,
) -> int:
    """Help every open run that has not moved for `minimum_age`, have uploads validated that nobody finished for
    `validation_age`, and start what waits; return how many runs were looked at.

    A run whose turn raises is logged and left for the next time, so that one broken run does not hide the others; the
    first error is raised at the end.
    """
    errors: list[Exception] = []
    looked_at = 0
    started = oldest = now()
    for state in RunState:
        for seen in aws.runs.open_runs(state):
            oldest = min(oldest, seen.arrived)
            run = aws.runs.get(seen.run_id) if seen.updated <= ago(minimum_age) else None
            if run is None or run.open is None:  # the index lags behind the table
                continue
            looked_at += 1
            try:
                _help(run, settings, aws)
            except StaleMoveError as error:
                logger.info("an event was faster", detail=str(error))
            except Exception as error:  # noqa: BLE001 - raised again below, after the others had their turn
                logger.exception("a run could not be helped", run_id=run.run_id)
                errors.append(error)
    age = datetime.fromisoformat(started) - datetime.fromisoformat(oldest)
    metrics.add_metric(name="OldestOpenRunHours", unit="Count", value=age / timedelta(hours=1))
    _request_validations(ago(validation_age), settings, aws)
    start_training.start_waiting(settings, aws, limit=None)
    if errors:
        raise errors[0]
    return looked_at


def _help(run: Run, settings: ReconcileSettings, aws: Aws) -> None:
    """Do what is due for a run; those that wait get their turn together, in order of arrival, afterwards."""
    if run.state in {RunState.VALIDATED, RunState.REJECTED}:
        validate_dataset.announce(run, settings, aws)
    elif run.state == RunState.TRAINING:
        test_model.training_ended(str(run.train_job), settings, aws)
    elif run.state == RunState.TESTING:
        publish_results.testing_ended(str(run.test_job), settings, aws)
    elif run.state == RunState.TESTED:
        publish_results.announce(publish_results.publish(run, settings, aws), settings, aws)
    elif run.state == RunState.PUBLISHED:
        publish_results.announce(run, settings, aws)
    elif run.state == RunState.CANCELLED:
        end_stopped(run, settings, aws)
    elif run.state in FINAL:
        announce_failure(run, settings, aws)


def _request_validations(before: str, settings: ReconcileSettings, aws: Aws) -> None:
    """Have validate_dataset take up the uploads that it has not finished."""
    for item in aws.runs.open_uploads():
        if item["arrived"] > before:
            continue
        if item["tries"] >= MOST_VALIDATIONS:
            logger.error("an upload cannot be validated: see the dead-letter queue", version_id=item["version_id"])
            continue
        request_validation(item, settings, aws)
