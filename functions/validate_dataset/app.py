"""Handles a new object under `training_data/`, and `reconcile`'s request to validate an upload: validates the dataset."""

from typing import Any

from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.parser.models import S3EventNotificationEventBridgeModel
from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.aws import connect
from pipeline.notify.events import VALIDATION_REQUESTED, Upload, ValidationRequested
from pipeline.observability import logger, metrics, tracer
from pipeline.settings import ValidateSettings
from pipeline.stages.validate_dataset import validate_again, validate_upload


@logger.inject_lambda_context(correlation_id_path="id")
@tracer.capture_lambda_handler(capture_response=False)
@metrics.log_metrics(capture_cold_start_metric=True)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle an S3 "Object Created" event from EventBridge, and our "Validation Requested"."""
    settings = ValidateSettings.from_environment()
    aws = connect(settings.run_table)
    if event.get("detail-type") == VALIDATION_REQUESTED:
        run = validate_again(parse(event, model=ValidationRequested).detail.key, settings, aws)
    else:
        upload = Upload.from_event(parse(event, model=S3EventNotificationEventBridgeModel))
        run = validate_upload(upload, settings, aws)
    if run is None:
        return {}
    metrics.add_metric(name=f"Dataset{run.state.title()}", unit="Count", value=1)
    return {"run_id": run.run_id, "status": run.state}
