"""One contract test for each behaviour that `local_app.aws` adds to MiniStack."""

import hashlib
import json
import re
import urllib.error
import urllib.request
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from neighbour import send, signed
from template import load_template

from tunedrop.rewards import RewardError
from tunedrop.rewards.aws import HostTokens
from tunedrop_cli.redrive import redrive

from .conftest import Emulators, wait_for

Json = dict[str, Any]

# The functions under test write down their event, then do what the event says.
FUNCTION = """
import json, os, sys, time, importlib.util

def handler(event, context):
    with open(os.environ["NOTES"], "a") as notes:
        seen = {name: importlib.util.find_spec(name) is not None for name in ("boto3", "psutil", "tunedrop")}
        notes.write(json.dumps({"event": event, "modules": seen, "environment": dict(os.environ)}) + "\\n")
    order = event.get("detail", {})
    if order.get("fail"):
        raise ValueError("as ordered")
    if order.get("fail_until") and not os.path.exists(order["fail_until"]):
        raise ValueError("not yet")
    if order.get("die"):
        os._exit(1)
    if order.get("hang_once") and not os.path.exists(order["hang_once"]):
        open(order["hang_once"], "w").close()
        time.sleep(60)
"""


def template(notes: Path) -> str:
    """A bucket and a bus whose events reach a function, and rules that cannot deliver."""

    def rule(pattern: Json, function: Json) -> Json:
        target = {"Id": "it", "Arn": function, "DeadLetterConfig": {"Arn": {"Fn::GetAtt": ["Queue", "Arn"]}}}
        return {"Type": "AWS::Events::Rule", "Properties": {"EventPattern": pattern, "Targets": [target]}}

    def function(name: str) -> Json:
        properties = {
            "Runtime": "python3.13",
            "Handler": "index.handler",
            "Role": {"Fn::GetAtt": ["Role", "Arn"]},
            "Code": {"ZipFile": FUNCTION},
            "Timeout": 90,
            "Environment": {"Variables": {"NOTES": str(notes)}},
        }
        return {"Type": "AWS::Lambda::Function", "Properties": properties}

    arn = {"Fn::GetAtt": ["Function", "Arn"]}
    trust = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "lambda.amazonaws.com"}}
    rules = {
        "Jobs": rule({"source": ["aws.sagemaker"]}, arn),
        "Uploads": rule({"source": ["aws.s3"], "detail": {"bucket": {"name": [{"Ref": "Bucket"}]}}}, arn),
        "Forbidden": rule({"source": ["aws.sagemaker"], "detail": {"forbidden": [True]}}, {"Fn::GetAtt": ["Other", "Arn"]}),
        "Missing": rule(
            {"source": ["aws.sagemaker"], "detail": {"missing": [True]}},
            {"Fn::Sub": "arn:aws:lambda:${AWS::Region}:${AWS::AccountId}:function:no-such-function"},
        ),
    }
    permissions = {
        f"{name}Permission": {
            "Type": "AWS::Lambda::Permission",
            "Properties": {
                "Action": "lambda:InvokeFunction",
                "FunctionName": {"Ref": "Function"},
                "Principal": "events.amazonaws.com",
                "SourceArn": {"Fn::GetAtt": [name, "Arn"]},
            },
        }
        for name in ("Jobs", "Uploads")
    }
    on_failure = {
        "FunctionName": {"Ref": "Function"},
        "Qualifier": "$LATEST",
        "MaximumRetryAttempts": 2,
        "DestinationConfig": {"OnFailure": {"Destination": {"Fn::GetAtt": ["Queue", "Arn"]}}},
    }
    bucket = {
        "VersioningConfiguration": {"Status": "Enabled"},
        "NotificationConfiguration": {"EventBridgeConfiguration": {"EventBridgeEnabled": True}},
    }
    resources = {
        "Queue": {"Type": "AWS::SQS::Queue"},
        "Bucket": {"Type": "AWS::S3::Bucket", "Properties": bucket},
        "Role": {
            "Type": "AWS::IAM::Role",
            "Properties": {"AssumeRolePolicyDocument": {"Version": "2012-10-17", "Statement": [trust]}},
        },
        "Function": function("Function"),
        "Other": function("Other"),
        "Invocations": {"Type": "AWS::Lambda::EventInvokeConfig", "Properties": on_failure},
        **rules,
        **permissions,
    }
    outputs = {
        "Bucket": {"Value": {"Ref": "Bucket"}},
        "Queue": {"Value": {"Ref": "Queue"}},
        "Function": {"Value": {"Ref": "Function"}},
    }
    return json.dumps({"Resources": resources, "Outputs": outputs})


