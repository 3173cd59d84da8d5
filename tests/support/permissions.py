"""Recorded AWS calls against the template's policies: who may do what, and which permission nobody needs.

What a call needs, and whether a policy gives it, is said by the code that enforces IAM in the local app: MiniStack's for
AWS's services, `local_app.sagemaker.permissions` for SageMaker's.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_stack import ARTIFACTS, BUS, DATA, PREFIX, STACK_ID, TABLE
from ministack.app import _extract_s3_vhost_bucket
from ministack.core import iam_actions, iam_evaluator, router
from template import listed, load_template, of_type, resolve

from local_app.aws import hooks
from local_app.sagemaker.permissions import bedrock_permissions, required_permissions

hooks.hook_alarm_arns()
Json = dict[str, Any]
ACCOUNT, REGION = "123456789012", "us-east-1"
KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/11111111-2222-3333-4444-555555555555"
IMAGE = f"763104351884.dkr.ecr.{REGION}.amazonaws.com/pytorch:tag"


@dataclass(frozen=True)
class Permission:
    """What a role must be allowed: an action on a resource, with the request's condition keys."""

    role: str
    action: str
    resource: str
    context: Json = field(default_factory=dict, compare=False)


def of_request(role: str, method: str, url: str, headers: Json, body: object = b"") -> Iterator[Permission]:
    """Yield the permissions that an HTTP request to AWS needs. A body that is a stream is an object's, and not read."""
    body = body.encode() if isinstance(body, str) else body if isinstance(body, bytes | bytearray) else b""
    parts = urlsplit(url)
    path, query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
    names = {name.lower(): value.decode() if isinstance(value, bytes) else str(value) for name, value in headers.items()}
    names["host"] = parts.netloc
    if names.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        query |= parse_qs(body.decode())
    if parts.netloc.startswith("application-autoscaling."):
        yield from of_sagemaker(role, names["x-amz-target"].rpartition(".")[2], json.loads(body))
        return
    service = router.detect_service(method, path, names, query)
    if service == "s3" and (bucket := _extract_s3_vhost_bucket(parts.netloc)):
        path = f"/{bucket}{path}"
    action = iam_actions.extract_iam_action(service, method, path, names, body, query)
    assert action, (service, method, url)
    # A transaction is no action of its own: each item needs the action that it is.
    if service == "dynamodb" and (items := iam_actions.dynamodb_transaction_checks(action, body, REGION, ACCOUNT)):
        yield from (Permission(role, item_action, item) for item_action, item in items)
        return
    context: Json = {}
    resource = iam_actions.extract_resource_arn(service, method, path, names, body, query, REGION, ACCOUNT)
    if service == "s3" and action == "s3:ListBucket":
        context = iam_actions.s3_service_context(action, query)
    yield Permission(role, action, resource, context)


def of_sagemaker(role: str, operation: str, request: Json) -> Iterator[Permission]:
    """Yield the permissions that a call of SageMaker or Application Auto Scaling needs."""
    for check in required_permissions(operation, request, f"arn:aws:sagemaker:{REGION}:{ACCOUNT}"):
        yield Permission(role, check.action, check.resource, dict(check.context))


def of_bedrock(role: str, operation: str, request: Json, prefix: str = PREFIX) -> Iterator[Permission]:
    """Yield the permissions that a call of Bedrock needs, about a model of the stack with the prefix."""
    for check in bedrock_permissions(operation, request, f"arn:aws:bedrock:{REGION}:{ACCOUNT}", {"tunedrop:prefix": prefix}):
        yield Permission(role, check.action, check.resource, dict(check.context))


