"""`tunedrop doctor`: no finding for a healthy stack, and exactly one finding for each trouble.

The stack is in moto. The test itself answers the calls that moto lacks: CloudFormation (moto accepts only a part of the
template), Service Quotas of SageMaker, a bucket's EventBridge configuration, and unconfirmed e-mail subscriptions. The
shapes of these answers are checked by botocore's models.
"""

import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.validate import validate_parameters
from click.testing import CliRunner
from fake_stack import plan_request
from moto import mock_aws
from template import TEMPLATE, Json, load_template, of_type, resolve

from tunedrop_cli.doctor.examine import ACTIONS, examine
from tunedrop_cli.doctor.finding import Finding
from tunedrop_cli.location import StackLocation
from tunedrop_cli.main import cli

REGION, ACCOUNT, NAME = "eu-central-1", "123456789012", "tunedrop"
STACK_ID = f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/{NAME}/0a1b2c3d-1111-2222-3333-444455556666"
DATA, ARTIFACTS = "tunedrop-databucket-1kq2w3e4r5t6y", "tunedrop-artifactbucket-9z8y7x6w5v4u"
MODEL = "SmolLM2-135M-Instruct"
EMAIL = "ops@example.com"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/trainer:v1"
TEMPLATE_DATA = load_template()
QUOTAS = {
    "ml.g6e.4xlarge for spot training job usage": "L-11111111",
    "ml.g5.4xlarge for spot training job usage": "L-22222222",
}
SERVING = {"ml.g5.xlarge for endpoint usage": "L-55555555"}
ON_DEMAND = {"ml.g6e.4xlarge for training job usage": "L-33333333", "ml.g5.4xlarge for training job usage": "L-44444444"}
(KEY_POLICY,) = re.findall(
    r"```json\n({(?:(?!```).)*?RolesOfThisAccount.*?)```",
    (TEMPLATE.parent / "docs" / "operations.md").read_text(),
    re.DOTALL,
)
TRUST = {
    "Version": "2012-10-17",
    "Statement": {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "x"}},
}