class Deployed:
    def __init__(self, emulators: Emulators) -> None:
        self.emulators = emulators
        self.notes_file = emulators.folder / "notes.jsonl"
        cloudformation = emulators.client("cloudformation")
        capabilities = ["CAPABILITY_IAM"]
        cloudformation.create_stack(StackName="probe", TemplateBody=template(self.notes_file), Capabilities=capabilities)
        cloudformation.get_waiter("stack_create_complete").wait(StackName="probe", WaiterConfig={"Delay": 0.1})
        (stack,) = cloudformation.describe_stacks(StackName="probe")["Stacks"]
        self.outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}

    def notes(self, event_id: str) -> list[Json]:
        """The function's notes about the event with this id."""
        lines = self.notes_file.read_text().splitlines() if self.notes_file.exists() else []
        return [note for line in lines if (note := json.loads(line))["event"].get("id") == event_id]

    def post_job_event(self, **detail: Any) -> str:
        event = job_event(detail)
        assert self.emulators.post_event(event) == (200, {"id": event["id"]})
        return str(event["id"])

    def dead_letter(self, about: str) -> Json:
        """Wait for the message whose body mentions `about`, and take it from the queue."""
        sqs = self.emulators.client("sqs")

        def taken() -> Json | None:
            got = sqs.receive_message(QueueUrl=self.outputs["Queue"], MessageAttributeNames=["All"], VisibilityTimeout=0)
            return next((message for message in got.get("Messages", []) if about in message["Body"]), None)

        message: Json = wait_for(taken)
        sqs.delete_message(QueueUrl=self.outputs["Queue"], ReceiptHandle=message["ReceiptHandle"])
        return message


def job_event(detail: Json) -> Json:
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "SageMaker Training Job State Change",
        "source": "aws.sagemaker",
        "account": "000000000000",
        "time": "2026-01-02T03:04:05Z",
        "region": "us-east-1",
        "resources": ["arn:aws:sagemaker:us-east-1:000000000000:training-job/job"],
        "detail": detail,
    }


@pytest.fixture(scope="session")
def deployed(emulators: Emulators) -> Deployed:
    return Deployed(emulators)


def test_a_rule_that_is_too_complex_is_refused_by_put_rule_and_by_cloudformation(emulators: Emulators) -> None:
    suffixes = ".jsonl .json .csv .jsonl.gz .json.gz .csv.gz .parquet".split()
    pattern = {"detail": {"object": {"key": [{"wildcard": f"training_data/*{suffix}"} for suffix in suffixes]}}}
    events, cloudformation = emulators.client("events"), emulators.client("cloudformation")
    with pytest.raises(ClientError, match="Reason: Rule is too complex") as refused:
        events.put_rule(Name="complex", EventPattern=json.dumps(pattern))
    assert refused.value.response["Error"]["Code"] == "InvalidEventPatternException"
    events.put_rule(Name="simple", EventPattern=json.dumps({"detail": {"object": {"key": [{"prefix": "training_data/"}]}}}))
    events.delete_rule(Name="simple")
    rule = {"Type": "AWS::Events::Rule", "Properties": {"EventPattern": pattern}}
    cloudformation.create_stack(StackName="complex", TemplateBody=json.dumps({"Resources": {"Rule": rule}}))

    def status() -> str:
        return str(cloudformation.describe_stacks(StackName="complex")["Stacks"][0]["StackStatus"])

    assert wait_for(lambda: not status().endswith("_IN_PROGRESS"))
    assert status() == "ROLLBACK_COMPLETE"
    reasons = [
        event.get("ResourceStatusReason", "")
        for event in cloudformation.describe_stack_events(StackName="complex")["StackEvents"]
    ]
    assert any("Rule is too complex" in reason for reason in reasons)
    cloudformation.delete_stack(StackName="complex")


def test_nothing_listens_beyond_this_machine(emulators: Emulators, deployed: Deployed) -> None:
    process = psutil.Process(emulators.processes["aws"].pid)
    listening = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_an_event_of_an_aws_service_reaches_a_function_as_it_was_sent(emulators: Emulators, deployed: Deployed) -> None:
    event = job_event({"TrainingJobName": 'it\'s "ünusual"'})
    assert emulators.post_event(event) == (200, {"id": event["id"]})
    (note,) = wait_for(lambda: deployed.notes(event["id"]))
    assert note["event"] == event


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'"text"', {"source": "aws.sagemaker"}])
def test_what_is_no_event_is_refused_with_what_is_missing(emulators: Emulators, body: Any) -> None:
    status, answer = emulators.post_event(body)
    assert status == 400
    assert "detail-type" in answer["message"]


