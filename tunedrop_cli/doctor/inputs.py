"""Checks what runs need from elsewhere: the launch plan, the base model, and the secret with tokens of hosts."""

from collections.abc import Iterator

import msgspec
from botocore.exceptions import ClientError

from pipeline.aws import error_code, read_object
from pipeline.validation.model_files import missing_files
from release.target import differences, target_of_outputs
from tunedrop import object_keys
from tunedrop_cli.doctor.finding import DeployedStack, Finding


def launch_plan(stack: DeployedStack) -> Iterator[Finding]:
    """The launch plan exists and matches the stack's parameters."""
    s3, bucket = stack.client("s3"), stack.outputs["ArtifactBucket"]
    release = f"Run `{stack.location.release}`."
    key = object_keys.CURRENT_PLAN
    current = read_object(s3, bucket, key)
    plan = None
    if current is not None:
        key = f"{object_keys.LAUNCH_PLANS}{msgspec.json.decode(current)['digest']}.json"
        plan = read_object(s3, bucket, key)
    if plan is None:
        yield Finding("PLAN_MISSING", f"No launch plan: s3://{bucket}/{key} is missing.", release)
        return
    target, requests = target_of_outputs(stack.outputs), msgspec.json.decode(plan)
    changed = dict.fromkeys(each for kind in ("train", "test") for each in differences(target, requests[kind]))
    if changed:
        list_of_changes = "; ".join(f"{name} is '{now}' and was '{then}'" for name, now, then in changed)
        message = f"The launch plan is older than the stack's parameters: {list_of_changes}."
        yield Finding("PLAN_OUTDATED", message, release)


def base_model(stack: DeployedStack) -> Iterator[Finding]:
    """The default base model is complete."""
    model, bucket = stack.parameters["BaseModel"], stack.outputs["DataBucket"]
    if "/" in model:  # a hub id
        return
    prefix = object_keys.model_prefix(model)
    pages = stack.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    names = {item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])}
    if missing := missing_files(names):
        uri = f"s3://{bucket}/{prefix}"
        code = "MODEL_INCOMPLETE" if names else "MODEL_MISSING"
        message = f"The base model '{model}' lacks {', '.join(missing)} in {uri}."
        upload = stack.location.aws_command(f"s3 sync ./{model} {uri}")
        yield Finding(
            code, message, f"Upload its files with `{upload}`, or name another model in each run's config (`model:`)."
        )


def secret(stack: DeployedStack) -> Iterator[Finding]:
    """The secret of RewardHttpSecretArn exists. Its value, which this check does not read, is checked before each run.

    https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_DescribeSecret.html
    """
    arn = stack.outputs.get("RewardHttpSecretArn", "")
    if not arn:
        return
    create = "create a secret, then deploy and release again with its ARN (parameter RewardHttpSecretArn)."
    try:
        about = stack.client("secretsmanager").describe_secret(SecretId=arn)
    except ClientError as error:
        if error_code(error) != "ResourceNotFoundException":
            raise
        yield Finding(
            "SECRET_MISSING",
            f"There is no secret {arn}: rewards that call a host fail.",
            f"Correct the ARN, or {create}",
        )
        return
    if "DeletedDate" in about:
        restore = stack.location.aws_command(f"secretsmanager restore-secret --secret-id {arn}")
        message = f"The secret {arn} was deleted and can be restored for some days: rewards that call a host fail."
        yield Finding("SECRET_DELETED", message, f"Run `{restore}`, or {create}")
