"""What deploy_model, endpoints and those who ask models may do, by the code that enforces IAM in the local app.

`tests/integration/test_permissions.py` holds that deploy_model may do what it calls, and nothing else.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import boto3
import pytest
from fake_stack import ARTIFACTS, BUS, DATA, MODELS, PREFIX
from permissions import (
    ACCOUNT,
    KEY,
    REGION,
    Permission,
    allows,
    known_names,
    needless,
    of_bedrock,
    of_request,
    of_sagemaker,
    policies,
)
from template import Json, load_template, of_type, resolve

ENDPOINT, COMPONENT = f"{PREFIX}-base-0a1b2c3d", f"{PREFIX}-cars"
ALARMS = f"arn:aws:cloudwatch:{REGION}:{ACCOUNT}:alarm:"
RUNS = f"arn:aws:s3:::{ARTIFACTS}/runs/cars-0123456789ab"
ROLE = known_names()["ServingRole.Arn"]
TAGS = [{"Key": "tunedrop:prefix", "Value": PREFIX}]
TARGET = {
    "ServiceNamespace": "sagemaker",
    "ResourceId": f"inference-component/{ENDPOINT}",
    "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount",
}
MODEL, CONFIG, ON_ENDPOINT = {"ModelName": ENDPOINT}, {"EndpointConfigName": ENDPOINT}, {"EndpointName": ENDPOINT}
PART = {"InferenceComponentName": COMPONENT}
# What deploy_model asks for, in the members that decide about permissions.
SAGEMAKER: list[tuple[str, Json]] = [
    ("CreateModel", MODEL | {"ExecutionRoleArn": ROLE, "Tags": TAGS}),
    ("DescribeModel", MODEL),
    ("DeleteModel", MODEL),
    ("CreateEndpointConfig", CONFIG | {"ExecutionRoleArn": ROLE, "Tags": TAGS}),
    ("DescribeEndpointConfig", CONFIG),
    ("DeleteEndpointConfig", CONFIG),
    ("CreateEndpoint", ON_ENDPOINT | CONFIG | {"Tags": TAGS}),
    ("DescribeEndpoint", ON_ENDPOINT),
    ("DeleteEndpoint", ON_ENDPOINT),
    ("CreateInferenceComponent", PART | ON_ENDPOINT),
    ("DescribeInferenceComponent", PART),
    ("UpdateInferenceComponent", PART),
    ("UpdateInferenceComponentRuntimeConfig", PART),
    ("DeleteInferenceComponent", PART),
    ("InvokeEndpoint", PART | ON_ENDPOINT),
]
OTHERS: list[tuple[str, str, Json]] = [
    ("application-autoscaling", "register_scalable_target", TARGET | {"MinCapacity": 0, "MaxCapacity": 1}),
    ("application-autoscaling", "put_scaling_policy", TARGET | {"PolicyName": "idle", "PolicyType": "StepScaling"}),
    ("application-autoscaling", "deregister_scalable_target", TARGET),
    (
        "cloudwatch",
        "put_metric_alarm",
        {"AlarmName": f"{ENDPOINT}-idle", "EvaluationPeriods": 1, "ComparisonOperator": "LessThanThreshold"},
    ),
    ("cloudwatch", "delete_alarms", {"AlarmNames": [f"{ENDPOINT}-idle", f"{ENDPOINT}-wake"]}),
]


class SentError(Exception):
    """Keeps a request from being sent."""


def of_call(service: str, operation: str, request: Json) -> Iterator[Permission]:
    """Yield the permissions of the HTTP request that boto3 would send."""
    sent: list[Any] = []

    def keep(request: Any, **_: Any) -> None:
        sent.append(request)
        raise SentError

    client = boto3.client(service, region_name=REGION)
    client.meta.events.register_first("before-send", keep)
    with pytest.raises(SentError):
        getattr(client, operation)(**request)
    yield from of_request("Role", sent[0].method, sent[0].url, sent[0].headers, sent[0].body)


def of_calls(sagemaker: Iterable[tuple[str, Json]], others: Iterable[tuple[str, str, Json]]) -> list[Permission]:
    found = [permission for operation, request in sagemaker for permission in of_sagemaker("Role", operation, request)]
    return found + [permission for call in others for permission in of_call(*call)]


def of_another_stack(value: Any) -> Any:
    """The same request of a stack with another prefix and with a role of its own."""
    if isinstance(value, dict):
        return {name: of_another_stack(item) for name, item in value.items()}
    if isinstance(value, list):
        return [of_another_stack(item) for item in value]
    return value.replace(PREFIX, "other").replace("ServingRole", "OtherRole") if isinstance(value, str) else value


def policy(name: str) -> list[Json]:
    document = of_type(load_template(), "AWS::IAM::ManagedPolicy")[name]["PolicyDocument"]
    return resolve(document["Statement"], known_names())


# ---- deploy_model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [*SAGEMAKER, *OTHERS], ids=lambda call: call[-2])
def test_deploy_model_touches_nothing_of_another_stack(call: tuple[Any, ...]) -> None:
    """Application Auto Scaling makes up a target's ARN: what tells targets apart is what they scale."""
    *names, request = call
    other = of_another_stack(request)
    if names[0] == "application-autoscaling":
        other = request | {"ScalableDimension": "sagemaker:variant:DesiredInstanceCount"}
    given = policies()["DeployModelRole"]
    own, others = (
        of_calls([(names[0], each)], []) if len(names) == 1 else of_calls([], [(*names, each)]) for each in (request, other)
    )
    assert [p for p in own if not allows(given, p)] == []
    assert [p for p in others if allows(given, p) and p.action != "iam:CreateServiceLinkedRole"] == []


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("s3:PutObject", f"{RUNS}/result.json"),
        ("s3:GetObject", f"arn:aws:s3:::{DATA}/training_data/cars.jsonl"),
        ("sagemaker:UpdateModelPackage", f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:model-package/{MODELS}/1"),
        ("sagemaker:CreateTrainingJob", f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{PREFIX}-train-cars-1"),
        ("iam:PassRole", known_names()["SageMakerRole.Arn"]),
        ("cloudwatch:DeleteAlarms", f"{ALARMS}mine-dead-letters"),
    ],
)
def test_what_deploy_model_may_not_touch(action: str, resource: str) -> None:
    context = {"iam:PassedToService": "sagemaker.amazonaws.com"} if action == "iam:PassRole" else {}
    assert not allows(policies()["DeployModelRole"], Permission("Role", action, resource, context))


