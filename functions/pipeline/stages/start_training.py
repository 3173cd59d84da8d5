"""A run was validated, or room may have come: start training jobs, as many as there is room for, in order of arrival."""

from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import structs

from pipeline.aws import Aws
from pipeline.jobs.launch import (
    JobRefusedError,
    JobSettings,
    NoRoomError,
    create_job,
    end_stopped,
    stop_if_over,
    wait_for_room,
)
from pipeline.notify import events
from pipeline.notify.announcements import announce_failure, announce_waiting
from pipeline.notify.events import RunEvent
from pipeline.observability import logger
from pipeline.runs.table import Run, RunState, StaleMoveError
from pipeline.stages.test_model import start_tests

OLDEST = 10  # waiting runs that an event offers room to; `reconcile` offers it to all


def start_run(run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Start a validated run, or let it wait for its turn and for room; return the run as it is then.

    A second delivery of its event finishes what the first one left undone.
    """
    if run.state == RunState.CANCELLED:
        end_stopped(run, settings, aws)
    elif run.failed:  # SageMaker refused its job
        announce_failure(run, settings, aws)
    elif run.state == RunState.VALIDATED:
        # Behind those that wait already; but one that has a place may have a job, too.
        if aws.runs.open_runs(RunState.WAITING, limit=1) and not aws.runs.has_place(run):
            run = aws.runs.move(run, RunState.WAITING, reason="other runs have waited longer")
        elif aws.runs.acquire(run, settings.max_concurrent_jobs):
            run = _start(run, settings, aws)
        else:
            run = aws.runs.move(
                run, RunState.WAITING, reason=f"{settings.max_concurrent_jobs} runs at a time, and as many run"
            )
    if run.state == RunState.WAITING:
        announce_waiting(run, settings, aws)
    return run


def _start(run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Create the training job of a run that has a place. If the quotas leave no room, the run waits without one."""
    try:
        job = create_job("train", run, settings, aws)
    except JobRefusedError as error:
        run = aws.runs.move(run, RunState.TRAINING_FAILED, reason=str(error)[:1024])
        announce_failure(run, settings, aws)
        return run
    except NoRoomError as error:
        return wait_for_room(run, RunState.WAITING, error, settings, aws)
    event = RunEvent(
        detail_type=events.STARTED,
        run=structs.replace(run, state=RunState.TRAINING, reason=None),
        extra={"training_job": job["train_job"], "instance_type": job["instance_type"]},
    )
    # Announced before the move: whoever dies in between announces it again.
    events.put_event(aws.events, settings.event_bus, event)
    try:
        return aws.runs.move(run, RunState.TRAINING, reason=None, not_before=None, **job)
    except StaleMoveError:
        stop_if_over(run, settings, aws)
        raise


def start_waiting(settings: JobSettings, aws: Aws, limit: int | None = OLDEST) -> None:
    """Start the jobs that wait for room, the oldest first: tests of runs that have a place, then runs while places last.

    Within a dataset no run overtakes another; a run of another dataset may, if it finds a machine where others do not.
    The first error is raised at the end.
    """
    errors: list[Exception] = []
    for run in aws.runs.open_runs(RunState.TRAINED, limit):
        if not run.backs_off:
            with _on_its_own(run, errors):
                start_tests(run, settings, aws)
    overtaken: set[str] = set()
    for run in aws.runs.open_runs(RunState.WAITING, limit):
        if run.backs_off or run.dataset in overtaken:
            overtaken.add(run.dataset)
            continue
        with _on_its_own(run, errors):
            if not aws.runs.acquire(run, settings.max_concurrent_jobs):
                break
            if _start(run, settings, aws).state == RunState.WAITING:
                overtaken.add(run.dataset)
    if errors:
        raise errors[0]


@contextmanager
def _on_its_own(run: Run, errors: list[Exception]) -> Iterator[None]:
    """Keep what one run raises from the others' turn."""
    try:
        yield
    except StaleMoveError as error:
        logger.info("another delivery was faster", detail=str(error))
    except Exception as error:  # noqa: BLE001 - raised again after the others had their turn
        logger.exception("a run could not be started", run_id=run.run_id)
        errors.append(error)
