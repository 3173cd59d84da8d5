"""Start training jobs in order of arrival, within the stack's concurrency limit."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.aws import Aws
from pipeline.jobs.launch import launch
from pipeline.jobs.stopping import end_stopped
from pipeline.notify.announcements import announce_failure, announce_waiting
from pipeline.observability import logger
from pipeline.runs.states import Run, RunState, StaleMoveError
from pipeline.settings import JobSettings

OLDEST = 10  # waiting runs that one event tries to start; `reconcile` tries all


def start_run(run: Run, settings: JobSettings, aws: Aws) -> Run:
    """Start a validated run, or let it wait for a slot or an instance; return the run in its new state.

    A second delivery of the event completes the first one's work.
    """
    if run.state == RunState.CANCELLED:
        end_stopped(run, settings, aws)
    elif run.state == RunState.TRAINING_FAILED:  # SageMaker refused its job
        announce_failure(run, settings, aws)
    elif run.state == RunState.VALIDATED:
        # Waiting runs go first. A run with a slot may have a job already: an earlier delivery took the slot.
        if aws.runs.open_runs(RunState.WAITING, limit=1) and not aws.runs.has_slot(run):
            run = aws.runs.move(run, RunState.WAITING, reason="other runs have waited longer")
        elif aws.runs.acquire(run, settings.max_concurrent_jobs):
            run = launch("train", run, settings, aws)
        else:
            reason = f"concurrency limit reached ({settings.max_concurrent_jobs} runs)"
            run = aws.runs.move(run, RunState.WAITING, reason=reason)
    if run.state == RunState.WAITING:
        announce_waiting(run, settings, aws)
    return run


def start_waiting(settings: JobSettings, aws: Aws, limit: int | None = OLDEST) -> None:
    """Start waiting jobs, oldest first: test jobs of runs with a slot, then training jobs while slots are free.

    Runs of one dataset start in order of arrival. A run may overtake a run of another dataset that finds no instance. The
    first error is raised after every run had its turn.
    """
    errors: list[Exception] = []
    for run in aws.runs.open_runs(RunState.TRAINED, limit):
        if not run.backs_off:
            with _errors_kept(run, errors):
                launch("test", run, settings, aws)
    waiting_datasets: set[str] = set()
    for run in aws.runs.open_runs(RunState.WAITING, limit):
        if run.backs_off or run.dataset in waiting_datasets:
            waiting_datasets.add(run.dataset)
            continue
        with _errors_kept(run, errors):
            if not aws.runs.acquire(run, settings.max_concurrent_jobs):
                break
            if launch("train", run, settings, aws).state == RunState.WAITING:
                waiting_datasets.add(run.dataset)
    if errors:
        raise errors[0]


@contextmanager
def _errors_kept(run: Run, errors: list[Exception]) -> Iterator[None]:
    """Collect a run's error, so that the other runs still get their turn."""
    try:
        yield
    except StaleMoveError as error:
        logger.info("another delivery of the event was faster", detail=str(error))
    except Exception as error:  # noqa: BLE001 - raised after the other runs
        logger.exception("a run could not be started", run_id=run.run_id)
        errors.append(error)
