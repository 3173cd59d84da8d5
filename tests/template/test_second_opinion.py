"""The same template in an emulator that shares nothing with the local app's: moto's CloudFormation, as far as it goes.

What it cannot do is listed here, and done for it: conditions inside lists, and the name of an event bus.
"""

import ast
import copy
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws
from template import Json, listed, of_type, resolve

# Types that moto's CloudFormation passes over.
NOT_MADE = {
    "AWS::CloudWatch::Alarm",
    "AWS::CloudWatch::Dashboard",
    "AWS::Events::EventBus",
    "AWS::Lambda::EventInvokeConfig",
    "AWS::S3::BucketPolicy",
    "AWS::SNS::TopicPolicy",
    "AWS::SQS::QueuePolicy",
}
NO_VALUE = {"Ref": "AWS::NoValue"}
NAME = "second"
SERVES = "ServesModels"


def chosen(value: Any) -> Any:
    """Take a branch of every condition (models are served; no key, no VPC, no own image), and out what is no value."""
    if isinstance(value, dict):
        if value.keys() == {"Fn::If"}:
            condition, yes, no = value["Fn::If"]
            return chosen(yes if condition == SERVES else no)
        if value == {"Ref": "EventBus"}:
            return NAME
        return {name: kept for name, item in value.items() if (kept := chosen(item)) != NO_VALUE}
    if isinstance(value, list):
        return [kept for item in value if (kept := chosen(item)) != NO_VALUE]
    return value


@pytest.fixture(scope="module")
def template(transformed: Json) -> Json:
    mine = copy.deepcopy(transformed)
    mine["Resources"] = {n: chosen(r) for n, r in mine["Resources"].items() if r.get("Condition", SERVES) == SERVES}
    mine["Outputs"] = chosen(mine["Outputs"])
    return mine


@pytest.fixture(scope="module")
def stack(template: Json) -> Iterator[Json]:
    """The deployed stack's outputs."""
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("nothing.py", "")
    with mock_aws(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        warnings.simplefilter("always")
        boto3.client("s3").create_bucket(Bucket="bucket")
        for key in ("functions.zip", "layer.zip"):
            boto3.client("s3").put_object(Bucket="bucket", Key=key, Body=package.getvalue())
        cloudformation = boto3.client("cloudformation")
        serving = [{"ParameterKey": "EndpointInstanceType", "ParameterValue": "ml.g5.xlarge"}]
        cloudformation.create_stack(
            StackName=NAME, TemplateBody=json.dumps(template), Parameters=serving, Capabilities=["CAPABILITY_IAM"]
        )
        (made,) = cloudformation.describe_stacks(StackName=NAME)["Stacks"]
        passed_over = {str(each.message).split()[3] for each in said if "Tried to parse" in str(each.message)}
        outputs = {output["OutputKey"]: output["OutputValue"] for output in made["Outputs"]}
        yield {"Status": made["StackStatus"], "Id": made["StackId"], "PassedOver": passed_over, "Outputs": outputs}


def test_it_is_created_but_for_what_moto_does_not_know(template: Json, stack: Json) -> None:
    assert stack["Status"] == "CREATE_COMPLETE"
    used = {resource["Type"] for resource in template["Resources"].values()}
    assert stack["PassedOver"] <= NOT_MADE <= used


def test_functions_are_named_after_the_prefix_and_know_what_was_made(template: Json, stack: Json) -> None:
    client, outputs = boto3.client("lambda"), stack["Outputs"]
    found = {each["FunctionName"]: each["Environment"]["Variables"] for each in client.list_functions()["Functions"]}
    names = "validate-dataset start-training test-model publish-results reconcile deploy-model".split()
    assert found.keys() == {f"tunedrop-{name}" for name in names}
    for variables in found.values():
        assert variables["DATA_BUCKET"] == outputs["DataBucket"]
        assert variables["RUN_TABLE"] == outputs["RunTable"]
    group = f"tunedrop-{stack['Id'].rpartition('/')[2].partition('-')[0]}"
    assert outputs["ModelPackageGroup"] == found["tunedrop-publish-results"]["MODEL_PACKAGE_GROUP"] == group
    assert outputs["ServingRoleArn"] == found["tunedrop-deploy-model"]["SERVING_ROLE_ARN"]
    assert outputs["EndpointInstanceType"] == found["tunedrop-validate-dataset"]["ENDPOINT_INSTANCE_TYPE"] == "ml.g5.xlarge"
    assert outputs["TrainingImageUri"] == (
        "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker"
    )


def test_rules_have_the_names_that_were_given(template: Json, stack: Json) -> None:
    known = {"JobPrefix": "tunedrop", "DataBucket": stack["Outputs"]["DataBucket"]}
    known |= {"SageMakerRole.Arn": stack["Outputs"]["SageMakerRoleArn"], "AWS::StackId": stack["Id"]}
    rules = boto3.client("events").list_rules()["Rules"]
    found = [json.loads(rule["EventPattern"]) for rule in rules if "EventPattern" in rule]
    wanted = [
        resolve(rule["EventPattern"], known)
        for rule in of_type(template, "AWS::Events::Rule").values()
        if rule.get("EventBusName") == "default"
    ]
    assert sorted(found, key=str) == sorted(wanted, key=str)
    assert len(found) == 6


def test_roles_have_their_policies(template: Json, stack: Json) -> None:
    iam = boto3.client("iam")
    roles = of_type(template, "AWS::IAM::Role")
    for name in roles:
        (role,) = [each["RoleName"] for each in iam.list_roles()["Roles"] if f"-{name}-" in each["RoleName"]]
        (policy,) = iam.list_role_policies(RoleName=role)["PolicyNames"]
        document = iam.get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
        statements = ast.literal_eval(document)["Statement"]  # moto answers with Python's text of it
        assert len(statements) == len(roles[name]["Policies"][0]["PolicyDocument"]["Statement"])
        arns = [arn for statement in statements for arn in listed(statement["Resource"])]
        assert all(arn == "*" or (arn.startswith("arn:aws:") and "${" not in arn) for arn in arns), arns
