"""A training job ended: start the inference tests of its model."""

from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.handler import Event, answers_with_run
from pipeline.notify.events import JobStateChange
from pipeline.observability import logger, metrics, tracer
from pipeline.runs.states import Run
from pipeline.settings import JobSettings
from pipeline.stages.test_model import training_ended


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
@answers_with_run
def handler(event: Event, context: LambdaContext) -> Run | None:
    """Handle a "SageMaker Training Job State Change" event of a final status."""
    job = parse(event, model=JobStateChange).detail.TrainingJobName
    settings = JobSettings.from_environment()
    return training_ended(job, settings, connect(settings.run_table))