def test_a_function_sees_its_artefact_and_its_variables_and_nothing_of_the_caller(deployed: Deployed) -> None:
    event_id = deployed.post_job_event()
    (note,) = wait_for(lambda: deployed.notes(event_id))
    assert note["modules"] == {"boto3": False, "psutil": False, "tunedrop": False}
    assert note["environment"]["AWS_ENDPOINT_URL"] == deployed.emulators.url
    assert not {"OF_THE_CALLER", "AWS_ENDPOINT_URL_SAGEMAKER", "VIRTUAL_ENV", "PYTEST_VERSION"} & note["environment"].keys()


def test_s3_events_name_version_and_a_growing_sequencer(emulators: Emulators, deployed: Deployed) -> None:
    s3, key = emulators.client("s3"), "a folder/ü+%41.jsonl"
    versions = [s3.put_object(Bucket=deployed.outputs["Bucket"], Key=key, Body=b"x")["VersionId"] for _ in range(2)]

    def objects() -> list[Json]:
        lines = deployed.notes_file.read_text().splitlines()
        events = [json.loads(line)["event"] for line in lines]
        return [e["detail"]["object"] for e in events if e["source"] == "aws.s3" and e["detail"]["object"]["key"] == key]

    wait_for(lambda: len(objects()) == 2)
    first, second = sorted(objects(), key=lambda item: item["sequencer"])
    assert [first["version-id"], second["version-id"]] == versions
    assert first["sequencer"] < second["sequencer"]


class Role:
    """A role with one policy, assumed by a service that it trusts for its own account."""

    def __init__(self, emulators: Emulators, *statements: Json, trusted_for: str = "000000000000") -> None:
        self.emulators, self.name = emulators, f"role-{uuid.uuid4().hex[:8]}"
        trust = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "sagemaker.amazonaws.com"}}
        condition = {"Condition": {"StringEquals": {"aws:SourceAccount": trusted_for}}}
        iam, version = emulators.client("iam"), {"Version": "2012-10-17"}
        document = json.dumps(version | {"Statement": [trust | condition]})
        self.arn = iam.create_role(RoleName=self.name, AssumeRolePolicyDocument=document)["Role"]["Arn"]
        policy = json.dumps(version | {"Statement": list(statements)})
        iam.put_role_policy(RoleName=self.name, PolicyName="p", PolicyDocument=policy)

    def credentials(self) -> dict[str, str]:
        answer = self.emulators.client("sts").assume_role(RoleArn=self.arn, RoleSessionName="SageMaker")["Credentials"]
        return {
            "aws_access_key_id": answer["AccessKeyId"],
            "aws_secret_access_key": answer["SecretAccessKey"],
            "aws_session_token": answer["SessionToken"],
        }

    def calls(self) -> list[tuple[str, str, bool]]:
        """The role's recorded calls: action, resource, and whether IAM allowed the call."""
        lines = (self.emulators.folder / "aws" / "calls.jsonl").read_text().splitlines()
        notes = [note for note in map(json.loads, lines) if f"/{self.name}/" in note["principal"]]
        return [(note["action"], note["resource"], note["allowed"]) for note in notes]


def allow(action: str, resource: str, **conditions: Json) -> Json:
    condition = {"Condition": conditions} if conditions else {}
    return {"Effect": "Allow", "Action": action, "Resource": resource, **condition}


def test_a_role_may_do_what_its_policy_says_and_every_call_is_noted(emulators: Emulators, deployed: Deployed) -> None:
    bucket = f"arn:aws:s3:::{deployed.outputs['Bucket']}"
    role = Role(emulators, allow("s3:PutObject", f"{bucket}/mine/*"))
    s3 = emulators.client("s3", **role.credentials())
    s3.put_object(Bucket=deployed.outputs["Bucket"], Key="mine/a", Body=b"x")
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.put_object(Bucket=deployed.outputs["Bucket"], Key="yours/a", Body=b"x")
    assert role.calls() == [("s3:PutObject", f"{bucket}/mine/a", True), ("s3:PutObject", f"{bucket}/yours/a", False)]


def test_a_jobs_role_reads_the_secret_of_its_rewards_and_no_other(emulators: Emulators) -> None:
    owner = emulators.client("secretsmanager")
    named, other = (
        owner.create_secret(Name=name, SecretString='{"judge.example.com": "CaNaRy-token"}')["ARN"]
        for name in ("judges", "payroll")
    )
    assert re.fullmatch(load_template()["Parameters"]["RewardHttpSecretArn"]["AllowedPattern"], named)
    role = Role(emulators, allow("secretsmanager:GetSecretValue", named))
    credentials = role.credentials()
    clients = cache(lambda service: emulators.client(service, **credentials))
    assert HostTokens(clients, named).token(["judge.example.com"]) == "CaNaRy-token"
    with pytest.raises(RewardError, match=r"the secret of RewardHttpSecretArn cannot be read: .*AccessDenied"):
        HostTokens(clients, other).token(["judge.example.com"])
    assert role.calls() == [
        ("secretsmanager:GetSecretValue", named, True),
        ("secretsmanager:GetSecretValue", other, False),
    ]


