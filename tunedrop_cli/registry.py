"""Model packages in SageMaker's registry: their approval statuses, which decide what is deployed and who is champion."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from botocore.exceptions import ClientError

from local_app.stack import StackError
from pipeline.aws import NO_SUCH, error_code
from tunedrop.plain import one_line
from tunedrop_cli.deployment import Deployment

APPROVED, REJECTED, PENDING = "Approved", "Rejected", "PendingManualApproval"
LONGEST_REASON = 1024  # of ApprovalDescription


class Package(NamedTuple):
    """A version in the stack's model package group."""

    version: int
    arn: str
    run_id: str
    status: str


def describe_package(sagemaker: Any, arn: str) -> dict[str, Any]:
    """Return DescribeModelPackage's answer. Raises StackError for a package that does not exist."""
    try:
        described: dict[str, Any] = sagemaker.describe_model_package(ModelPackageName=arn)
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        raise StackError(
            f"The model package {arn} does not exist: it was deleted, or belongs to another account or region. Approve "
            "another run, or train this one again: drop its dataset with another seed in the config."
        ) from None
    return described


def packages_of(deployment: Deployment, runs: Mapping[str, str]) -> list[Package]:
    """Return the model packages of `runs` (run ids by package version) that exist, the oldest first."""
    pages = (
        deployment.connect("client", "sagemaker")
        .get_paginator("list_model_packages")
        .paginate(ModelPackageGroupName=deployment.outputs.model_package_group, PaginationConfig={"PageSize": 100})
    )
    try:
        found = [item for page in pages for item in page["ModelPackageSummaryList"]]
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        found = []  # the first publication creates the group
    packages = []
    for item in found:
        version = item["ModelPackageVersion"]
        if run_id := runs.get(str(version)):
            packages.append(Package(version, item["ModelPackageArn"], run_id, item["ModelApprovalStatus"]))
    return sorted(packages)


def champion_of(packages: Iterable[Package]) -> Package | None:
    """Return the newest approved package."""
    return max((package for package in packages if package.status == APPROVED), default=None)


def set_approval(deployment: Deployment, arn: str, status: str, reason: str) -> str:
    """Set the approval status of a model package of this stack; return the status that it had.

    Raises StackError for a package that does not exist, and for one of another stack's group.
    """
    group, ours = arn.rpartition("/")[0].rpartition("/")[2], deployment.outputs.model_package_group
    if group != ours:
        raise StackError(
            f"{arn} is in the model package group of another stack: this stack's group is {ours}. Name that stack with "
            "--stack, --region or --profile."
        )
    sagemaker = deployment.connect("client", "sagemaker")
    before: str = describe_package(sagemaker, arn)["ModelApprovalStatus"]
    sagemaker.update_model_package(
        ModelPackageArn=arn, ModelApprovalStatus=status, ApprovalDescription=one_line(reason)[:LONGEST_REASON]
    )
    return before
