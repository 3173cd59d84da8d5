"""A test job ended: publish the results of its run."""

from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.handler import Event, answers_with_run
from pipeline.notify.events import JobStateChange
from pipeline.observability import logger, metrics, tracer
from pipeline.runs.states import Run
from pipeline.settings import PublishSettings
from pipeline.stages.publish_results import testing_ended


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
@answers_with_run
def handler(event: Event, context: LambdaContext) -> Run | None:
    """Handle a "SageMaker Training Job State Change" event of a final status."""
    job = parse(event, model=JobStateChange).detail.TrainingJobName
    settings = PublishSettings.from_environment()
    return testing_ended(job, settings, connect(settings.run_table))