def test_sagemaker_does_what_iam_lets_the_caller_do(emulators: Emulators, deployed: Deployed) -> None:
    groups = "arn:aws:sagemaker:us-east-1:000000000000:model-package-group/"
    role = Role(emulators, allow("sagemaker:CreateModelPackageGroup", f"{groups}ours-*"))
    credentials = role.credentials()
    sagemaker = emulators.client("sagemaker", **credentials)
    sagemaker.create_model_package_group(ModelPackageGroupName="ours-1")
    for refused in (
        {"ModelPackageGroupName": "theirs"},
        {"ModelPackageGroupName": "ours-2", "Tags": [{"Key": "k", "Value": "v"}]},
    ):
        with pytest.raises(ClientError) as error:
            sagemaker.create_model_package_group(**refused)
        assert error.value.response["Error"]["Code"] == "AccessDeniedException"
    assert ("sagemaker:AddTags", f"{groups}ours-2", False) in role.calls()
    forged = emulators.client("sagemaker", **credentials | {"aws_secret_access_key": "guessed"})
    with pytest.raises(ClientError, match="signature"):
        forged.create_model_package_group(ModelPackageGroupName="ours-3")
    emulators.client("sagemaker").delete_model_package_group(ModelPackageGroupName="ours-1")


def test_a_question_without_a_copy_wakes_its_component_by_the_alarm_in_cloudwatch(
    emulators: Emulators, deployed: Deployed
) -> None:
    sagemaker, scaling, cloudwatch, s3 = (
        emulators.client(name) for name in ("sagemaker", "application-autoscaling", "cloudwatch", "s3")
    )
    bucket = deployed.outputs["Bucket"]
    s3.put_object(Bucket=bucket, Key="models/m/config.json", Body=b"{}")
    files = f"arn:aws:s3:::{bucket}"
    serving = Role(emulators, allow("s3:GetObject", f"{files}/models/*"), allow("s3:ListBucket", files)).arn
    source = {"S3Uri": f"s3://{bucket}/models/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    image = "763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:1"
    container = {"Image": image, "ModelDataSource": {"S3DataSource": source}}
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=serving, PrimaryContainer=container)
    variant = {
        "VariantName": "AllTraffic",
        "InstanceType": "ml.g5.xlarge",
        "InitialInstanceCount": 1,
        "ManagedInstanceScaling": {"Status": "ENABLED", "MinInstanceCount": 0, "MaxInstanceCount": 1},
    }
    sagemaker.create_endpoint_config(EndpointConfigName="e", ExecutionRoleArn=serving, ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="e", EndpointConfigName="e")
    wait_for(lambda: sagemaker.describe_endpoint(EndpointName="e")["EndpointStatus"] == "InService")
    compute = {"NumberOfAcceleratorDevicesRequired": 1, "MinMemoryRequiredInMb": 1024}
    sagemaker.create_inference_component(
        InferenceComponentName="c",
        EndpointName="e",
        VariantName="AllTraffic",
        Specification={"ModelName": "m", "ComputeResourceRequirements": compute},
        RuntimeConfig={"CopyCount": 0},
    )

    def component() -> Json:
        return dict(sagemaker.describe_inference_component(InferenceComponentName="c"))

    wait_for(lambda: component()["InferenceComponentStatus"] == "InService")
    target = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": "inference-component/c",
        "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount",
    }
    scaling.register_scalable_target(MinCapacity=0, MaxCapacity=1, **target)
    steps = [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}]
    wake = {"AdjustmentType": "ExactCapacity", "StepAdjustments": steps}
    policy = scaling.put_scaling_policy(
        PolicyName="wake", PolicyType="StepScaling", StepScalingPolicyConfiguration=wake, **target
    )["PolicyARN"]
    metric = {
        "Namespace": "AWS/SageMaker",
        "MetricName": "NoCapacityInvocationFailures",
        "Dimensions": [{"Name": "InferenceComponentName", "Value": "c"}],
    }
    failures = {"Id": "failures", "MetricStat": {"Metric": metric, "Period": 60, "Stat": "Sum"}, "ReturnData": False}
    cloudwatch.put_metric_alarm(  # metric math, which MiniStack itself forgets
        AlarmName="wake",
        Metrics=[failures, {"Id": "all", "Expression": "SUM([failures])", "ReturnData": True}],
        EvaluationPeriods=1,
        Threshold=1,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
        TreatMissingData="notBreaching",
        AlarmActions=[policy],
    )
    endpoint, question = "arn:aws:sagemaker:us-east-1:000000000000:endpoint/e", {"EndpointName": "e", "Body": b"{}"}
    role = Role(emulators, allow("sagemaker:InvokeEndpoint", endpoint))
    with pytest.raises(ClientError, match="AccessDeniedException"):
        emulators.client("sagemaker-runtime", **role.credentials()).invoke_endpoint(**question, InferenceComponentName="c")
    assert [allowed for _, _, allowed in role.calls()] == [True, False]  # on the endpoint, and on the component
    assert component()["RuntimeConfig"]["DesiredCopyCount"] == 0
    with pytest.raises(ClientError, match="has no capacity"):
        emulators.client("sagemaker-runtime").invoke_endpoint(**question, InferenceComponentName="c")
    wait_for(lambda: component()["RuntimeConfig"]["DesiredCopyCount"] == 1)
    assert cloudwatch.describe_alarms(AlarmNames=["wake"])["MetricAlarms"][0]["StateValue"] == "ALARM"
    data = {"SampleCount": 3, "Sum": 9, "Minimum": 1, "Maximum": 5}
    cloudwatch.put_metric_data(Namespace="AWS/SageMaker", MetricData=[{"MetricName": "M", "StatisticValues": data}])
    plain = {"Namespace": "AWS/SageMaker", "MetricName": "M", "Statistic": "Sum", "Period": 60, "EvaluationPeriods": 1}
    compare = {"Threshold": 0, "ComparisonOperator": "GreaterThanThreshold", "TreatMissingData": "ignore"}
    cloudwatch.put_metric_alarm(AlarmName="by-the-emulator", **plain, **compare)
    state = cloudwatch.describe_alarms(AlarmNames=["by-the-emulator"])["MetricAlarms"][0]["StateValue"]
    assert state == "INSUFFICIENT_DATA"  # MiniStack, which knows no dimensions, leaves it to the SageMaker emulator
    cloudwatch.delete_alarms(AlarmNames=["wake", "by-the-emulator"])
    sagemaker.delete_endpoint(EndpointName="e")