# ---- endpoints -------------------------------------------------------------------------------------------------------


def test_endpoints_have_what_sagemaker_needs_for_them_and_nothing_else() -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html#sagemaker-roles-createmodel-perms"""
    logs = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/InferenceComponents/{COMPONENT}:log-stream:1"
    image = f"arn:aws:ecr:{REGION}:763104351884:repository/vllm"
    # Subnets and security groups may be another account's, which shares them.
    network = [
        f"arn:aws:ec2:{REGION}:{ACCOUNT}:network-interface/*",
        f"arn:aws:ec2:{REGION}:210987654321:subnet/s-1",
        f"arn:aws:ec2:{REGION}:210987654321:security-group/g-1",
    ]
    ecr = ("BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer")
    changes = ("CreateNetworkInterfacePermission", "DeleteNetworkInterface", "DeleteNetworkInterfacePermission")
    looks = ("DhcpOptions", "NetworkInterfaces", "SecurityGroups", "Subnets", "Vpcs")
    needed = [
        Permission("Role", "s3:GetObject", f"arn:aws:s3:::{DATA}/models/base/config.json"),
        Permission("Role", "s3:ListBucket", f"arn:aws:s3:::{DATA}", {"s3:prefix": "models/base/"}),
        Permission("Role", "s3:GetObject", f"{RUNS}/training/job/output/model/adapter.tar.gz"),
        Permission("Role", "s3:ListBucket", f"arn:aws:s3:::{ARTIFACTS}", {"s3:prefix": "runs/cars-0123456789ab/"}),
        *(
            Permission("Role", f"logs:{action}", logs)
            for action in ("CreateLogGroup", "CreateLogStream", "DescribeLogStreams", "PutLogEvents")
        ),
        Permission("Role", "cloudwatch:PutMetricData", "*", {"cloudwatch:namespace": "/aws/sagemaker/InferenceComponents"}),
        *of_call("cloudwatch", "describe_alarms", {"AlarmNames": [f"{COMPONENT}-failed-requests"]}),
        Permission("Role", "ecr:GetAuthorizationToken", "*"),
        *(Permission("Role", f"ecr:{action}", image) for action in ecr),
        Permission("Role", "kms:Decrypt", KEY),
        *(Permission("Role", "ec2:CreateNetworkInterface", resource) for resource in network),
        *(Permission("Role", f"ec2:{action}", network[0]) for action in changes),
        *(Permission("Role", f"ec2:Describe{what}", "*") for what in looks),
    ]
    given = policies()["ServingRole"]
    assert [permission for permission in needed if not allows(given, permission)] == []
    assert needless(given, needed) == []


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("s3:GetObject", f"{DATA}/training_data/cars.jsonl"),
        ("s3:GetObject", f"{ARTIFACTS}/runs/cars-0123456789ab/input/train.jsonl"),
        ("s3:GetObject", f"{ARTIFACTS}/launch_plans/current.json"),
        ("s3:PutObject", f"{ARTIFACTS}/runs/cars-0123456789ab/training/job/output/model/adapter.tar.gz"),
        ("s3:PutObject", f"{DATA}/models/base/config.json"),
    ],
)
def test_what_an_endpoint_may_not_touch(action: str, resource: str) -> None:
    assert not allows(policies()["ServingRole"], Permission("Role", action, f"arn:aws:s3:::{resource}"))


