"""When a line's champion changes, when an endpoint changes, and once a minute: serve the champions."""

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.notify.events import DEPLOY_MODEL_EVENT
from pipeline.observability import logger, metrics, tracer


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle an event of DEPLOY_MODEL_EVENT."""
    DEPLOY_MODEL_EVENT.validate_python(event)
    return {"looked_at": 0}