def test_a_person_who_may_only_reject_rejects_and_the_rules_function_gets_the_event(
    emulators: Emulators, deployed: Deployed
) -> None:
    own = emulators.client("sagemaker")
    own.create_model_package_group(ModelPackageGroupName="judged")
    specification = {"Containers": [{"Image": "image"}], "SupportedContentTypes": [], "SupportedResponseMIMETypes": []}
    package = {"ModelPackageGroupName": "judged", "ModelApprovalStatus": "Approved", "InferenceSpecification": specification}
    arn = own.create_model_package(**package)["ModelPackageArn"]
    versions = "arn:aws:sagemaker:us-east-1:000000000000:model-package/judged/*"
    only_rejections = {"StringEquals": {"sagemaker:ModelApprovalStatus": "Rejected"}}
    role = Role(
        emulators,
        allow("sagemaker:ListModelPackages", versions),
        allow("sagemaker:UpdateModelPackage", versions, **only_rejections),
    )
    sagemaker = emulators.client("sagemaker", **role.credentials())
    (listed,) = sagemaker.list_model_packages(ModelPackageGroupName="judged")["ModelPackageSummaryList"]
    assert listed["ModelPackageArn"] == arn
    for status in ({"ModelApprovalStatus": "Approved"}, {"ApprovalDescription": "no status"}):
        with pytest.raises(ClientError, match="not authorized to perform: sagemaker:UpdateModelPackage"):
            sagemaker.update_model_package(ModelPackageArn=arn, **status)
    with pytest.raises(ClientError, match="not authorized to perform: sagemaker:ListModelPackages"):
        sagemaker.list_model_packages()
    sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Rejected")

    def statuses() -> list[str]:
        lines = deployed.notes_file.read_text().splitlines() if deployed.notes_file.exists() else []
        details = [json.loads(line)["event"].get("detail", {}) for line in lines]
        return [detail["ModelApprovalStatus"] for detail in details if detail.get("ModelPackageArn") == arn]

    wait_for(lambda: sorted(statuses()) == ["Approved", "Rejected"])
    own.delete_model_package(ModelPackageName=arn)
    own.delete_model_package_group(ModelPackageGroupName="judged")