class Healthy:
    """A healthy stack with an e-mail address, a key, a secret, and an image of its own."""

    def __init__(self) -> None:
        self.parameters = {name: str(about.get("Default", "")) for name, about in TEMPLATE_DATA["Parameters"].items()}
        self.parameters |= {"NotificationEmail": EMAIL, "TrainingImageUri": IMAGE}
        self.status = "CREATE_COMPLETE"
        self.stack_events: list[Json] = []
        self.applied = dict.fromkeys(QUOTAS.values(), 2.0)  # quotas by code
        self.default: dict[str, float] = {}
        self.pending: set[str] = set()  # topics with unconfirmed subscriptions
        self.denied: set[str] = set()  # operations
        self.calls: set[str] = set()
        self.resources: list[tuple[str, str, str]] = []  # type, logical id, physical id
        self._make_key()
        made = self.client("secretsmanager").create_secret(Name="judges", SecretString="{}")
        self.secret: str = made["ARN"]
        self.parameters["RewardHttpSecretArn"] = self.secret
        self._make_buckets()
        self._make_events()
        self._make_functions()
        self.client("ecr").create_repository(repositoryName="trainer")
        for tag in ("v0", "v1"):
            manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
            self.client("ecr").put_image(repositoryName="trainer", imageTag=tag, imageManifest=json.dumps(manifest))
        self.release()
        self.calls.clear()

    @staticmethod
    @cache
    def client(service: str) -> Any:
        """Return a client that all stacks share: a new client reads the service's whole model."""
        return boto3.client(service, REGION)

    def _physical(self, kind: str, name_of: str) -> Iterator[tuple[str, str]]:
        """Record the template's resources of a type, and yield the logical and physical id of each."""
        known = {"AWS::StackName": NAME, "JobPrefix": NAME}
        for logical, properties in of_type(TEMPLATE_DATA, kind).items():
            name = resolve(properties[name_of], known) if name_of in properties else f"{NAME}-{logical}-1A2B3C4D5E6F"
            self.resources.append((kind, logical, name))
            yield logical, name

    def _make_key(self) -> None:
        for _, role in self._physical("AWS::IAM::Role", "RoleName"):
            self.client("iam").create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(TRUST))
        self.role = f"arn:aws:iam::{ACCOUNT}:role/{NAME}-SageMakerRole-1A2B3C4D5E6F"
        policy = KEY_POLICY.replace("ACCOUNT", ACCOUNT).replace("REGION", REGION).replace("PREFIX", NAME)
        self.key = self.client("kms").create_key(Policy=policy)["KeyMetadata"]["Arn"]
        self.parameters["KmsKeyArn"] = self.key

    def _make_buckets(self) -> None:
        for bucket in (DATA, ARTIFACTS):
            place = {"LocationConstraint": REGION}
            self.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration=place)
        self.notifications: Json = {"EventBridgeConfiguration": {}}
        for file in ("config.json", "tokenizer.json", "model.safetensors"):
            self.client("s3").put_object(Bucket=DATA, Key=f"models/{MODEL}/{file}", Body=b"{}")

    def _make_events(self) -> None:
        self.client("events").create_event_bus(Name=NAME)
        for function, properties in of_type(TEMPLATE_DATA, "AWS::Serverless::Function").items():
            for event, about in properties["Events"].items():
                logical = f"{function}{event}"
                rule = f"{NAME}-{logical}-1A2B3C4D5E6F"
                bus = "default" if about["Properties"].get("EventBusName", "default") == "default" else NAME
                pattern = json.dumps({"source": ["x"]})
                self.client("events").put_rule(Name=rule, EventBusName=bus, EventPattern=pattern)
                self.resources.append(("AWS::Events::Rule", logical, rule if bus == "default" else f"{bus}|{rule}"))
        self.topics = {}
        for logical, topic in self._physical("AWS::SNS::Topic", "TopicName"):
            self.topics[logical] = self.client("sns").create_topic(Name=topic)["TopicArn"]
            self.client("sns").subscribe(TopicArn=self.topics[logical], Protocol="email", Endpoint=EMAIL)
        for _, queue in self._physical("AWS::SQS::Queue", "QueueName"):
            self.queue = self.client("sqs").create_queue(QueueName=queue)["QueueUrl"]

    def _make_functions(self) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("app.py", "")
        for logical, function in self._physical("AWS::Serverless::Function", "FunctionName"):
            role = f"arn:aws:iam::{ACCOUNT}:role/{NAME}-{logical.removesuffix('Function')}Role-1A2B3C4D5E6F"
            code = {"ZipFile": archive.getvalue()}
            self.client("lambda").create_function(
                FunctionName=function, Runtime="python3.11", Role=role, Handler="app.handler", Code=code
            )
        self.resources = [
            (kind.replace("Serverless", "Lambda"), logical, physical) for kind, logical, physical in self.resources
        ]
        list(self._physical("AWS::Logs::LogGroup", "LogGroupName"))
        for logical, alarm in self._physical("AWS::CloudWatch::Alarm", "AlarmName"):
            about = of_type(TEMPLATE_DATA, "AWS::CloudWatch::Alarm")[logical]
            same = {name: about[name] for name in ("AlarmDescription", "MetricName", "Statistic", "Period")}
            numbers = {"EvaluationPeriods": 1, "Threshold": 0, "ComparisonOperator": "GreaterThanThreshold"}
            self.client("cloudwatch").put_metric_alarm(AlarmName=alarm, Namespace="AWS/Lambda", **same, **numbers)

    def release(self) -> None:
        """Store the launch plan of the stack's present outputs."""
        environment = {"EVENT_BUS": NAME, "REWARD_HTTP_SECRET_ARN": self.secret}
        plan: Json = {"digest": "f00d"}
        for kind in ("train", "test"):
            request = plan_request(kind) | {"RoleArn": self.role, "Environment": environment}
            request["AlgorithmSpecification"]["TrainingImage"] = self.outputs["TrainingImageUri"]
            request["OutputDataConfig"] = {"S3OutputPath": f"s3://{ARTIFACTS}/runs/", "KmsKeyId": self.key}
            plan[kind] = request
        self.put("launch_plans/f00d.json", plan)
        self.put("launch_plans/current.json", {"digest": "f00d"})

    def put(self, key: str, content: Json) -> None:
        self.client("s3").put_object(Bucket=ARTIFACTS, Key=key, Body=json.dumps(content).encode())

    def delete(self, bucket: str, key: str) -> None:
        self.client("s3").delete_object(Bucket=bucket, Key=key)

    @property
    def outputs(self) -> dict[str, str]:
        own = {
            "DataBucket": DATA,
            "ArtifactBucket": ARTIFACTS,
            "EventBusName": NAME,
            "RunTable": "tunedrop-RunTable-1A2B3C4D5E6F",
            "TopicArn": self.topics["Topic"],
            "AlarmTopicArn": self.topics["AlarmTopic"],
            "DeadLetterQueueUrl": self.queue,
            "SageMakerRoleArn": self.role,
            "ModelPackageGroup": "tunedrop-0a1b2c3d",
        }
        return {name: own.get(name, self.parameters.get(name, "")) for name in TEMPLATE_DATA["Outputs"]}

    # --- calls that moto lacks ---

    def answer(self, operation: str, arguments: Json) -> Json | None:
        """Return the answer to a call that moto lacks, None for other calls."""
        if operation == "DescribeStacks":
            if arguments["StackName"] != NAME:
                message = f"Stack with id {arguments['StackName']} does not exist"
                raise ClientError({"Error": {"Code": "ValidationError", "Message": message}}, operation)
            about = {"StackName": NAME, "StackId": STACK_ID, "StackStatus": self.status, "CreationTime": datetime.now(UTC)}
            parameters = [{"ParameterKey": name, "ParameterValue": value} for name, value in self.parameters.items()]
            outputs = [{"OutputKey": name, "OutputValue": value} for name, value in self.outputs.items()]
            return {"Stacks": [about | {"Parameters": parameters, "Outputs": outputs}]}
        if operation == "DescribeStackEvents":
            return {"StackEvents": self.stack_events}
        if operation == "ListStackResources":
            listed = [
                {
                    "ResourceType": kind,
                    "LogicalResourceId": logical,
                    "PhysicalResourceId": physical,
                    "ResourceStatus": "CREATE_COMPLETE",
                    "LastUpdatedTimestamp": datetime.now(UTC),
                }
                for kind, logical, physical in self.resources
            ]
            return {"StackResourceSummaries": listed}
        values = {"ListServiceQuotas": self.applied, "ListAWSDefaultServiceQuotas": self.default}.get(operation)
        if values is not None:
            codes = QUOTAS | ON_DEMAND | SERVING
            quotas = [
                {"ServiceCode": "sagemaker", "QuotaName": name, "QuotaCode": code, "Value": values[code], "Adjustable": True}
                for name, code in codes.items()
                if code in values
            ]
            # One on each page.
            page = int(arguments.get("NextToken", 0))
            more = {"NextToken": str(page + 1)} if page + 1 < len(quotas) else {}
            return {"Quotas": quotas[page : page + 1], **more}
        if operation == "GetBucketNotificationConfiguration":
            return self.notifications
        if operation == "ListSubscriptionsByTopic" and arguments["TopicArn"] in self.pending:
            there = {"SubscriptionArn": "PendingConfirmation", "Protocol": "email", "Endpoint": EMAIL, "Owner": ACCOUNT}
            return {"Subscriptions": [there | {"TopicArn": arguments["TopicArn"]}]}
        return None

    def examine(self, name: str = NAME) -> list[Finding]:
        options = {"region": REGION}
        return examine(
            StackLocation(lambda _, service: self.client(service), name, True, options, {"stack": name, **options})
        )


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Healthy]:
    make_api_call = BaseClient._make_api_call
    made: list[Healthy] = []

    def call(client: Any, operation: str, arguments: Json) -> Any:
        stack = made[0] if made else None
        if stack is None:
            return make_api_call(client, operation, arguments)
        stack.calls.add(operation)
        if operation in stack.denied:
            raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, operation)
        answer = stack.answer(operation, arguments)
        if answer is None:
            return make_api_call(client, operation, arguments)
        shape = client.meta.service_model.operation_model(operation).output_shape
        validate_parameters(answer, shape)
        return answer

    monkeypatch.setattr(BaseClient, "_make_api_call", call)
    with mock_aws():
        made.append(Healthy())
        yield made[0]


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def test_nothing_is_said_of_a_healthy_stack(stack: Healthy) -> None:
    assert stack.examine() == []
    # The permission of every call is documented.
    assert stack.calls == ACTIONS.keys() - {"DescribeStackEvents", "ListAWSDefaultServiceQuotas"}


