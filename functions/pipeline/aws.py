"""The one place where AWS clients are made and settings are read; everything else is handed them."""

import os
from functools import cache, cached_property, partial
from typing import Annotated, Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from pydantic import BaseModel, BeforeValidator

from pipeline.runs.table import RunTable

_CONFIG = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=5, read_timeout=60)


InstanceTypes = Annotated[list[str], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)]


class Settings(BaseModel):
    """What every function reads from its environment; each adds its own."""

    data_bucket: str
    artifact_bucket: str
    run_table: str
    event_bus: str
    job_prefix: str

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings from the upper-case environment variables. Raises ValidationError naming what is missing."""
        return cls.model_validate({name.lower(): value for name, value in os.environ.items()})


def read_object(s3: Any, bucket: str, key: str, at_most: int | None = None) -> bytes | None:
    """Return an object's bytes, None if there is no such object; of a larger one than `at_most` just one byte more."""
    try:
        body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read(None if at_most is None else at_most + 1)
    except s3.exceptions.NoSuchKey:
        return None
    return body


class Aws:
    """AWS clients, each made when first used: a cold start loads the models of only the services that it calls."""

    def __init__(self, run_table: str):
        self._run_table = run_table
        self._session = boto3.Session()
        # What rewards call.
        self.client = cache(partial(self._session.client, config=_CONFIG))

    @cached_property
    def s3(self) -> Any:
        """The S3 client."""
        # Links to objects under a KMS key need this signature, which S3 clients use everywhere but in the oldest regions.
        return self._session.client("s3", config=_CONFIG.merge(Config(signature_version="s3v4")))

    @cached_property
    def events(self) -> Any:
        """The EventBridge client."""
        return self._session.client("events", config=_CONFIG)

    @cached_property
    def sagemaker(self) -> Any:
        """The SageMaker client."""
        return self._session.client("sagemaker", config=_CONFIG)

    @cached_property
    def sns(self) -> Any:
        """The SNS client."""
        return self._session.client("sns", config=_CONFIG)

    @cached_property
    def runs(self) -> RunTable:
        """The run table."""
        return RunTable(self._session.resource("dynamodb", config=_CONFIG).Table(self._run_table))

    def read(self, bucket: str, key: str, at_most: int | None = None) -> bytes | None:
        """Return an object's bytes, None if there is no such object; of a larger one than `at_most` just one byte more."""
        return read_object(self.s3, bucket, key, at_most)


# A process keeps its clients from one invocation to the next.
connect = cache(Aws)


def error_code(error: ClientError) -> str:
    """Return the code of an AWS error, such as `ResourceInUse`."""
    return str(error.response["Error"]["Code"])
