"""Recover from lost events: examine every open run and upload, and do the work that is due."""

from datetime import datetime, timedelta

from pipeline.aws import Aws
from pipeline.jobs.stopping import end_stopped
from pipeline.notify.announcements import announce_failure, request_validation
from pipeline.observability import logger, metrics
from pipeline.runs import clock
from pipeline.runs.states import FINAL, Run, RunState, StaleMoveError
from pipeline.settings import ReconcileSettings
from pipeline.stages import champions, publish_results, start_training, test_model, validate_dataset

# Events usually arrive within seconds. A run that moved more recently needs no recovery.
MINIMUM_AGE = timedelta(minutes=2)
# The timeout of validate_dataset, and Lambda's two retries.
VALIDATION_AGE = timedelta(minutes=20)
# A bad dataset gets a receipt. An upload whose validation ends without a receipt this often needs a person.
MOST_VALIDATIONS = 10


def reconcile(
    settings: ReconcileSettings,
    aws: Aws,
    minimum_age: timedelta = MINIMUM_AGE,
    validation_age: timedelta = VALIDATION_AGE,
) -> int:
    """Do the due work of runs that have not moved for `minimum_age`, request the validation of uploads that are unfinished
    after `validation_age`, and start waiting runs; return the number of runs examined.

    An error of one run does not hide the others: the error is logged, the run waits for the next invocation, and the first
    error is raised at the end.
    """
    errors: list[Exception] = []
    examined = 0
    started = oldest = clock.now()
    for state in RunState:
        for indexed in aws.runs.open_runs(state):
            oldest = min(oldest, indexed.arrived)
            run = aws.runs.get(indexed.run_id) if indexed.updated <= clock.ago(minimum_age) else None
            if run is None or run.open is None:  # the index lags behind the table
                continue
            examined += 1
            try:
                _do_due_work(run, settings, aws)
            except StaleMoveError as error:
                logger.info("an event was faster", detail=str(error))
            except Exception as error:  # noqa: BLE001 - raised after the other runs
                logger.exception("a run could not be recovered", run_id=run.run_id)
                errors.append(error)
    age = datetime.fromisoformat(started) - datetime.fromisoformat(oldest)
    metrics.add_metric(name="OldestOpenRunHours", unit="Count", value=age / timedelta(hours=1))
    _request_validations(clock.ago(validation_age), settings, aws)
    champions.settle_lines(settings, aws)
    start_training.start_waiting(settings, aws, limit=None)
    if errors:
        raise errors[0]
    return examined


def _do_due_work(run: Run, settings: ReconcileSettings, aws: Aws) -> None:
    """Do a run's due work. Waiting runs are not due here: `start_waiting` starts them in order of arrival."""
    if run.state in {RunState.VALIDATED, RunState.REJECTED}:
        validate_dataset.announce(run, settings, aws)
    elif run.state == RunState.TRAINING:
        test_model.training_ended(str(run.train_job), settings, aws)
    elif run.state == RunState.TESTING:
        publish_results.testing_ended(str(run.test_job), settings, aws)
    elif run.state == RunState.TESTED:
        run = publish_results.decide_and_publish(run, settings, aws)
        if run.state == RunState.PUBLISHED:
            publish_results.announce(run, settings, aws)
    elif run.state == RunState.PUBLISHED:
        publish_results.announce(run, settings, aws)
    elif run.state == RunState.CANCELLED:
        end_stopped(run, settings, aws)
    elif run.state in FINAL:
        announce_failure(run, settings, aws)


def _request_validations(before: str, settings: ReconcileSettings, aws: Aws) -> None:
    """Request the validation of uploads that are older than `before` and still unfinished."""
    for item in aws.runs.open_uploads():
        if item["arrived"] > before:
            continue
        if item.get("requests", 0) >= MOST_VALIDATIONS:
            logger.error("an upload cannot be validated: see the dead-letter queue", version_id=item["version_id"])
            continue
        if aws.runs.count_request(item):
            request_validation(item, settings, aws)
