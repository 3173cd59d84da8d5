"""Start training jobs: for a validated run, and for waiting runs when a slot may be free. Stop a run on request."""

from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.handler import Event, answers_with_run
from pipeline.notify.events import START_TRAINING_EVENT, SlotMayBeFree, StopRequested
from pipeline.observability import logger, metrics, tracer
from pipeline.runs.states import Run
from pipeline.settings import JobSettings
from pipeline.stages.start_training import start_run, start_waiting
from pipeline.stages.stop_run import stop_run


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
@answers_with_run
def handler(event: Event, context: LambdaContext) -> Run | None:
    """Handle the events of `START_TRAINING_EVENT`. Raises ValidationError for any other event."""
    request = START_TRAINING_EVENT.validate_python(event)
    settings = JobSettings.from_environment()
    aws = connect(settings.run_table)
    if isinstance(request, SlotMayBeFree):
        start_waiting(settings, aws)
        return None
    run = aws.runs.get(request.detail.run_id)
    if run is None:
        raise LookupError("the run table has no run with the event's run_id")
    if isinstance(request, StopRequested):
        return stop_run(run, request.time, settings, aws)
    return start_run(run, settings, aws)