def test_a_hub_id_needs_no_files_and_no_key_needs_no_policy(stack: Healthy) -> None:
    stack.parameters |= {"BaseModel": "HuggingFaceTB/SmolLM2-135M-Instruct", "KmsKeyArn": "", "NotificationEmail": ""}
    stack.key = ""
    stack.release()
    stack.delete(DATA, f"models/{MODEL}/config.json")
    assert stack.examine() == []


# --- one trouble each ---


def without_statement(sid: str) -> Callable[[Healthy], None]:
    """Remove a statement from the key's policy."""

    def do(stack: Healthy) -> None:
        policy = json.loads(stack.client("kms").get_key_policy(KeyId=stack.key, PolicyName="default")["Policy"])
        policy["Statement"] = [statement for statement in policy["Statement"] if statement["Sid"] != sid]
        stack.client("kms").put_key_policy(
            KeyId=stack.key.rpartition("/")[2], PolicyName="default", Policy=json.dumps(policy)
        )

    return do


def key_of_another_stack(stack: Healthy) -> None:
    """A user left the placeholder of docs/operations.md in the condition."""
    policy = stack.client("kms").get_key_policy(KeyId=stack.key, PolicyName="default")["Policy"]
    policy = policy.replace("/aws/lambda/tunedrop-*", "/aws/lambda/PREFIX-*")
    stack.client("kms").put_key_policy(KeyId=stack.key.rpartition("/")[2], PolicyName="default", Policy=policy)


