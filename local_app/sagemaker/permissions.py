"""The IAM permissions that a request to SageMaker, Application Auto Scaling or Bedrock needs, which AWS checks first.

https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemakerai.html
https://docs.aws.amazon.com/service-authorization/latest/reference/list_awsapplicationautoscaling.html
https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonbedrock.html
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
    "CreateModel": ("model", "ModelName"),
    "DescribeModel": ("model", "ModelName"),
    "DeleteModel": ("model", "ModelName"),
    "CreateEndpointConfig": ("endpoint-config", "EndpointConfigName"),
    "DescribeEndpointConfig": ("endpoint-config", "EndpointConfigName"),
    "DeleteEndpointConfig": ("endpoint-config", "EndpointConfigName"),
    "CreateEndpoint": ("endpoint", "EndpointName"),
    "DescribeEndpoint": ("endpoint", "EndpointName"),
    "UpdateEndpoint": ("endpoint", "EndpointName"),
    "DeleteEndpoint": ("endpoint", "EndpointName"),
    "InvokeEndpoint": ("endpoint", "EndpointName"),
    "InvokeEndpointWithResponseStream": ("endpoint", "EndpointName"),
    "CreateInferenceComponent": ("inference-component", "InferenceComponentName"),
    "DescribeInferenceComponent": ("inference-component", "InferenceComponentName"),
    "UpdateInferenceComponent": ("inference-component", "InferenceComponentName"),
    "UpdateInferenceComponentRuntimeConfig": ("inference-component", "InferenceComponentName"),
    "DeleteInferenceComponent": ("inference-component", "InferenceComponentName"),
}
# The second resource of an operation, which the request may name.
ALSO_NAMED = {
    "CreateEndpoint": ("endpoint-config", "EndpointConfigName"),
    "UpdateEndpoint": ("endpoint-config", "EndpointConfigName"),
    "CreateInferenceComponent": ("endpoint", "EndpointName"),
    "InvokeEndpoint": ("inference-component", "InferenceComponentName"),
    "InvokeEndpointWithResponseStream": ("inference-component", "InferenceComponentName"),
}
SCALING = frozenset({"RegisterScalableTarget", "DeregisterScalableTarget", "PutScalingPolicy", "DeleteScalingPolicy"})
SCALING_SERVICE = "sagemaker.application-autoscaling.amazonaws.com"
SCALING_ROLE = "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"


class RequiredPermission(NamedTuple):
    """An action on a resource that the caller must be allowed, with the request's condition keys."""

    action: str
    resource: str
    context: Mapping[str, str] = MappingProxyType({})


def required_permissions(operation: str, request: Json, arn_prefix: str) -> list[RequiredPermission]:
    """Return the permissions that `request` needs; `arn_prefix` is `arn:aws:sagemaker:<region>:<account>`.

    A request with tags also needs AddTags on the new resource. A request with a role also needs PassRole for the role.
    """
    if operation in SCALING:
        return _scaling_permissions(operation, request, arn_prefix)
    if operation in ("DescribeScalableTargets", "DescribeScalingPolicies"):
        return [RequiredPermission(f"application-autoscaling:{operation}", "*")]
    if operation in ("AddTags", "ListTags", "DeleteTags"):
        return [RequiredPermission(f"sagemaker:{operation}", request["ResourceArn"])]
    resource = _named(NAMED.get(operation), request, arn_prefix) or "*"
    if operation == "ListModelPackages":  # its resource type is model-package: all versions in the group
        group = request.get("ModelPackageGroupName", "").rpartition("/")[2]
        resource = f"{arn_prefix}:model-package/{group}/*" if group else f"{arn_prefix}:model-package/*"
    approval = request.get("ModelApprovalStatus") if operation in ("CreateModelPackage", "UpdateModelPackage") else None
    context = {"sagemaker:ModelApprovalStatus": approval} if approval else {}
    permissions = [RequiredPermission(f"sagemaker:{operation}", resource, context)]
    if operation == "CreateModelPackage":  # on the group, and on the new version in the group
        package = f"{arn_prefix}:model-package/{resource.rpartition('/')[2]}/1"
        permissions.append(RequiredPermission("sagemaker:CreateModelPackage", package, context))
    if second := _named(ALSO_NAMED.get(operation), request, arn_prefix):
        permissions.append(RequiredPermission(f"sagemaker:{operation}", second))
    if operation == "InvokeEndpointWithResponseStream":  # "IAM permissions must allow the sagemaker:InvokeEndpoint action"
        permissions += [permission._replace(action="sagemaker:InvokeEndpoint") for permission in permissions]
    if request.get("Tags"):
        permissions.append(RequiredPermission("sagemaker:AddTags", resource))
    if role := request.get("RoleArn") or request.get("ExecutionRoleArn"):
        passed_to = {"iam:PassedToService": "sagemaker.amazonaws.com"}
        permissions.append(RequiredPermission("iam:PassRole", role, passed_to))
    return permissions


