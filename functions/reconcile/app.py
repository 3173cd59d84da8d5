"""On a schedule: recover from lost events."""

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.observability import logger, metrics, tracer
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle a scheduled event."""
    settings = ReconcileSettings.from_environment()
    examined = reconcile(settings, connect(settings.run_table))
    metrics.add_metric(name="RunsReconciled", unit="Count", value=examined)
    return {"looked_at": examined}
