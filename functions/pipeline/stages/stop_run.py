"""Somebody wants a run stopped: cancel it in whatever state it is, then stop its job."""

from datetime import datetime

from pipeline.aws import Aws
from pipeline.jobs.launch import end_stopped
from pipeline.notify.announcements import AnnounceSettings
from pipeline.observability import logger
from pipeline.runs.table import FINAL, Run, RunState, StaleMoveError


def stop_run(run: Run, requested: datetime, settings: AnnounceSettings, aws: Aws) -> Run:
    """Cancel a run that has not ended, stop its job, and return the run as it is then.

    The move comes first: nothing that a job or an event does afterwards makes the run go on. A request from before the
    run arrived (events have seconds only) meant an earlier attempt and is ignored.
    """
    while run.state not in FINAL:
        if requested < datetime.fromisoformat(run.arrived).replace(microsecond=0):
            logger.info("ignored a request to stop an earlier attempt", run_id=run.run_id)
            return run
        try:
            run = aws.runs.move(run, RunState.CANCELLED, reason="stopped on request")
        except StaleMoveError:  # it has begun its next attempt, or ended, this moment
            run = aws.runs.get(run.run_id) or run
    if run.state == RunState.CANCELLED:
        end_stopped(run, settings, aws)
    return run