def on_demand(stack: Healthy, **values: float) -> None:
    stack.parameters |= {"UseSpot": "false", "InstanceTypes": ",".join(f"ml.{kind}.4xlarge" for kind in values)}
    stack.applied = {ON_DEMAND[f"ml.{kind}.4xlarge for training job usage"]: value for kind, value in values.items()}


def no_quotas(stack: Healthy) -> None:
    on_demand(stack, g5=0)
    stack.applied.clear()


def set_status(status: str, *events: tuple[str, str, str]) -> Callable[[Healthy], None]:
    """Put the stack into a status. Its events are logical id, status and reason, newest first."""

    def do(stack: Healthy) -> None:
        stack.status = status
        stack.stack_events = [
            {
                "StackId": STACK_ID,
                "EventId": str(number),
                "StackName": NAME,
                "Timestamp": datetime.now(UTC),
                "LogicalResourceId": logical,
                "ResourceStatus": status,
                "ResourceStatusReason": reason,
            }
            for number, (logical, status, reason) in enumerate(events)
        ]

    return do


def error_of(function: str) -> Callable[[Healthy], None]:
    def do(stack: Healthy) -> None:
        datum = {
            "MetricName": "Errors",
            "Dimensions": [{"Name": "FunctionName", "Value": f"{NAME}-{function}"}],
            "Value": 3,
            "Timestamp": datetime.now(UTC) - timedelta(hours=2),
        }
        stack.client("cloudwatch").put_metric_data(Namespace="AWS/Lambda", MetricData=[datum])

    return do


def parameter(name: str, value: str) -> Callable[[Healthy], None]:
    return lambda stack: stack.parameters.update({name: value})


def rule(do: str, logical: str, bus: str) -> Callable[[Healthy], None]:
    return lambda stack: getattr(stack.client("events"), f"{do}_rule")(
        Name=f"{NAME}-{logical}-1A2B3C4D5E6F", EventBusName=bus
    )


