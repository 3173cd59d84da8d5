"""The AWS services that the SageMaker emulator uses: S3, CloudWatch and its Logs, STS and EC2."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError

from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.sandbox import StartupError

AWS_ERRORS = (BotoCoreError, ClientError, Boto3Error)


class Services:
    """S3 and CloudWatch Logs at one endpoint, with the credentials of one principal.

    The credentials come from `session`, else from boto3's usual places. Raises StartupError without credentials.
    """

    def __init__(self, endpoint_url: str, region: str, session: botocore.session.Session | None = None) -> None:
        self._session = boto3.session.Session(region_name=region, botocore_session=session)
        if self._session.get_credentials() is None:
            raise StartupError("No AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the local account.")
        config = Config(retries={"mode": "standard", "max_attempts": 8}, s3={"addressing_style": "path"})
        self.s3 = self._session.client("s3", endpoint_url=endpoint_url, config=config)
        self.region, self.endpoint_url = region, endpoint_url

    def assume(self, role_arn: str, session_name: str = "SageMaker") -> Services:
        """Return the same services with a role's credentials, which are fetched at the first request and renewed in time."""
        fetcher = AssumeRoleCredentialFetcher(
            partial(self._session.client, endpoint_url=self.endpoint_url, region_name=self.region),
            self._session.get_credentials(),
            role_arn,
            # 12 hours, STS's maximum: a job's process keeps the credentials of its start.
            extra_args={"RoleSessionName": session_name, "DurationSeconds": 12 * 3600},
        )
        session = botocore.session.Session()
        session._credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
        return Services(self.endpoint_url, self.region, session)

    def check_role(self, role_arn: str) -> None:
        """Raise ServiceError, in AWS's words, unless SageMaker can assume the role."""
        try:
            _ = self.assume(role_arn).credentials
        except ClientError as error:
            raise ServiceError(
                "ValidationException",
                f"Could not assume role {role_arn}. Please ensure that the role exists and allows principal "
                "'sagemaker.amazonaws.com' to assume the role.",
            ) from error

    @cached_property
    def logs(self) -> Any:
        """CloudWatch Logs' client, which sends once: LogStream sends its lines again."""
        config = Config(retries={"total_max_attempts": 1})
        return self._session.client("logs", endpoint_url=self.endpoint_url, config=config)

    @cached_property
    def cloudwatch(self) -> Any:
        """CloudWatch's client."""
        return self._session.client("cloudwatch", endpoint_url=self.endpoint_url)

    def reach_internet(self, subnets: list[str]) -> bool:
        """Return whether a job in these subnets reaches the internet: all of them have a route to a NAT gateway.

        A job's network interfaces have no public address, so an internet gateway does not help
        (https://docs.aws.amazon.com/sagemaker/latest/dg/train-vpc.html).
        """
        ec2 = self._session.client("ec2", endpoint_url=self.endpoint_url)

        def has_nat(subnet: str) -> bool:
            tables = ec2.describe_route_tables(Filters=[{"Name": "association.subnet-id", "Values": [subnet]}])[
                "RouteTables"
            ]
            routes = [route for table in tables for route in table["Routes"]]
            return any("NatGatewayId" in route and route.get("DestinationCidrBlock") == "0.0.0.0/0" for route in routes)

        return all(map(has_nat, subnets))

    @property
    def credentials(self) -> dict[str, str]:
        """The credentials as environment variables."""
        frozen = self._session.get_credentials().get_frozen_credentials()
        return {
            "AWS_ACCESS_KEY_ID": frozen.access_key,
            "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
            **({"AWS_SESSION_TOKEN": frozen.token} if frozen.token else {}),
        }
