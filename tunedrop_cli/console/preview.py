"""The receipt of a dataset before it is dropped: the validation of the deployed function, on this machine.

It reads the stack's launch plan, base model, champion and files of rewards, and writes nothing.
"""

import tempfile
from pathlib import Path

from local_app.stack import StackError
from pipeline.jobs.plan import NoLaunchPlanError
from pipeline.settings import ValidateSettings
from pipeline.stages.validate_dataset import companions, prepare
from pipeline.validation.receipt import Receipt
from pipeline.validation.start import nothing_new
from pipeline.validation.validate import validate
from tunedrop import object_keys
from tunedrop_cli.deployment import Deployment, check_name


def preview(deployment: Deployment, data: Path, config: bytes | None, tests: bytes | None) -> Receipt:
    """Return the receipt that a dropped dataset would have.

    Without a config or tests, those of the last drop in the data bucket count, as for the function. Raises StackError for a
    file that is not a dataset, and before the stack has a launch plan.
    """
    check_name(data)
    settings, aws = _settings(deployment), deployment.aws
    key = f"{object_keys.TRAINING_DATA}{data.name}"
    dropped_config, dropped_tests = companions(key, settings, aws)
    with tempfile.TemporaryDirectory() as name, data.open("rb") as file:
        folder = Path(name)
        raw = dropped_config if config is None else config
        try:
            prepared = prepare(key, raw, dropped_tests if tests is None else tests, folder, settings, aws)
        except NoLaunchPlanError as error:
            raise StackError(str(error)) from None
        submission = prepared.submission(data.name, data.stat().st_size, lambda: file, folder)
        receipt = validate(submission, prepared.terms)
        own_tests = folder / "inference_tests.json"
        receipt.warnings += nothing_new(receipt, own_tests, prepared.champion, settings.artifact_bucket, aws)
        return receipt


def _settings(deployment: Deployment) -> ValidateSettings:
    """Return the environment of the function validate_dataset, from the stack's outputs and parameters."""
    outputs, parameters = deployment.outputs, deployment.outputs.parameters
    return ValidateSettings.model_validate(
        {
            "data_bucket": outputs.data_bucket,
            "artifact_bucket": outputs.artifact_bucket,
            "run_table": outputs.run_table,
            "event_bus": outputs.event_bus_name,
            "job_prefix": outputs.job_prefix,
            "topic_arn": outputs.topic_arn,
            "default_model": parameters["BaseModel"],
            "instance_types": parameters["InstanceTypes"],
            "use_spot": parameters["UseSpot"],
            "max_run_cost_usd": parameters["MaxRunCostUsd"],
            "endpoint_instance_type": parameters["EndpointInstanceType"],
        }
    )