def new_image(uri: str) -> Callable[[Healthy], None]:
    def do(stack: Healthy) -> None:
        stack.parameters["TrainingImageUri"] = uri
        stack.release()

    return do


FAILED = (
    ("DataBucket", "CREATE_FAILED", "tunedrop already exists"),
    ("Topic", "CREATE_FAILED", "Resource creation cancelled"),
)
BEGUN = (NAME, "CREATE_IN_PROGRESS", "User Initiated")
# A change of the stack, the code of its finding, and a part of the finding's text.
TROUBLES: list[tuple[Callable[[Healthy], Any], str, str]] = [
    (
        set_status("ROLLBACK_COMPLETE", *FAILED[::-1], BEGUN),
        "STACK_STATE",
        "First failure: DataBucket: tunedrop already exists",
    ),
    (
        set_status("ROLLBACK_COMPLETE", *FAILED[::-1], BEGUN),
        "STACK_STATE",
        "aws cloudformation delete-stack --stack-name tunedrop",
    ),
    (set_status("UPDATE_ROLLBACK_COMPLETE"), "STACK_STATE", "the last deploy failed, and the earlier stack was restored"),
    (
        set_status("UPDATE_ROLLBACK_FAILED"),
        "STACK_STATE",
        "continue-update-rollback --stack-name tunedrop --region eu-central-1",
    ),
    (set_status("REVIEW_IN_PROGRESS"), "STACK_STATE", "answer yes"),
    (set_status("UPDATE_IN_PROGRESS", BEGUN), "STACK_STATE", "Wait"),
    (
        lambda stack: stack.delete(ARTIFACTS, "launch_plans/current.json"),
        "PLAN_MISSING",
        "python -m release --stack tunedrop",
    ),
    (lambda stack: stack.delete(ARTIFACTS, "launch_plans/f00d.json"), "PLAN_MISSING", "launch_plans/f00d.json is missing"),
    (
        parameter("TrainingImageUri", IMAGE.replace("v1", "v0")),
        "PLAN_OUTDATED",
        f"TrainingImageUri is '{IMAGE[:-1]}0' and was",
    ),
    (parameter("VpcSubnetIds", "subnet-1,subnet-2"), "PLAN_OUTDATED", "VpcSubnetIds is 'subnet-1,subnet-2' and was ''"),
    (parameter("VpcSecurityGroupIds", "sg-1"), "PLAN_OUTDATED", "VpcSecurityGroupIds"),
    (parameter("EnableNetworkIsolation", "true"), "PLAN_OUTDATED", "EnableNetworkIsolation is 'true' and was 'false'"),
    (parameter("EnableInterContainerTrafficEncryption", "true"), "PLAN_OUTDATED", "EnableInterContainerTrafficEncryption"),
    (parameter("KmsKeyArn", ""), "PLAN_OUTDATED", "KmsKeyArn is '' and was 'arn:aws:kms:"),
    (parameter("RewardHttpHosts", "example.com"), "PLAN_OUTDATED", "RewardHttpHosts is 'example.com' and was ''"),
    (parameter("RewardHttpSecretArn", ""), "PLAN_OUTDATED", "RewardHttpSecretArn is '' and was 'arn:aws:secretsmanager:"),
    (lambda stack: setattr(stack, "role", f"{stack.role}2"), "PLAN_OUTDATED", "SageMakerRoleArn is 'arn:aws:iam:"),
    (lambda stack: stack.delete(DATA, f"models/{MODEL}/tokenizer.json"), "MODEL_INCOMPLETE", "lacks tokenizer.json in"),
    (
        parameter("BaseModel", "Qwen3-0.6B"),
        "MODEL_MISSING",
        f"aws s3 sync ./Qwen3-0.6B s3://{DATA}/models/Qwen3-0.6B/ --region",
    ),
    (
        lambda stack: stack.notifications.clear(),
        "BUCKET_EVENTS_OFF",
        f"put-bucket-notification-configuration --bucket {DATA}",
    ),
    (
        rule("disable", "ValidateDatasetFunctionUploaded", "default"),
        "RULE_DISABLED",
        "aws events enable-rule --name tunedrop-Vali",
    ),
    (rule("disable", "StartTrainingFunctionAnnounced", NAME), "RULE_DISABLED", "--event-bus-name tunedrop"),
    (rule("delete", "ReconcileFunctionInterval", "default"), "RULE_MISSING", "ReconcileFunctionInterval"),
    (lambda stack: stack.pending.add(stack.topics["Topic"]), "SUBSCRIPTION_UNCONFIRMED", f"{EMAIL} has not confirmed"),
    (lambda stack: stack.pending.add(stack.topics["AlarmTopic"]), "SUBSCRIPTION_UNCONFIRMED", "AlarmTopic"),
    (error_of("test-model"), "FUNCTION_ERRORS", "tunedrop-test-model failed 3 times"),
    (error_of("test-model"), "FUNCTION_ERRORS", "aws logs tail /aws/lambda/tunedrop-test-model --since 24h"),
    (
        lambda stack: stack.client("sqs").send_message(QueueUrl=stack.queue, MessageBody="{}"),
        "DEAD_LETTERS",
        "tunedrop redrive --stack tunedrop --region eu-central-1",
    ),
    (
        lambda stack: stack.client("cloudwatch").set_alarm_state(
            AlarmName=f"{NAME}-old-runs", StateValue="ALARM", StateReason="old"
        ),
        "ALARM",
        "tunedrop-old-runs is on. A run has been open",
    ),
    (without_statement("RolesOfThisAccount"), "KEY_POLICY", "does not allow the account's roles: kms:Encrypt, kms:Decrypt"),
    (without_statement("LogGroups"), "KEY_POLICY", "does not allow CloudWatch Logs: kms:"),
    (without_statement("Alarms"), "KEY_POLICY", "does not allow alarms: kms:Decrypt, kms:GenerateDataKey."),
    (key_of_another_stack, "KEY_POLICY", "does not allow CloudWatch Logs: kms:"),
    (lambda stack: stack.client("kms").disable_key(KeyId=stack.key.rpartition("/")[2]), "KEY_STATE", "aws kms enable-key"),
    (
        lambda stack: stack.client("secretsmanager").delete_secret(SecretId=stack.secret, ForceDeleteWithoutRecovery=True),
        "SECRET_MISSING",
        "There is no secret arn:aws:secretsmanager:",
    ),
    (
        lambda stack: stack.client("secretsmanager").delete_secret(SecretId=stack.secret),
        "SECRET_DELETED",
        "aws secretsmanager restore-secret --secret-id arn:aws:secretsmanager:",
    ),
    (lambda stack: on_demand(stack, g6e=0), "QUOTA_ZERO", "'ml.g6e.4xlarge for training job usage' (L-33333333) is 0"),
    (
        lambda stack: on_demand(stack, g5=0),
        "QUOTA_ZERO",
        "service-quotas request-service-quota-increase --service-code sagemaker --quota-code L-44444444 --desired-value 2",
    ),
    (
        no_quotas,
        "QUOTA_UNKNOWN",
        "no quota 'ml.g5.4xlarge for training job usage' in eu-central-1",
    ),
    (new_image(IMAGE.replace(REGION, "us-east-1")), "IMAGE_PLACE", "is in us-east-1, and the stack in eu-central-1"),
    (new_image("docker.io/library/python:3.12"), "IMAGE_PLACE", "is not in ECR"),
    (new_image(IMAGE.replace("v1", "v2")), "IMAGE_MISSING", "There is no image"),
    (new_image(f"{IMAGE.removesuffix(':v1')}@sha256:{'0' * 64}"), "IMAGE_MISSING", "There is no image"),
    (new_image(IMAGE.replace("trainer", "other")), "IMAGE_MISSING", "There is no image"),
    (
        lambda stack: stack.client("lambda").delete_function(FunctionName=f"{NAME}-reconcile"),
        "REFUSED",
        "GetFunctionConfiguration",
    ),
]


