"""Stop a run on request: cancel the run in any state, then stop its job."""

from datetime import datetime

from pipeline.aws import Aws
from pipeline.jobs.stopping import end_stopped
from pipeline.observability import logger
from pipeline.runs.states import FINAL, Run, RunState, StaleMoveError
from pipeline.settings import Settings


def stop_run(run: Run, requested: datetime, settings: Settings, aws: Aws) -> Run:
    """Cancel a run that has not ended, stop its job, and return the run in its new state.

    The move comes first: after it, no event of the job continues the run. A request from before the run's arrival meant an
    earlier attempt and changes nothing; events carry whole seconds. Nor does a request after the verdict: the run ends by
    itself.
    """
    while run.state not in FINAL and run.verdict is None:
        if requested < datetime.fromisoformat(run.arrived).replace(microsecond=0):
            logger.info("ignored a request to stop an earlier attempt", run_id=run.run_id)
            return run
        try:
            run = aws.runs.move(run, RunState.CANCELLED, reason="stopped on request")
        except StaleMoveError:  # the run ended or began its next attempt meanwhile
            run = aws.runs.get(run.run_id) or run
    if run.state == RunState.CANCELLED:
        end_stopped(run, settings, aws)
    return run