def known_names(prefix: str = PREFIX) -> dict[str, str]:
    """Return the names that the stack of `fake_stack` would have had from CloudFormation."""
    logs = {
        f"{name}Logs.Arn": f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/lambda/tunedrop-{name}:*"
        for name in ("ValidateDataset", "StartTraining", "TestModel", "PublishResults", "Reconcile", "DeployModel")
    }
    return logs | {
        "AWS::Partition": "aws",
        "AWS::Region": REGION,
        "AWS::AccountId": ACCOUNT,
        "AWS::StackName": "tunedrop",
        "AWS::URLSuffix": "amazonaws.com",
        "DataBucket": DATA,
        "ArtifactBucket": ARTIFACTS,
        "DataBucket.Arn": f"arn:aws:s3:::{DATA}",
        "ArtifactBucket.Arn": f"arn:aws:s3:::{ARTIFACTS}",
        "RunTable.Arn": f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{TABLE}",
        "EventBus.Arn": f"arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{BUS}",
        "Topic": f"arn:aws:sns:{REGION}:{ACCOUNT}:topic",
        "AlarmTopic": f"arn:aws:sns:{REGION}:{ACCOUNT}:alarms",
        "DeadLetterQueue.Arn": f"arn:aws:sqs:{REGION}:{ACCOUNT}:dead-letters",
        "SageMakerRole.Arn": f"arn:aws:iam::{ACCOUNT}:role/SageMakerRole",
        "ServingRole.Arn": f"arn:aws:iam::{ACCOUNT}:role/ServingRole",
        "ImportRole.Arn": f"arn:aws:iam::{ACCOUNT}:role/ImportRole",
        "AWS::StackId": f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/tunedrop/{STACK_ID}",
        "JobPrefix": prefix,
        "TrainingImageUri": IMAGE,
        "KmsKeyArn": KEY,
    }


def policies(has_image: bool = False) -> dict[str, list[Json]]:
    """Return every role's statements, resolved for a stack with a key and a VPC that serves models."""
    template = load_template()
    conditions = {"HasKmsKey": True, "HasVpc": True, "HasTrainingImage": has_image, "ServesModels": True}
    rewards = ("HasRewardFunctions", "HasRewardJudge", "HasRewardHttpSecret")
    conditions |= dict.fromkeys(rewards, False)  # tests/template/test_reward_parameters.py
    conditions["HasMlflow"] = False  # tests/template/test_tracker_parameters.py
    shared = {
        name: resolve(policy["PolicyDocument"]["Statement"], known_names(), conditions)
        for name, policy in of_type(template, "AWS::IAM::ManagedPolicy").items()
    }
    found = {}
    for name, role in of_type(template, "AWS::IAM::Role").items():
        own = [statement for policy in role["Policies"] for statement in policy["PolicyDocument"]["Statement"]]
        found[name] = resolve(own, known_names(), conditions)
        for managed in resolve(role.get("ManagedPolicyArns", []), {policy: policy for policy in shared}, conditions):
            found[name] += shared[managed]
    return found


def allows(statements: list[Json], permission: Permission) -> bool:
    """Whether a role's statements give a permission."""
    context = iam_evaluator.EvalContext(
        principal_arn=f"arn:aws:sts::{ACCOUNT}:assumed-role/{permission.role}/session",
        principal_type="AssumedRole",
        principal_account=ACCOUNT,
        action=permission.action,
        resource_arn=permission.resource,
        region=REGION,
        secure_transport=True,
        service_context={key.lower(): value for key, value in permission.context.items()},
    )
    documents = [iam_evaluator.parse_policy_document({"Statement": statements})]
    return bool(iam_evaluator.evaluate(context, documents).decision == "Allow")


def needless(statements: list[Json], permissions: Iterable[Permission]) -> list[str]:
    """Return every statement, action and resource without which all the permissions would still be there."""
    needed = list(permissions)

    def enough(rest: list[Json]) -> bool:
        return all(allows(rest, permission) for permission in needed)

    found = []
    for number, statement in enumerate(statements):
        if enough(statements[:number] + statements[number + 1 :]):
            found.append(json.dumps(statement))
            continue
        for member in ("Action", "Resource"):
            values = listed(statement[member])
            for value in values if len(values) > 1 else []:
                less = copy.deepcopy(statements)
                less[number][member] = [other for other in values if other != value]
                if enough(less):
                    found.append(f"{member} {value} of {json.dumps(statement)}")
    return found
