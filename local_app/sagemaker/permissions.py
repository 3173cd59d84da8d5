"""Which IAM permissions a SageMaker request needs: what AWS checks before it does an operation.

https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemakerai.html
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from local_app.sagemaker.model import Json

# Operations whose resource is named by one member of the request, by its name or its ARN.
NAMED = {
    "CreateTrainingJob": ("training-job", "TrainingJobName"),
    "DescribeTrainingJob": ("training-job", "TrainingJobName"),
    "StopTrainingJob": ("training-job", "TrainingJobName"),
    "CreateModelPackageGroup": ("model-package-group", "ModelPackageGroupName"),
    "DescribeModelPackageGroup": ("model-package-group", "ModelPackageGroupName"),
    "DeleteModelPackageGroup": ("model-package-group", "ModelPackageGroupName"),
    "CreateModelPackage": ("model-package-group", "ModelPackageGroupName"),
    "ListModelPackages": ("model-package-group", "ModelPackageGroupName"),
    "DescribeModelPackage": ("model-package", "ModelPackageName"),
    "UpdateModelPackage": ("model-package", "ModelPackageArn"),
    "DeleteModelPackage": ("model-package", "ModelPackageName"),
}


class Check(NamedTuple):
    """One thing that the caller must be allowed: an action on a resource, with the request's condition keys."""

    action: str
    resource: str
    context: Mapping[str, str] = MappingProxyType({})


def required_permissions(operation: str, request: Json, arn_prefix: str) -> list[Check]:
    """Return everything that `request` needs; `arn_prefix` is `arn:aws:sagemaker:<region>:<account>`.

    A request with tags also needs AddTags on what it makes, and one that names a role may pass that role to SageMaker.
    """
    if operation in ("AddTags", "ListTags", "DeleteTags"):
        return [Check(f"sagemaker:{operation}", request["ResourceArn"])]
    kind, member = NAMED.get(operation, ("", ""))
    name = request.get(member, "")
    resource = name if name.startswith("arn:") else f"{arn_prefix}:{kind}/{name}" if name else "*"
    checks = [Check(f"sagemaker:{operation}", resource)]
    if operation == "CreateModelPackage":  # the group and the version that will be in it
        checks.append(Check("sagemaker:CreateModelPackage", f"{arn_prefix}:model-package/{name.rpartition('/')[2]}/1"))
    if request.get("Tags"):
        checks.append(Check("sagemaker:AddTags", resource))
    if "RoleArn" in request:
        checks.append(Check("iam:PassRole", request["RoleArn"], {"iam:PassedToService": "sagemaker.amazonaws.com"}))
    return checks