@pytest.mark.parametrize(("trouble", "code", "part"), TROUBLES)
def test_a_trouble_is_found_and_nothing_else(
    stack: Healthy, trouble: Callable[[Healthy], Any], code: str, part: str
) -> None:
    trouble(stack)
    (finding,) = stack.examine()
    assert (finding.code, finding.trouble) == (code, True)
    assert part in f"{finding.what} {finding.do}"


def test_every_output_of_the_stack_that_a_plan_is_made_of_is_compared(stack: Healthy) -> None:
    from release.target import ENVIRONMENT

    said = " ".join(part for _, code, part in TROUBLES if code == "PLAN_OUTDATED")
    compared = {"TrainingImageUri", "SageMakerRoleArn", "KmsKeyArn", "VpcSubnetIds", "VpcSecurityGroupIds"}
    assert all(name in said for name in compared)
    assert set(ENVIRONMENT.values()) <= TEMPLATE_DATA["Outputs"].keys()


def test_a_stack_that_is_not_there(stack: Healthy) -> None:
    (finding,) = stack.examine("other")
    assert (finding.code, finding.what) == ("STACK_MISSING", "There is no stack 'other' in eu-central-1.")


def test_a_stack_of_another_template(stack: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Healthy, "outputs", {"DataBucket": DATA})
    (finding,) = stack.examine()
    assert (finding.code, "'ArtifactBucket'" in finding.what) == ("STACK_FOREIGN", True)


