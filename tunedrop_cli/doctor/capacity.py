"""Checks what SageMaker needs on AWS to start a job or an endpoint: quotas and the training image."""

from collections.abc import Iterator

import msgspec
from botocore.exceptions import ClientError

from pipeline.aws import error_code
from release.target import ECR_IMAGE
from tunedrop_cli.doctor.finding import DeployedStack, Finding


class Quota(msgspec.Struct, frozen=True):
    """A quota of SageMaker, in instances."""

    code: str
    value: float


def quotas(stack: DeployedStack) -> Iterator[Finding]:
    """The account has a quota for one of the default instance types. Runs pass over a type without quota.

    On demand, SageMaker chooses among all types only if the quota of each type covers the job
    (https://docs.aws.amazon.com/sagemaker/latest/dg/train-instance-preferences.html); else the types are tried one by one.
    """
    spot = stack.parameters["UseSpot"] == "true"
    jobs = int(stack.parameters["MaxConcurrentJobs"])
    types = [name.strip() for name in stack.parameters["InstanceTypes"].split(",")]
    names = [f"{name} for {'spot ' if spot else ''}training job usage" for name in types]
    values = _quotas(stack, set(names))
    works = any(values[name].value >= 1 for name in names if name in values)
    rest = " The other types work." if works else ""
    for name in names:
        quota = values.get(name)
        if quota is None:
            message = (
                f"Service Quotas has no quota '{name}' in {stack.region}: SageMaker does not offer this type there.{rest}"
            )
            fix = "Use other types (parameter InstanceTypes), or deploy in another region."
            yield Finding("QUOTA_UNKNOWN", message, fix, trouble=not works)
            continue
        request = _request(stack, quota, jobs)
        if quota.value < 1:
            message = (
                f"The quota '{name}' ({quota.code}) is {quota.value:g} in {stack.region}: no job can start on it.{rest}"
            )
            yield Finding("QUOTA_ZERO", message, request, trouble=not works)
        elif quota.value < jobs:
            message = (
                f"The quota '{name}' ({quota.code}) is {quota.value:g}, and MaxConcurrentJobs is {jobs}: more runs wait."
            )
            yield Finding("QUOTA_LOW", message, request, trouble=False)


def endpoint_quota(stack: DeployedStack) -> Iterator[Finding]:
    """The account has a quota for the instance type of the endpoints, if the stack serves models."""
    instance_type = stack.parameters["EndpointInstanceType"]
    if not instance_type:
        return
    name, wanted = f"{instance_type} for endpoint usage", int(stack.parameters["EndpointMaxInstances"])
    quota = _quotas(stack, {name}).get(name)
    if quota is None:
        message = f"Service Quotas has no quota '{name}' in {stack.region}: SageMaker does not offer this type there."
        fix = "Use another type (parameter EndpointInstanceType), or deploy in another region."
        yield Finding("QUOTA_UNKNOWN", message, fix)
    elif quota.value < 1:
        message = f"The quota '{name}' ({quota.code}) is {quota.value:g} in {stack.region}: no model can be served on it."
        yield Finding("QUOTA_ZERO", message, _request(stack, quota, wanted))
    elif quota.value < wanted:
        message = f"The quota '{name}' ({quota.code}) is {quota.value:g}, and EndpointMaxInstances is {wanted}."
        yield Finding("QUOTA_LOW", message, _request(stack, quota, wanted), trouble=False)


def _request(stack: DeployedStack, quota: Quota, wanted: int) -> str:
    increase = f"service-quotas request-service-quota-increase --service-code sagemaker --quota-code {quota.code}"
    return f"Request an increase with `{stack.location.aws_command(f'{increase} --desired-value {wanted}')}`."


def _quotas(stack: DeployedStack, names: set[str]) -> dict[str, Quota]:
    """Return SageMaker's quotas of these names: the account's values, else the default values of every account.

    ListServiceQuotas leaves out a quota without an applied value
    (https://docs.aws.amazon.com/servicequotas/2019-06-24/apireference/API_ListServiceQuotas.html).
    """
    values: dict[str, Quota] = {}
    for operation in ("list_service_quotas", "list_aws_default_service_quotas"):
        if names <= values.keys():
            break
        for page in stack.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker"):
            listed = {each["QuotaName"]: Quota(each["QuotaCode"], each["Value"]) for each in page["Quotas"]}
            values |= {name: listed[name] for name in names - values.keys() & listed.keys()}
            if names <= values.keys():  # SageMaker has thousands of quotas
                break
    return values


def image(stack: DeployedStack) -> Iterator[Finding]:
    """The training image exists in the stack's region.

    SageMaker pulls from the job's own region only (https://github.com/aws-samples/mlops-amazon-sagemaker/issues/9).
    DescribeImages also works for AWS's own registries, with the caller's IAM permission.
    """
    uri = stack.outputs["TrainingImageUri"]
    parts = ECR_IMAGE.fullmatch(uri)
    if parts is None:
        message = f"The image '{uri}' is not in ECR, and SageMaker's jobs pull from ECR only."
        yield Finding("IMAGE_PLACE", message, "Push it to ECR, and deploy again with its URI (parameter TrainingImageUri).")
        return
    if parts["region"] != stack.region:
        message = f"The image '{uri}' is in {parts['region']}, and the stack in {stack.region}."
        fix = f"Push it to ECR in {stack.region}, and deploy again with its URI (parameter TrainingImageUri)."
        yield Finding("IMAGE_PLACE", message, fix)
        return
    image_id = {"imageDigest": parts["digest"]} if parts["digest"] else {"imageTag": parts["tag"] or "latest"}
    repository = {"registryId": parts["account"], "repositoryName": parts["repository"]}
    try:
        stack.client("ecr").describe_images(**repository, imageIds=[image_id])
    except ClientError as error:
        if error_code(error) not in {"ImageNotFoundException", "RepositoryNotFoundException"}:
            raise
        message = f"There is no image '{uri}': {error.response['Error']['Message']}"
        fix = "Push the image, or deploy again with another image or without one (parameter TrainingImageUri)."
        yield Finding("IMAGE_MISSING", message, fix)
