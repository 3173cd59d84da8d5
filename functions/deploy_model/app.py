"""A line has another champion: let its model answer under the line's name. Or nothing may answer there any more."""

import time

from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.handler import Event
from pipeline.notify.events import DEPLOY_MODEL_EVENT, UndeployRequested
from pipeline.observability import logger, metrics, tracer
from pipeline.settings import DeploySettings
from pipeline.stages.deploy_model import look_until, undeploy

# The schedule begins the next looks after a minute.
SECONDS = 50


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: Event, context: LambdaContext) -> None:
    """Handle the events of `DEPLOY_MODEL_EVENT`. Raises ValidationError for any other event."""
    deadline = time.monotonic() + SECONDS
    parsed = DEPLOY_MODEL_EVENT.validate_python(event)
    settings = DeploySettings.from_environment()
    aws = connect(settings.run_table)
    if isinstance(parsed, UndeployRequested):
        undeploy(parsed.detail.line, parsed.time, aws)
    look_until(deadline, settings, aws)