def test_only_sagemaker_of_the_own_account_may_use_the_roles_for_sagemaker() -> None:
    roles = of_type(load_template(), "AWS::IAM::Role")
    assert roles["ServingRole"]["AssumeRolePolicyDocument"] == roles["SageMakerRole"]["AssumeRolePolicyDocument"]
    (statement,) = roles["ServingRole"]["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert statement["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}


# ---- Bedrock ---------------------------------------------------------------------------------------------------------

MODEL_ARN = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:imported-model/0123456789ab"


def test_deploy_model_deletes_and_asks_only_the_stacks_own_models() -> None:
    given = policies()["DeployModelRole"]
    for operation, member in (("DeleteImportedModel", "modelIdentifier"), ("InvokeModel", "modelId")):
        for prefix, allowed in ((PREFIX, True), ("other", False)):
            (permission,) = of_bedrock("Role", operation, {member: MODEL_ARN}, prefix)
            assert allows(given, permission) is allowed, (operation, prefix)


def test_deploy_model_imports_with_no_other_role_and_under_no_other_key() -> None:
    request = {"roleArn": known_names()["ServingRole.Arn"], "importedModelKmsKeyId": KEY[:-1] + "0"}
    denied = [p for p in of_bedrock("Role", "CreateModelImportJob", request) if not allows(policies()["DeployModelRole"], p)]
    assert {permission.action for permission in denied} == {"iam:PassRole", "kms:DescribeKey", "kms:CreateGrant"}


def test_import_jobs_read_merged_models_and_nothing_else() -> None:
    needed = [
        Permission("Role", "s3:GetObject", f"{RUNS}/training/job/output/model/merged/config.json"),
        Permission("Role", "s3:ListBucket", f"arn:aws:s3:::{ARTIFACTS}", {"s3:prefix": "runs/cars-0123456789ab/"}),
        Permission("Role", "kms:Decrypt", KEY),
    ]
    given = policies()["ImportRole"]
    assert [permission for permission in needed if not allows(given, permission)] == []
    assert needless(given, needed) == []
    assert not allows(given, Permission("Role", "s3:GetObject", f"{RUNS}/input/train.jsonl"))


def test_only_import_jobs_of_the_own_account_may_use_the_role_for_bedrock() -> None:
    (statement,) = of_type(load_template(), "AWS::IAM::Role")["ImportRole"]["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Principal"] == {"Service": "bedrock.amazonaws.com"}
    jobs = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-import-job/*"
    assert resolve(statement["Condition"], known_names()) == {
        "StringEquals": {"aws:SourceAccount": ACCOUNT},
        "ArnLike": {"aws:SourceArn": jobs},
    }


# ---- people ----------------------------------------------------------------------------------------------------------

ASKING: list[tuple[str, Json]] = [
    ("InvokeEndpoint", PART | ON_ENDPOINT),
    ("InvokeEndpointWithResponseStream", PART | ON_ENDPOINT),
    ("DescribeEndpoint", ON_ENDPOINT),
    ("DescribeInferenceComponent", PART),
]
ON_BEDROCK = ("InvokeModel", "InvokeModelWithResponseStream")


def test_people_with_the_policy_ask_the_stacks_models_and_no_others() -> None:
    given = policy("InvokeModelsPolicy")
    needed, others = (
        of_calls(asking, [])
        + [p for operation in ON_BEDROCK for p in of_bedrock("Role", operation, {"modelId": MODEL_ARN}, prefix)]
        for prefix, asking in (
            (PREFIX, ASKING),
            ("other", [(operation, of_another_stack(request)) for operation, request in ASKING]),
        )
    )
    assert [permission for permission in needed if not allows(given, permission)] == []
    assert needless(given, needed) == []
    assert [permission for permission in others if allows(given, permission)] == []


def test_people_who_may_ask_change_nothing() -> None:
    asked = {operation for operation, _ in ASKING}
    changes = of_calls([(operation, request) for operation, request in SAGEMAKER if operation not in asked], [])
    assert [p for p in changes if allows(policy("InvokeModelsPolicy"), p)] == []
    bus = f"arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{BUS}"
    assert not allows(policy("InvokeModelsPolicy"), Permission("Person", "events:PutEvents", bus))
