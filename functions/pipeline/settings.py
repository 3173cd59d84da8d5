"""The environment of each function, as template.yaml sets it. Nothing else reads the environment."""

import os
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, Field

InstanceTypes = Annotated[list[str], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)]


class Settings(BaseModel):
    """The environment of every function."""

    data_bucket: str
    artifact_bucket: str
    run_table: str
    event_bus: str
    job_prefix: str
    topic_arn: str

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings from the upper-case environment variables. Raises ValidationError with the missing names."""
        return cls.model_validate({name.lower(): value for name, value in os.environ.items()})


class ValidateSettings(Settings):
    """The environment of validate_dataset."""

    default_model: str
    instance_types: InstanceTypes
    use_spot: bool
    max_run_cost_usd: float
    endpoint_instance_type: str = ""


class JobSettings(Settings):
    """The environment of the functions that create SageMaker jobs: start_training and test_model."""

    max_concurrent_jobs: int


class PublishSettings(Settings):
    """The environment of publish_results. Links to reports work for `report_link_hours`; 0 means no link."""

    model_package_group: str
    report_link_hours: int = Field(ge=0, le=168)


class ReconcileSettings(JobSettings, PublishSettings):
    """The environment of reconcile, which does the work of every other function."""


class DeploySettings(Settings):
    """The environment of deploy_model. The function exists only in a stack that serves models."""

    endpoint_instance_type: str
    endpoint_max_instances: int = Field(ge=1)
    endpoint_idle_minutes: int = Field(ge=1)
    endpoint_bake_minutes: int = Field(ge=0)
    serving_role_arn: str
    import_role_arn: str
    kms_key_arn: str = ""
    alarm_topic_arn: str