def test_an_address_that_does_not_subscribe_any_more(stack: Healthy) -> None:
    stack.parameters["NotificationEmail"] = "new@example.com"
    assert codes(stack.examine()) == ["SUBSCRIPTION_GONE"] * 2


def test_functions_that_cannot_be_invoked(stack: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"State": "Failed", "StateReason": "the key cannot be used"}
    answer = Healthy.answer

    def with_broken(self: Healthy, operation: str, arguments: Json) -> Json | None:
        if operation == "GetFunctionConfiguration" and arguments["FunctionName"] == f"{NAME}-reconcile":
            return broken
        return answer(self, operation, arguments)

    monkeypatch.setattr(Healthy, "answer", with_broken)
    (finding,) = stack.examine()
    assert (finding.code, finding.what) == (
        "FUNCTION_STATE",
        "The function tunedrop-reconcile is Failed: the key cannot be used",
    )
    broken |= {"State": "Active", "LastUpdateStatus": "Failed", "LastUpdateStatusReason": "no such layer"}
    (finding,) = stack.examine()
    assert (finding.code, "no such layer" in finding.what) == ("FUNCTION_STATE", True)


# --- quotas ---


def test_with_spot_one_type_with_room_is_enough(stack: Healthy) -> None:
    stack.applied = {"L-11111111": 0, "L-22222222": 2}
    (finding,) = stack.examine()
    assert (finding.code, finding.trouble) == ("QUOTA_ZERO", False)
    assert "The other types work." in finding.what
    stack.applied = {"L-11111111": 0, "L-22222222": 0}
    assert [(finding.code, finding.trouble) for finding in stack.examine()] == [("QUOTA_ZERO", True)] * 2


def test_on_demand_too_since_each_type_is_tried_alone_after_a_refusal(stack: Healthy) -> None:
    on_demand(stack, g6e=0, g5=4)
    (finding,) = stack.examine()
    assert (finding.code, finding.trouble) == ("QUOTA_ZERO", False)


def test_a_quota_below_the_jobs_at_a_time_is_worth_knowing(stack: Healthy) -> None:
    stack.applied = {"L-11111111": 1, "L-22222222": 2}
    (finding,) = stack.examine()
    assert (finding.code, finding.trouble) == ("QUOTA_LOW", False)


def test_a_quota_without_a_value_of_the_account_is_the_default(stack: Healthy) -> None:
    stack.applied, stack.default = {"L-11111111": 2}, {"L-11111111": 0, "L-22222222": 0}
    (finding,) = stack.examine()
    assert "'ml.g5.4xlarge for spot training job usage' (L-22222222) is 0" in finding.what
    stack.denied = {"ListAWSDefaultServiceQuotas"}
    assert codes(stack.examine()) == ["NOT_ALLOWED"]


