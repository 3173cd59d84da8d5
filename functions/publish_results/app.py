"""A test job ended: publish the run's results."""

from typing import Any

from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.notify.events import JobStateChange
from pipeline.observability import logger, metrics, tracer
from pipeline.runs.table import StaleMoveError
from pipeline.stages.publish_results import PublishSettings, testing_ended


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle a "SageMaker Training Job RunState Change" event of a final status."""
    job = parse(event, model=JobStateChange).detail.TrainingJobName
    settings = PublishSettings.from_environment()
    try:
        run = testing_ended(job, settings, connect(settings.run_table))
    except StaleMoveError as error:
        logger.info("another delivery was faster", detail=str(error))
        return {}
    return {"run_id": run.run_id, "status": run.state} if run else {}
