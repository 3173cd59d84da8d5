"""AWS clients. Only this module makes clients; every other module gets them as an argument."""

from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from pipeline.runs.deployments import DeploymentTable
from pipeline.runs.lines import LineTable
from pipeline.runs.table import RunTable

_CONFIG = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=5, read_timeout=60)


def read_object(s3: Any, bucket: str, key: str, at_most: int | None = None) -> bytes | None:
    """Return an object's bytes, at most `at_most` + 1 of them; None for a missing object."""
    try:
        body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read(None if at_most is None else at_most + 1)
    except s3.exceptions.NoSuchKey:
        return None
    return body


class Aws:
    """AWS clients, each made on first use: a cold start loads only the service models that the function calls."""

    def __init__(self, run_table: str, session: Any = None):
        """`session` makes the clients as a boto3.Session does; without one, that of the environment."""
        self._run_table = run_table
        self._session = session or boto3.Session()
        # For rewards, which call other services.
        self.client = cache(partial(self._session.client, config=_CONFIG))

    @cached_property
    def s3(self) -> Any:
        """The S3 client."""
        # Presigned URLs of objects under a KMS key need signature version 4. In the oldest regions it is not the default.
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
    def runtime(self) -> Any:
        """The client that asks SageMaker's endpoints, each question once: a look that repeats slow ones would be cut off."""
        return self._session.client("sagemaker-runtime", config=_CONFIG.merge(Config(retries={"total_max_attempts": 1})))

    @cached_property
    def bedrock(self) -> Any:
        """The client that imports models into Bedrock."""
        return self._session.client("bedrock", config=_CONFIG)

    @cached_property
    def bedrock_runtime(self) -> Any:
        """The client that asks Bedrock's models."""
        return self._session.client("bedrock-runtime", config=_CONFIG)

    @cached_property
    def autoscaling(self) -> Any:
        """The Application Auto Scaling client."""
        return self._session.client("application-autoscaling", config=_CONFIG)

    @cached_property
    def cloudwatch(self) -> Any:
        """The CloudWatch client."""
        return self._session.client("cloudwatch", config=_CONFIG)

    @cached_property
    def sns(self) -> Any:
        """The SNS client."""
        return self._session.client("sns", config=_CONFIG)

    @cached_property
    def runs(self) -> RunTable:
        """The run table."""
        return RunTable(self.table)

    @cached_property
    def lines(self) -> LineTable:
        """The line items of the run table."""
        return LineTable(self.table)

    @cached_property
    def deployments(self) -> DeploymentTable:
        """The deployment items of the run table."""
        return DeploymentTable(self.table)

    @cached_property
    def table(self) -> Any:
        """The DynamoDB table of runs, lines and deployments."""
        return self._session.resource("dynamodb", config=_CONFIG).Table(self._run_table)

    def signed(
        self, method: str, url: str, body: bytes, headers: dict[str, str], service: str, region: str
    ) -> dict[str, str]:
        """Return the headers of an HTTP request to a service that has no client, with those of signature version 4."""
        from hashlib import sha256

        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        digest = sha256(body).hexdigest()
        request = AWSRequest(method, url, headers | {"X-Amz-Content-SHA256": digest}, body)
        SigV4Auth(self._session.get_credentials(), service, region).add_auth(request)
        return dict(request.headers.items())

    def read(self, bucket: str, key: str, at_most: int | None = None) -> bytes | None:
        """Return an object's bytes, see `read_object`."""
        return read_object(self.s3, bucket, key, at_most)


# A process keeps its clients between invocations.
connect = cache(Aws)


def error_code(error: ClientError) -> str:
    """Return the code of an AWS error, such as `ResourceInUse`."""
    return str(error.response["Error"]["Code"])


# SageMaker's codes for what does not exist.
NO_SUCH = frozenset({"ValidationException", "ResourceNotFound"})


def describe_if_any(describe: Callable[..., dict[str, Any]], **name: str) -> dict[str, Any] | None:
    """Return what one of SageMaker's Describe… calls answers, None for what does not exist."""
    try:
        return describe(**name)
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        return None
