"""A dataset was validated: start its training job. A job ended: start the oldest waiting runs."""

from typing import Any

from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.typing import LambdaContext

from tunedrop import events
from tunedrop.aws import connect
from tunedrop.events import DatasetValidated
from tunedrop.observability import logger, metrics, tracer
from tunedrop.runs import StaleMoveError
from tunedrop.stages.start_training import JobSettings, start_run, start_waiting


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle "Dataset Validated" and, of final jobs, "SageMaker Training Job State Change"."""
    settings = JobSettings.from_environment()
    aws = connect(settings.run_table)
    if event.get("detail-type") != events.VALIDATED:
        start_waiting(settings, aws)
        return {}
    run = aws.runs.get(parse(event, model=DatasetValidated).detail.run_id)
    if run is None:
        raise LookupError("the event names a run that is not in the run table")
    try:
        run = start_run(run, settings, aws)
    except StaleMoveError as error:
        logger.info("another delivery was faster", detail=str(error))
        return {}
    return {"run_id": run.run_id, "status": run.state}
