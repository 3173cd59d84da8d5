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
    **{f"{verb}Model": ("model", "ModelName") for verb in ("Create", "Describe", "Delete")},
    **{f"{verb}EndpointConfig": ("endpoint-config", "EndpointConfigName") for verb in ("Create", "Describe", "Delete")},
    **{f"{verb}Endpoint": ("endpoint", "EndpointName") for verb in ("Create", "Describe", "Delete")},
    **{
        f"{verb}InferenceComponent": ("inference-component", "InferenceComponentName")
        for verb in ("Create", "Describe", "Update", "Delete")
    },
    "UpdateInferenceComponentRuntimeConfig": ("inference-component", "InferenceComponentName"),
}
# The second resource on which an operation needs its permission: resource type and member.
ALSO = {
    "CreateEndpoint": ("endpoint-config", "EndpointConfigName"),
    "CreateInferenceComponent": ("endpoint", "EndpointName"),
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
    if operation in ALSO:
        kind, member = ALSO[operation]
        permissions.append(RequiredPermission(f"sagemaker:{operation}", f"{arn_prefix}:{kind}/{request.get(member, '')}"))
    if request.get("Tags"):
        permissions.append(RequiredPermission("sagemaker:AddTags", resource))
    for member in ("RoleArn", "ExecutionRoleArn"):
        if member in request:
            passed_to = {"iam:PassedToService": "sagemaker.amazonaws.com"}
            permissions.append(RequiredPermission("iam:PassRole", request[member], passed_to))
    return permissions


def invocation_permissions(operation: str, parameters: Json, arn_prefix: str) -> list[RequiredPermission]:
    """Return the permissions that an invocation needs, on the endpoint and on its inference component.

    For a stream, "IAM permissions must allow the sagemaker:InvokeEndpoint action" (InvokeEndpointWithResponseStream in the
    API reference); the service authorization reference has an action of the operation's name.
    """
    resources = [f"{arn_prefix}:endpoint/{parameters['EndpointName']}"]
    if name := parameters.get("InferenceComponentName"):
        resources.append(f"{arn_prefix}:inference-component/{name}")
    actions = dict.fromkeys(("InvokeEndpoint", operation))
    return [RequiredPermission(f"sagemaker:{action}", resource) for action in actions for resource in resources]


def scaling_permissions(operation: str, request: Json, arn_prefix: str) -> list[RequiredPermission]:
    """Return the permissions that a request to Application Auto Scaling needs.

    https://docs.aws.amazon.com/service-authorization/latest/reference/list_awsapplicationautoscaling.html. Who registers a
    component also needs the permissions to describe and to change its copies
    (https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-prerequisites.html).
    """
    action = f"application-autoscaling:{operation}"
    if operation.startswith("Describe"):
        return [RequiredPermission(action, "*")]
    _, _, _, region, account = arn_prefix.split(":")
    context = {
        "application-autoscaling:service-namespace": str(request.get("ServiceNamespace", "")),
        "application-autoscaling:scalable-dimension": str(request.get("ScalableDimension", "")),
    }
    # A target's id is SageMaker's choice: nobody can name it in a policy.
    target = f"arn:aws:application-autoscaling:{region}:{account}:scalable-target/0"
    permissions = [RequiredPermission(action, target, context)]
    if operation == "RegisterScalableTarget":
        component = f"{arn_prefix}:{request.get('ResourceId', '')}"
        permissions += [
            RequiredPermission(f"sagemaker:{needed}", component)
            for needed in ("DescribeInferenceComponent", "UpdateInferenceComponentRuntimeConfig")
        ]
    return permissions
