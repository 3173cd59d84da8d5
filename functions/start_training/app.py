"""A dataset was validated, or room may have come: start training jobs. A run is to be stopped: stop it."""

from typing import Any

from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.jobs.launch import JobSettings
from pipeline.notify import events
from pipeline.notify.events import DatasetValidated, StopRequested
from pipeline.observability import logger, metrics, tracer
from pipeline.runs.table import StaleMoveError
from pipeline.stages.start_training import start_run, start_waiting
from pipeline.stages.stop_run import stop_run


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle "Dataset Validated", "Stop Requested", and what may have made room: final jobs, runs that ended or wait."""
    settings = JobSettings.from_environment()
    aws = connect(settings.run_table)
    request: DatasetValidated | StopRequested
    if event.get("detail-type") == events.VALIDATED:
        request = parse(event, model=DatasetValidated)
    elif event.get("detail-type") == events.STOP_REQUESTED:
        request = parse(event, model=StopRequested)
    else:
        start_waiting(settings, aws)
        return {}
    run = aws.runs.get(request.detail.run_id)
    if run is None:
        raise LookupError("the event names a run that is not in the run table")
    try:
        if isinstance(request, StopRequested):
            run = stop_run(run, request.time, settings, aws)
        else:
            run = start_run(run, settings, aws)
    except StaleMoveError as error:
        logger.info("another delivery was faster", detail=str(error))
        return {}
    return {"run_id": run.run_id, "status": run.state}