def bedrock_permissions(operation: str, request: Json, arn_prefix: str, tags: Mapping[str, str]) -> list[RequiredPermission]:
    """Return the permissions that a request to Bedrock needs; `arn_prefix` is `arn:aws:bedrock:<region>:<account>`.

    `tags` are those of the model that the request names. A look at a job by its name is one at a job whose id only Bedrock
    knows. With a key, Bedrock uses it in the caller's name
    (https://docs.aws.amazon.com/bedrock/latest/userguide/encryption-import-model.html).
    """
    job, model = f"{arn_prefix}:model-import-job/0123456789ab", f"{arn_prefix}:imported-model/0123456789ab"
    context = {f"aws:ResourceTag/{key}": value for key, value in tags.items()}
    if operation in ("ListModelImportJobs", "ListImportedModels"):
        return [RequiredPermission(f"bedrock:{operation}", "*")]
    if operation == "GetModelImportJob":
        named = request["jobIdentifier"]
        return [RequiredPermission("bedrock:GetModelImportJob", named if named.startswith("arn:") else job)]
    if operation != "CreateModelImportJob":
        named = request.get("modelId") or request["modelIdentifier"]
        return [RequiredPermission(f"bedrock:{operation}", named if named.startswith("arn:") else model, context)]
    permissions = [
        RequiredPermission("bedrock:CreateModelImportJob", "*"),
        RequiredPermission("iam:PassRole", request["roleArn"], {"iam:PassedToService": "bedrock.amazonaws.com"}),
    ]
    tagged = [(job, request.get("jobTags")), (model, request.get("importedModelTags"))]
    permissions += [RequiredPermission("bedrock:TagResource", resource) for resource, tags_ in tagged if tags_]
    if key := request.get("importedModelKmsKeyId"):
        via = {"kms:ViaService": f"bedrock.{arn_prefix.split(':')[3]}.amazonaws.com"}
        permissions += [RequiredPermission(f"kms:{action}", key, via) for action in ("DescribeKey", "CreateGrant")]
    return permissions


def _named(member: tuple[str, str] | None, request: Json, arn_prefix: str) -> str | None:
    """Return the ARN of the resource that a member of the request names, by its name or its ARN; None without one."""
    kind, name = (member[0], request.get(member[1], "")) if member else ("", "")
    if not name:
        return None
    return name if name.startswith("arn:") else f"{arn_prefix}:{kind}/{name}"


def _scaling_permissions(operation: str, request: Json, arn_prefix: str) -> list[RequiredPermission]:
    """Return the permissions of a request to Application Auto Scaling, which makes up the ids of scalable targets.

    The first target in an account creates a role for the service, which the caller must be allowed
    (https://docs.aws.amazon.com/autoscaling/application/userguide/application-auto-scaling-service-linked-roles.html).
    """
    _, partition, _, region, account = arn_prefix.split(":")
    target = f"arn:{partition}:application-autoscaling:{region}:{account}:scalable-target/1"
    context = {
        "application-autoscaling:service-namespace": request.get("ServiceNamespace", ""),
        "application-autoscaling:scalable-dimension": request.get("ScalableDimension", ""),
    }
    permissions = [RequiredPermission(f"application-autoscaling:{operation}", target, context)]
    if operation == "RegisterScalableTarget":
        role = f"arn:{partition}:iam::{account}:role/aws-service-role/{SCALING_SERVICE}/{SCALING_ROLE}"
        created_for = {"iam:AWSServiceName": SCALING_SERVICE}
        permissions.append(RequiredPermission("iam:CreateServiceLinkedRole", role, created_for))
    return permissions
