"""`tunedrop doctor`: finds what keeps a stack from working, on AWS or on this machine. It only reads.

Each check takes the deployed stack and yields findings. `ACTIONS` has every API call of the checks with the IAM action that
allows the call; docs/operations.md lists the actions. A check whose permission is missing is skipped, and a note says so.
"""

from collections.abc import Callable, Iterator

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.aws import error_code
from tunedrop_cli.doctor.capacity import endpoint_quota, image, quotas
from tunedrop_cli.doctor.events import bucket_events, rules, subscriptions
from tunedrop_cli.doctor.finding import DeployedStack, Finding
from tunedrop_cli.doctor.functions import alarms, dead_letters, function_errors, functions
from tunedrop_cli.doctor.inputs import base_model, launch_plan, secret
from tunedrop_cli.doctor.key import key
from tunedrop_cli.doctor.stack import find_stack
from tunedrop_cli.location import StackLocation

# The API operations of the checks, and the IAM action that allows each.
ACTIONS = {
    "DescribeStacks": "cloudformation:DescribeStacks",
    "DescribeStackEvents": "cloudformation:DescribeStackEvents",
    "ListStackResources": "cloudformation:ListStackResources",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "GetBucketNotificationConfiguration": "s3:GetBucketNotification",
    "ListServiceQuotas": "servicequotas:ListServiceQuotas",
    "ListAWSDefaultServiceQuotas": "servicequotas:ListAWSDefaultServiceQuotas",
    "DescribeImages": "ecr:DescribeImages",
    "DescribeKey": "kms:DescribeKey",
    "GetKeyPolicy": "kms:GetKeyPolicy",
    "DescribeSecret": "secretsmanager:DescribeSecret",
    "ListSubscriptionsByTopic": "sns:ListSubscriptionsByTopic",
    "ListRules": "events:ListRules",
    "GetFunctionConfiguration": "lambda:GetFunctionConfiguration",
    "GetMetricData": "cloudwatch:GetMetricData",
    "DescribeAlarms": "cloudwatch:DescribeAlarms",
    "GetQueueAttributes": "sqs:GetQueueAttributes",
}
DENIED = ("AccessDenied", "AuthorizationError", "UnauthorizedOperation")

CHECKS: list[Callable[[DeployedStack], Iterator[Finding]]] = [
    *(launch_plan, base_model, bucket_events, rules, functions, function_errors, dead_letters, alarms, key, secret),
    subscriptions,
]
# The local app pulls no image, and its SageMaker emulator has quotas of its own.
ON_AWS: list[Callable[[DeployedStack], Iterator[Finding]]] = [quotas, endpoint_quota, image]


def examine(location: StackLocation) -> list[Finding]:
    """Return the findings of every check, notes last; an empty list for a healthy stack."""
    stack: DeployedStack | None = None
    findings: list[Finding] = []
    try:
        stack, findings = find_stack(location)
    except ClientError as error:
        findings = [_refusal(error, "Sign in again, or use another profile (`--profile`).")]
    except BotoCoreError as error:
        fix = "Use a profile and a region (`--profile`, `--region`) that are configured on this machine."
        findings = [Finding("NOT_REACHED", f"AWS cannot be reached: {error}", fix)]
    if stack is None:  # no other check can run
        return [msgspec.structs.replace(finding, trouble=True) for finding in findings]
    for check in [*CHECKS, *(ON_AWS if location.on_aws else [])]:
        try:
            findings += check(stack)
        except ClientError as error:
            findings.append(_refusal(error, "If a resource of the stack was deleted, deploy again."))
        except BotoCoreError as error:
            findings.append(Finding("NOT_REACHED", f"A check was skipped: {error}", "Try again later.", False))
    return sorted(dict.fromkeys(findings), key=lambda finding: not finding.trouble)


def _refusal(error: ClientError, fix: str) -> Finding:
    """Return the finding for a refused call; a note when only a permission is missing."""
    action = ACTIONS[error.operation_name]
    if error_code(error).startswith(DENIED):
        message = f"A check was skipped: you are not allowed to call {action}."
        return Finding("NOT_ALLOWED", message, f"Ask an administrator to allow {action}.", False)
    message = error.response["Error"].get("Message", "")
    return Finding("REFUSED", f"AWS refused {error.operation_name}: {error_code(error)}: {message}", fix)