def test_a_signature_is_for_its_body_and_its_operation(emulators: Emulators, deployed: Deployed) -> None:
    """What one may sign cannot carry another body or another operation."""
    key, trust = Credentials(*emulators.root), emulators.trust
    digest = {"x-amz-content-sha256": hashlib.sha256(b"good").hexdigest()}
    url = f"{emulators.url}/{deployed.outputs['Bucket']}/body"
    upload = signed("upload", url, "s3", key, b"good", "PUT", **digest)
    assert send(upload, trust)[0] == 200
    assert send(upload._replace(body=b"evil"), trust)[0] == 403
    listing = signed("list", emulators.url, "s3", key, b"", "GET", **{"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
    assert send(listing, trust)[0] == 200
    for name in ("X-Amz-Target", "x-amz-security-token"):
        added = (*listing.headers, (name, "DynamoDB_20120810.ListTables"))
        assert send(listing._replace(method="POST", headers=added), trust)[0] == 403
        assert send(listing._replace(headers=added), trust)[0] == 403


def test_a_role_may_not_do_what_has_no_name_in_a_policy(emulators: Emulators, deployed: Deployed) -> None:
    credentials = Role(emulators, allow("*", "*")).credentials()
    key = Credentials(*credentials.values())
    path = f"/2021-11-15/functions/{deployed.outputs['Function']}/response-streaming-invocations"
    request = signed("stream", f"{emulators.url}{path}", "lambda", key, b"{}")
    assert send(request, emulators.trust)[0] == 403


def test_a_role_may_put_the_events_that_its_policy_names(emulators: Emulators, deployed: Deployed) -> None:
    only = {"Condition": {"StringEquals": {"events:source": "ours", "events:detail-type": "Verdict"}}}
    events = emulators.client("events", **Role(emulators, allow("events:PutEvents", "*") | only).credentials())
    entry = {"Source": "ours", "DetailType": "Verdict", "Detail": "{}"}
    assert events.put_events(Entries=[entry, entry])["FailedEntryCount"] == 0
    for other in ({"Source": "theirs"}, {"DetailType": "Another"}):
        with pytest.raises(ClientError, match="AccessDenied"):
            events.put_events(Entries=[entry, entry | other])


def test_a_service_takes_on_a_role_that_trusts_it_for_this_account_only(emulators: Emulators, deployed: Deployed) -> None:
    assert Role(emulators, allow("s3:GetObject", "*")).credentials()
    with pytest.raises(ClientError, match="AccessDenied"):
        Role(emulators, allow("s3:GetObject", "*"), trusted_for="999999999999").credentials()


def test_bedrock_imports_what_its_role_reads_and_does_what_iam_lets_the_caller_do(emulators: Emulators) -> None:
    """https://docs.aws.amazon.com/bedrock/latest/userguide/model-import-iam-role.html"""
    bedrock, s3, iam = (emulators.client(name) for name in ("bedrock", "s3", "iam"))
    jobs, models = (f"arn:aws:bedrock:us-east-1:000000000000:{kind}/*" for kind in ("model-import-job", "imported-model"))
    s3.create_bucket(Bucket="imports")
    files = {"config.json": '{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": "{}", "tokenizer_config.json": "{}"}
    for folder in ("merged", "secret"):
        for name, body in (files | {"model.safetensors": "-"}).items():
            s3.put_object(Bucket="imports", Key=f"{folder}/{name}", Body=body)
    importer = Role(
        emulators, allow("s3:ListBucket", "arn:aws:s3:::imports"), allow("s3:GetObject", "arn:aws:s3:::imports/merged/*")
    )
    mine = {"StringEquals": {"aws:ResourceTag/tunedrop:prefix": "mine"}}
    caller = Role(
        emulators,
        allow("bedrock:CreateModelImportJob", "*"),
        allow("bedrock:TagResource", models),
        allow("bedrock:GetModelImportJob", jobs),
        allow("bedrock:DeleteImportedModel", models, **mine),
        allow("bedrock:InvokeModel", models, **mine),
        allow("iam:PassRole", importer.arn, StringEquals={"iam:PassedToService": "bedrock.amazonaws.com"}),
    )
    credentials = caller.credentials()
    theirs, runtime = (emulators.client(name, **credentials) for name in ("bedrock", "bedrock-runtime"))

    def create(client: Any, name: str, folder: str = "merged", prefix: str = "mine") -> Any:
        client.create_model_import_job(
            jobName=name,
            importedModelName=name,
            roleArn=importer.arn,
            modelDataSource={"s3DataSource": {"s3Uri": f"s3://imports/{folder}/"}},
            importedModelTags=[{"key": "tunedrop:prefix", "value": prefix}],
        )
        wait_for(lambda: theirs.get_model_import_job(jobIdentifier=name)["status"] != "InProgress")
        return theirs.get_model_import_job(jobIdentifier=name)

    trust = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "bedrock.amazonaws.com"}}

    def trusts(source: str) -> None:
        statement = trust | {"Condition": {"ArnLike": {"aws:SourceArn": source}}}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.update_assume_role_policy(RoleName=importer.name, PolicyDocument=document)

    trusts(models)
    with pytest.raises(ClientError, match="Could not assume provided IAM role"):
        create(theirs, "untrusted")
    trusts(jobs)
    assert "Forbidden" in create(theirs, "secret", "secret")["failureMessage"]
    own, other = create(theirs, "own")["importedModelArn"], create(bedrock, "other", prefix="other")["importedModelArn"]
    for refused, action in (
        (lambda: theirs.delete_imported_model(modelIdentifier=other), "bedrock:DeleteImportedModel"),
        (lambda: runtime.invoke_model(modelId=other, body=b"{}"), "bedrock:InvokeModel"),
        (theirs.list_imported_models, "bedrock:ListImportedModels"),
    ):
        with pytest.raises(ClientError, match=f"not authorized to perform: {action}") as error:
            refused()
        assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    theirs.delete_imported_model(modelIdentifier=own)
    assert [model["modelArn"] for model in bedrock.list_imported_models(maxResults=5)["modelSummaries"]] == [other]
    forged = emulators.client("bedrock", **credentials | {"aws_secret_access_key": "guessed"})
    with pytest.raises(ClientError, match="signature"):
        forged.get_model_import_job(jobIdentifier="own")
    with pytest.raises(urllib.error.HTTPError, match=r"40[03]"):
        urllib.request.urlopen(f"{emulators.url_of('sagemaker')}/imported-models")
    bedrock.delete_imported_model(modelIdentifier="other")


def test_alarms_are_deleted_by_their_names_and_described_by_who_may_describe_all(
    emulators: Emulators, deployed: Deployed
) -> None:
    alarms = "arn:aws:cloudwatch:us-east-1:000000000000:alarm:"
    mine, every = allow("cloudwatch:*Alarm*", f"{alarms}mine-*"), allow("cloudwatch:DescribeAlarms", f"{alarms}*")
    role, blind = Role(emulators, mine, every), Role(emulators, mine)
    cloudwatch = emulators.client("cloudwatch", **role.credentials())
    for name in ("mine-1", "other"):
        emulators.client("cloudwatch").put_metric_alarm(
            AlarmName=name,
            Namespace="N",
            MetricName="M",
            Statistic="Sum",
            Period=60,
            EvaluationPeriods=1,
            Threshold=0,
            ComparisonOperator="GreaterThanThreshold",
        )
    assert len(cloudwatch.describe_alarms(AlarmNames=["mine-1"])["MetricAlarms"]) == 1
    with pytest.raises(ClientError, match="DescribeAlarms"):
        emulators.client("cloudwatch", **blind.credentials()).describe_alarms(AlarmNames=["mine-1"])
    with pytest.raises(ClientError, match="DeleteAlarms"):
        cloudwatch.delete_alarms(AlarmNames=["other"])
    cloudwatch.delete_alarms(AlarmNames=["mine-1"])
    assert role.calls() == [
        ("cloudwatch:DescribeAlarms", f"{alarms}*", True),
        ("cloudwatch:DeleteAlarms", f"{alarms}other", False),
        ("cloudwatch:DeleteAlarms", f"{alarms}mine-1", True),
    ]
    emulators.client("cloudwatch").delete_alarms(AlarmNames=["other"])


def test_an_alarm_is_announced_where_the_topic_lets_cloudwatch_publish(emulators: Emulators, deployed: Deployed) -> None:
    sns, sqs, cloudwatch = (emulators.client(name) for name in ("sns", "sqs", "cloudwatch"))
    queue = sqs.create_queue(QueueName="alarms")["QueueUrl"]
    queue_arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": "sns.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": "*",
    }
    sqs.set_queue_attributes(QueueUrl=queue, Attributes={"Policy": json.dumps({"Statement": [statement]})})
    for name, principal in (("open", "cloudwatch.amazonaws.com"), ("shut", "s3.amazonaws.com")):
        topic = sns.create_topic(Name=name)["TopicArn"]
        policy = {"Effect": "Allow", "Principal": {"Service": principal}, "Action": "sns:Publish", "Resource": topic}
        sns.set_topic_attributes(TopicArn=topic, AttributeName="Policy", AttributeValue=json.dumps({"Statement": [policy]}))
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn)
        metric = {"Namespace": "N", "MetricName": "M", "Statistic": "Sum", "Period": 60, "EvaluationPeriods": 1}
        compare = {"Threshold": 0, "ComparisonOperator": "GreaterThanThreshold"}
        cloudwatch.put_metric_alarm(AlarmName=name, **metric, **compare, AlarmActions=[topic])
        cloudwatch.set_alarm_state(AlarmName=name, StateValue="ALARM", StateReason="a test")
    messages = wait_for(lambda: sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages"))
    assert [json.loads(json.loads(m["Body"])["Message"])["AlarmName"] for m in messages] == ["open"]
    assert not sqs.receive_message(QueueUrl=queue).get("Messages")


@pytest.mark.parametrize("how", ["fail", "die"])
def test_a_failing_function_is_tried_three_times_and_then_reported(deployed: Deployed, how: str) -> None:
    event_id = deployed.post_job_event(**{how: True})
    message = json.loads(deployed.dead_letter(event_id)["Body"])
    assert len(deployed.notes(event_id)) == 3
    assert message["requestPayload"]["id"] == event_id
    assert message["requestContext"]["condition"] == "RetriesExhausted"
    assert message["responsePayload"]["errorMessage"] == {"fail": "as ordered", "die": "Worker process died"}[how]


@pytest.mark.parametrize(("why", "code"), [("missing", "NO_RESOURCE"), ("forbidden", "NO_PERMISSIONS")])
def test_what_a_rule_cannot_deliver_goes_to_its_dead_letter_queue(deployed: Deployed, why: str, code: str) -> None:
    event_id = deployed.post_job_event(**{why: True})
    message = deployed.dead_letter(event_id)
    assert json.loads(message["Body"])["id"] == event_id
    attributes = {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}
    assert attributes["ERROR_CODE"] == code
    assert "rule/probe-" in attributes["RULE_ARN"]
    assert ":function:" in attributes["TARGET_ARN"]


def test_redriven_events_reach_their_functions(emulators: Emulators, deployed: Deployed, tmp_path: Path) -> None:
    sqs, mended = emulators.client("sqs"), tmp_path / "mended"
    failed = deployed.post_job_event(fail_until=str(mended))
    undelivered = deployed.post_job_event(forbidden=True)  # its rule has no permission; the function itself would take it

    def waiting() -> bool:
        attributes = sqs.get_queue_attributes(QueueUrl=deployed.outputs["Queue"], AttributeNames=["All"])["Attributes"]
        return attributes["ApproximateNumberOfMessages"] == "2"

    wait_for(waiting)
    mended.touch()
    assert len(list(redrive(sqs, emulators.client("lambda"), deployed.outputs["Queue"]))) == 2
    wait_for(lambda: len(deployed.notes(failed)) == 4)
    wait_for(lambda: len(deployed.notes(undelivered)) == 2)  # by the rule that may, and by redriving
    assert not sqs.receive_message(QueueUrl=deployed.outputs["Queue"], VisibilityTimeout=0).get("Messages")


def test_a_killed_emulator_goes_on_where_it_was(emulators: Emulators, deployed: Deployed, tmp_path: Path) -> None:
    bucket, dynamodb = deployed.outputs["Bucket"], emulators.client("dynamodb")
    dynamodb.create_table(
        TableName="runs",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
    )
    dynamodb.put_item(TableName="runs", Item={"id": {"S": "one"}})
    written = emulators.client("s3").put_object(Bucket=bucket, Key="kept", Body=b"bytes")
    emulators.client("sqs").send_message(QueueUrl=deployed.outputs["Queue"], MessageBody="kept-message")
    saved = emulators.folder / "aws" / "services" / "sqs.json"
    wait_for(lambda: "kept-message" in saved.read_text(), seconds=2)
    # Queued and under way when the emulator dies, with no time to save anything.
    flag = tmp_path / "hung"
    event_id = deployed.post_job_event(hang_once=str(flag))
    wait_for(flag.exists)

    emulators.kill("aws")
    emulators.start("aws")

    assert dynamodb.get_item(TableName="runs", Key={"id": {"S": "one"}})["Item"] == {"id": {"S": "one"}}
    kept = emulators.client("s3").get_object(Bucket=bucket, Key="kept", VersionId=written["VersionId"])
    assert kept["Body"].read() == b"bytes"
    assert deployed.dead_letter("kept-message")
    (stack,) = emulators.client("cloudformation").describe_stacks(StackName="probe")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    wait_for(lambda: len(deployed.notes(event_id)) == 2)  # the interrupted invocation ran again
    again = deployed.post_job_event()
    wait_for(lambda: deployed.notes(again))
    wait_for(lambda: not list((emulators.folder / "aws" / "invocations").glob("*.json")))


def test_a_kill_during_a_deploy_leaves_the_stack_as_it_was(emulators: Emulators, deployed: Deployed) -> None:
    cloudformation = emulators.client("cloudformation")
    # Waits for a signal that nobody sends, so the deploy is under way for as long as it takes to kill the emulator.
    resources = {
        "Table": {"Type": "AWS::CloudFormation::WaitConditionHandle"},
        "Wait": {
            "Type": "AWS::CloudFormation::WaitCondition",
            "Properties": {"Handle": {"Ref": "Table"}, "Timeout": "600", "Count": 1},
        },
    }
    cloudformation.create_stack(StackName="half", TemplateBody=json.dumps({"Resources": resources}))
    (half,) = cloudformation.describe_stacks(StackName="half")["Stacks"]
    assert half["StackStatus"] == "CREATE_IN_PROGRESS"

    emulators.kill("aws")
    emulators.start("aws")

    names = {stack["StackName"]: stack["StackStatus"] for stack in cloudformation.describe_stacks()["Stacks"]}
    assert names == {"probe": "CREATE_COMPLETE"}
