"""One contract test for each thing that `local_app.aws_emulator` adds to MiniStack."""

import json
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Emulators, wait_for

Json = dict[str, Any]

# What the functions under test do: write down what they got, then do as the event says.
FUNCTION = """
import json, os, sys, time, importlib.util

def handler(event, context):
    with open(os.environ["NOTES"], "a") as notes:
        seen = {name: importlib.util.find_spec(name) is not None for name in ("boto3", "psutil", "tunedrop")}
        notes.write(json.dumps({"event": event, "modules": seen, "environment": dict(os.environ)}) + "\\n")
    order = event.get("detail", {})
    if order.get("fail"):
        raise ValueError("as ordered")
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
            "Runtime": "python3.11",
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
        "Group": {"Type": "AWS::SageMaker::ModelPackageGroup", "Properties": {"ModelPackageGroupName": "models"}},
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
        "GroupArn": {"Value": {"Ref": "Group"}},
        "Function": {"Value": {"Ref": "Function"}},
    }
    return json.dumps({"Resources": resources, "Outputs": outputs})


class Deployed:
    def __init__(self, emulators: Emulators) -> None:
        self.emulators = emulators
        self.notes_file = emulators.folder / "notes.jsonl"
        cloudformation = emulators.client("cloudformation")
        cloudformation.create_stack(StackName="probe", TemplateBody=template(self.notes_file))
        cloudformation.get_waiter("stack_create_complete").wait(StackName="probe", WaiterConfig={"Delay": 0.1})
        (stack,) = cloudformation.describe_stacks(StackName="probe")["Stacks"]
        self.outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}

    def notes(self, event_id: str) -> list[Json]:
        """What the function wrote down about the event with this id."""
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


def test_a_model_package_group_is_made_and_deleted_with_its_stack(emulators: Emulators, deployed: Deployed) -> None:
    sagemaker, cloudformation = emulators.client("sagemaker"), emulators.client("cloudformation")
    described = sagemaker.describe_model_package_group(ModelPackageGroupName="models")
    assert described["ModelPackageGroupArn"] == deployed.outputs["GroupArn"]

    group = {"Type": "AWS::SageMaker::ModelPackageGroup", "Properties": {"ModelPackageGroupName": "short-lived"}}
    cloudformation.create_stack(StackName="short-lived", TemplateBody=json.dumps({"Resources": {"Group": group}}))
    cloudformation.get_waiter("stack_create_complete").wait(StackName="short-lived", WaiterConfig={"Delay": 0.1})

    def names() -> set[str]:
        return {g["ModelPackageGroupName"] for g in sagemaker.list_model_package_groups()["ModelPackageGroupSummaryList"]}

    assert names() == {"models", "short-lived"}
    cloudformation.delete_stack(StackName="short-lived")
    cloudformation.get_waiter("stack_delete_complete").wait(StackName="short-lived", WaiterConfig={"Delay": 0.1})
    assert names() == {"models"}


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
