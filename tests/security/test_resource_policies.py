"""What buckets, queue and topics let in, by the code that enforces IAM in the local app."""

from typing import Any

import pytest
from ministack.core.iam_evaluator import EvalContext, evaluate_resource_policy
from permissions import ACCOUNT, REGION, known_names
from template import load_template, of_type, resolve


class Names(dict[str, str]):
    """The names of the stack; what is not among them is one of its rules."""

    def __missing__(self, name: str) -> str:
        return f"arn:aws:events:{REGION}:{ACCOUNT}:rule/tunedrop-{name.removesuffix('.Arn')}"


KNOWN = Names(known_names(prefix="mine"))  # the stack itself is named tunedrop
TEMPLATE = load_template()
OURS, THEIRS = f"arn:aws:iam::{ACCOUNT}:role/somebody", "arn:aws:iam::999999999999:role/somebody"


def policy_of(kind: str, target: str) -> dict[str, Any]:
    """The policy document of a bucket, queue or topic, by the target's logical id, in a stack that serves models."""
    member = {"AWS::S3::BucketPolicy": "Bucket", "AWS::SQS::QueuePolicy": "Queues", "AWS::SNS::TopicPolicy": "Topics"}[kind]
    (found,) = [p for p in of_type(TEMPLATE, kind).values() if p[member] in ({"Ref": target}, [{"Ref": target}])]
    return resolve(found["PolicyDocument"], KNOWN, {"ServesModels": True})


def decide(
    policy: dict[str, Any],
    action: str,
    resource: str,
    principal: str = OURS,
    *,
    tls: bool = True,
    service: str = "",
    **keys: str,
) -> str:
    context = EvalContext(
        principal_arn="*" if service else principal,
        principal_type="Service" if service else "AssumedRole",
        principal_account="" if service else principal.split(":")[4],
        action=action,
        resource_arn=resource,
        region=REGION,
        secure_transport=tls,
        service_context={"aws:principalisawsservice": str(bool(service)).lower()}
        | {key.replace("_", ":"): value for key, value in keys.items()},
    )
    return evaluate_resource_policy(policy, context, service=service or None).decision


@pytest.mark.parametrize("bucket", ["DataBucket", "ArtifactBucket"])
@pytest.mark.parametrize("action", ["s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObjectVersion"])
def test_buckets_refuse_plain_http_and_foreign_accounts(bucket: str, action: str) -> None:
    policy = policy_of("AWS::S3::BucketPolicy", bucket)
    arn = KNOWN[f"{bucket}.Arn"]
    resource = arn if action == "s3:ListBucket" else f"{arn}/runs/cars-0123456789ab/result.json"
    assert decide(policy, action, resource) != "Deny"  # the own account's policies decide
    assert decide(policy, action, resource, tls=False) == "Deny"
    assert decide(policy, action, resource, THEIRS) == "Deny"
    assert decide(policy, action, resource, service="sagemaker.amazonaws.com") != "Deny"
    assert decide(policy, action, resource, service="sagemaker.amazonaws.com", tls=False) == "Deny"


@pytest.mark.parametrize("bucket", ["DataBucket", "ArtifactBucket"])
def test_buckets_have_no_public_way_in(bucket: str) -> None:
    properties = of_type(TEMPLATE, "AWS::S3::Bucket")[bucket]
    assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(properties["PublicAccessBlockConfiguration"]) == 4
    assert properties["OwnershipControls"] == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    assert all(s["Effect"] == "Deny" for s in policy_of("AWS::S3::BucketPolicy", bucket)["Statement"])


def test_only_the_own_rules_put_dead_letters() -> None:
    policy, queue = policy_of("AWS::SQS::QueuePolicy", "DeadLetterQueue"), KNOWN["DeadLetterQueue.Arn"]
    events: dict[str, Any] = {"service": "events.amazonaws.com"}
    own, other = KNOWN["ReconcileFunctionInterval.Arn"], f"arn:aws:events:{REGION}:{ACCOUNT}:rule/other"
    for ours in (own, KNOWN["DeployModelFunctionInterval.Arn"]):
        assert decide(policy, "sqs:SendMessage", queue, **events, aws_sourcearn=ours) == "Allow"
    assert decide(policy, "sqs:SendMessage", queue, **events, aws_sourcearn=other) != "Allow"
    assert decide(policy, "sqs:ReceiveMessage", queue, **events, aws_sourcearn=own) != "Allow"
    assert decide(policy, "sqs:SendMessage", queue, tls=False) == "Deny"


def test_only_the_own_alarms_are_announced() -> None:
    policy, topic = policy_of("AWS::SNS::TopicPolicy", "AlarmTopic"), KNOWN["AlarmTopic"]
    alarms = f"arn:aws:cloudwatch:{REGION}:{ACCOUNT}:alarm:"
    ours: dict[str, Any] = {"service": "cloudwatch.amazonaws.com", "aws_sourceaccount": ACCOUNT}
    for name in ("tunedrop-dead-letters", "mine-cars-errors"):  # the stack's, and an endpoint's
        assert decide(policy, "sns:Publish", topic, **ours, aws_sourcearn=f"{alarms}{name}") == "Allow"
    assert decide(policy, "sns:Publish", topic, **ours, aws_sourcearn=f"{alarms}other-dead-letters") != "Allow"
    foreign = ours | {"aws_sourceaccount": "999999999999"}
    assert decide(policy, "sns:Publish", topic, **foreign, aws_sourcearn=f"{alarms}tunedrop-dead-letters") != "Allow"
    assert decide(policy, "sns:Publish", topic, THEIRS) != "Allow"
    assert decide(policy, "sns:Publish", topic, tls=False) == "Deny"