@pytest.mark.parametrize(("value", "code"), [(2.0, None), (1.0, "QUOTA_LOW"), (0.0, "QUOTA_ZERO"), (None, "QUOTA_UNKNOWN")])
def test_a_stack_that_serves_needs_instances_for_endpoints(stack: Healthy, value: float | None, code: str | None) -> None:
    stack.parameters |= {"EndpointInstanceType": "ml.g5.xlarge", "EndpointMaxInstances": "2"}
    if value is not None:
        stack.applied["L-55555555"] = value
    findings = [finding for finding in stack.examine() if "for endpoint usage" in finding.what]
    assert [(finding.code, finding.trouble) for finding in findings] == ([(code, code != "QUOTA_LOW")] if code else [])


# --- permissions ---


def test_a_missing_permission_is_named(stack: Healthy) -> None:
    for operation in ACTIONS.keys() - {"DescribeStackEvents", "ListAWSDefaultServiceQuotas"}:
        stack.denied = {operation}
        (finding,) = stack.examine()
        assert (finding.code, ACTIONS[operation] in finding.what) == ("NOT_ALLOWED", True)
        assert finding.trouble == (operation == "DescribeStacks")  # then nothing is known


def test_a_check_that_finds_no_service_is_left_out(stack: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(self: Healthy, operation: str, arguments: Json) -> Json | None:
        if operation == "ListServiceQuotas":
            raise EndpointConnectionError(endpoint_url="https://servicequotas.eu-central-1.amazonaws.com/")
        return answer(self, operation, arguments)

    answer = Healthy.answer
    monkeypatch.setattr(Healthy, "answer", nobody)
    (finding,) = stack.examine()
    assert (finding.code, finding.trouble) == ("NOT_REACHED", False)


def test_the_documentation_lists_the_permissions() -> None:
    operations = (TEMPLATE.parent / "docs" / "operations.md").read_text()
    assert [action for action in ACTIONS.values() if f"`{action}`" not in operations] == []


# --- the command ---


def doctor(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["doctor", *arguments])
    return done.exit_code, done.output


def test_the_command_says_nothing_is_wrong(stack: Healthy) -> None:
    assert doctor("--region", REGION) == (0, "tunedrop: nothing is wrong.\n")
    code, output = doctor("--region", REGION, "--json")
    assert (code, json.loads(output)) == (0, {"version": 1, "ok": True, "findings": []})


def test_the_command_in_json(stack: Healthy) -> None:
    stack.notifications.clear()
    stack.denied = {"ListServiceQuotas"}
    code, output = doctor("--region", REGION, "--json")
    shown = json.loads(output)
    assert (code, shown["ok"]) == (1, False)
    assert [(each["code"], each["trouble"]) for each in shown["findings"]] == [
        ("BUCKET_EVENTS_OFF", True),
        ("NOT_ALLOWED", False),
    ]


def test_what_cannot_be_reached_is_said_in_json_as_well(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for arguments in (["--profile", "nobody"], []):
        done = CliRunner().invoke(cli, ["--state", str(tmp_path), "doctor", "--json", *arguments])
        assert (done.exit_code, codes_of_json(done.output)) == (1, ["NOT_REACHED"])
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "specify a region" in doctor("--stack", "tunedrop")[1]


def codes_of_json(output: str) -> list[str]:
    return [finding["code"] for finding in json.loads(output)["findings"]]


def test_the_readme_shows_what_is_said_in_the_first_hour(stack: Healthy) -> None:
    """A new account after the first deploy: no quota, no base model, unconfirmed e-mail."""
    stack.applied, stack.default = {}, dict.fromkeys(QUOTAS.values(), 0.0)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        stack.delete(DATA, f"models/{MODEL}/{file}")
    stack.pending = {stack.topics["Topic"]}
    code, output = doctor("--stack", "tunedrop", "--region", REGION)
    assert code == 1
    readme = (TEMPLATE.parent / "README.md").read_text()
    assert f"$ tunedrop doctor --stack tunedrop --region {REGION}\n{output}```" in readme, output


def test_it_loads_no_sdk_and_no_torch() -> None:
    heavy = ("torch", "sagemaker", "transformers")
    program = f"import sys, tunedrop_cli.doctor.examine; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
