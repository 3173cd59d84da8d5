"""A test job ended: publish the results of its run. A model package changed: settle the champion of its line."""

from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.handler import Event, answers_with_run
from pipeline.notify.events import PUBLISH_RESULTS_EVENT, PackageStateChange
from pipeline.observability import logger, metrics, tracer
from pipeline.runs.states import Run
from pipeline.settings import PublishSettings
from pipeline.stages.champions import package_changed
from pipeline.stages.publish_results import testing_ended


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
@answers_with_run
def handler(event: Event, context: LambdaContext) -> Run | None:
    """Handle the events of `PUBLISH_RESULTS_EVENT`. Raises ValidationError for any other event."""
    parsed = PUBLISH_RESULTS_EVENT.validate_python(event)
    settings = PublishSettings.from_environment()
    aws = connect(settings.run_table)
    if isinstance(parsed, PackageStateChange):
        package_changed(parsed.detail.ModelPackageArn, settings, aws)
        return None
    return testing_ended(parsed.detail.TrainingJobName, settings, aws)
