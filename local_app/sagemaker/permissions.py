"""The IAM permissions that a SageMaker request needs. AWS checks them before the operation.

https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemakerai.html
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from local_app.common import Json

# Operations whose request names the resource in one member, by its name or its ARN: resource type and member.
NAMED = {
    "CreateTrainingJob": ("training-job", "TrainingJobName"),
    "DescribeTrainingJob": ("training-job", "TrainingJobName"),
    "StopTrainingJob": ("training-job", "TrainingJobName"),
    "CreateModelPackageGroup": ("model-package-group", "ModelPackageGroupName"),
    "DescribeModelPackageGroup": ("model-package-group", "ModelPackageGroupName"),
    "DeleteModelPackageGroup": ("model-package-group", "ModelPackageGroupName"),
    "CreateModelPackage": ("model-package-group", "ModelPackageGroupName"),
    "DescribeModelPackage": ("model-package", "ModelPackageName"),
    "UpdateModelPackage": ("model-package", "ModelPackageArn"),
    "DeleteModelPackage": ("model-package", "ModelPackageName"),
}


class RequiredPermission(NamedTuple):
    """An action on a resource that the caller must be allowed, with the request's condition keys."""

    action: str
    resource: str
    context: Mapping[str, str] = MappingProxyType({})


def required_permissions(operation: str, request: Json, arn_prefix: str) -> list[RequiredPermission]:
    """Return the permissions that `request` needs; `arn_prefix` is `arn:aws:sagemaker:<region>:<account>`.

    A request with tags also needs AddTags on the new resource. A request with a role also needs PassRole for the role.
    """
    if operation in ("AddTags", "ListTags", "DeleteTags"):
        return [RequiredPermission(f"sagemaker:{operation}", request["ResourceArn"])]
    kind, member = NAMED.get(operation, ("", ""))
    name = request.get(member, "")
    resource = name if name.startswith("arn:") else f"{arn_prefix}:{kind}/{name}" if name else "*"
    if operation == "ListModelPackages":  # its resource type is model-package: all versions in the group
        group = request.get("ModelPackageGroupName", "").rpartition("/")[2]
        resource = f"{arn_prefix}:model-package/{group}/*" if group else f"{arn_prefix}:model-package/*"
    approval = request.get("ModelApprovalStatus") if operation in ("CreateModelPackage", "UpdateModelPackage") else None
    context = {"sagemaker:ModelApprovalStatus": approval} if approval else {}
    permissions = [RequiredPermission(f"sagemaker:{operation}", resource, context)]
    if operation == "CreateModelPackage":  # on the group, and on the new version in the group
        package = f"{arn_prefix}:model-package/{name.rpartition('/')[2]}/1"
        permissions.append(RequiredPermission("sagemaker:CreateModelPackage", package, context))
    if request.get("Tags"):
        permissions.append(RequiredPermission("sagemaker:AddTags", resource))
    if "RoleArn" in request:
        passed_to = {"iam:PassedToService": "sagemaker.amazonaws.com"}
        permissions.append(RequiredPermission("iam:PassRole", request["RoleArn"], passed_to))
    return permissions
