"""The SAM template: valid, buildable, least privilege, nothing lost, and stacks that do not see each other's jobs."""

import json
import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from fake_stack import OWN_RULES
from template import Json, listed, of_type, resolve

from local_app.aws.hooks import matches_pattern
from local_app.stack import PROJECT
from pipeline.settings import (
    DeploySettings,
    JobSettings,
    PublishSettings,
    ReconcileSettings,
    Settings,
    ValidateSettings,
)
from tunedrop.rewards import REWARD_ENVIRONMENT

SAM = PROJECT / ".venv-sam" / "bin"

SETTINGS: dict[str, type[Settings]] = {
    "validate_dataset": ValidateSettings,
    "start_training": JobSettings,
    "test_model": JobSettings,
    "publish_results": PublishSettings,
    "reconcile": ReconcileSettings,
    "deploy_model": DeploySettings,
}
# AWS knows no narrower resource for these
# (https://docs.aws.amazon.com/service-authorization/latest/reference/reference_policies_actions-resources-contextkeys.html).
ON_EVERYTHING = [
    *("xray:Put*", "ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "ec2:Describe*"),
    *("sagemaker:ListEndpoints", "sagemaker:ListInferenceComponents", "bedrock:CreateModelImportJob"),
]


def functions(template: Json) -> dict[str, Json]:
    return of_type(template, "AWS::Lambda::Function")


def statements(template: Json) -> list[tuple[str, Json]]:
    """Every statement of an identity policy, with the resource it is in; conditional ones included."""
    found = []
    for name, role in of_type(template, "AWS::IAM::Role").items():
        found += [(name, s) for p in role.get("Policies", []) for s in p["PolicyDocument"]["Statement"]]
    for name, policy in of_type(template, "AWS::IAM::ManagedPolicy").items():
        found += [(name, s) for s in policy["PolicyDocument"]["Statement"]]
    return [(name, s["Fn::If"][1] if "Fn::If" in s else s) for name, s in found]


# ---- valid and buildable ---------------------------------------------------------------------------------------------


def run(*command: str | Path) -> None:
    environment = {**os.environ, "SAM_CLI_TELEMETRY": "0", "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sam_finds_nothing_to_say() -> None:
    run(SAM / "sam", "validate", "--lint")


def test_cfn_lint_finds_nothing_to_say_about_the_transformed_template(transformed: Json, tmp_path: Path) -> None:
    file = tmp_path / "transformed.json"
    file.write_text(json.dumps(transformed))
    # Beside the SAM template: S3 circular dependencies, for one, show only here.
    rules = ("--append-rules", "cfn_lint_serverless.rules")
    run(PROJECT / ".venv-lint" / "bin" / "cfn-lint", *rules, "--regions", "us-east-1", "--template", file)


# ---- functions -------------------------------------------------------------------------------------------------------


def test_every_function_is_one_of_the_six_with_its_own_role_and_log_group(transformed: Json) -> None:
    found = functions(transformed)
    assert {f["Handler"] for f in found.values()} == {f"{name}.app.handler" for name in SETTINGS}
    assert len({json.dumps(f["Role"]) for f in found.values()}) == len(found)
    groups = of_type(transformed, "AWS::Logs::LogGroup")
    for function in found.values():
        assert function["Runtime"] == "python3.13"
        assert function["Layers"][0]["Ref"].startswith("DependenciesLayer")  # SAM adds the content's digest
        assert function["Architectures"] == ["x86_64"]
        assert function["TracingConfig"] == {"Mode": "Active"}
        group = groups[function["LoggingConfig"]["LogGroup"]["Ref"]]
        assert group["RetentionInDays"] == {"Ref": "LogRetentionDays"}
        assert group["LogGroupName"]["Fn::Sub"] == "/aws/lambda/" + function["FunctionName"]["Fn::Sub"]
        # Of 64 characters at most: a stack's name alone may have 128, a prefix has 16.
        prefix, name = function["FunctionName"]["Fn::Sub"].split("}")
        assert (prefix, len(name) <= 48) == ("${JobPrefix", True)


def test_layers_name_no_architecture(transformed: Json) -> None:
    """Where a region has x86_64 alone, PublishLayerVersion answers "CompatibleArchitectures are not supported in …".

    A stack that failed by it:
    https://github.com/aws-solutions-library-samples/guidance-for-clickstream-analytics-on-aws/issues/48
    """
    layers = of_type(transformed, "AWS::Lambda::LayerVersion")
    assert len(layers) == 2
    assert [name for name, layer in layers.items() if "CompatibleArchitectures" in layer] == []


def test_every_function_gets_the_settings_it_reads(transformed: Json) -> None:
    for function in functions(transformed).values():
        variables = function["Environment"]["Variables"]
        name = variables["POWERTOOLS_SERVICE_NAME"]
        assert function["Handler"] == f"{name}.app.handler"
        own = {v for v in variables if not v.startswith(("POWERTOOLS_", "AWS_"))}
        assert own == {field.upper() for field in SETTINGS[name].model_fields}, name


# ---- nothing lost ----------------------------------------------------------------------------------------------------

DEAD_LETTERS = {"Fn::GetAtt": ["DeadLetterQueue", "Arn"]}


def test_every_rule_has_a_dead_letter_queue_that_takes_its_events(transformed: Json) -> None:
    rules = of_type(transformed, "AWS::Events::Rule")
    assert len(rules) == 11
    for name, rule in rules.items():
        assert all(target["DeadLetterConfig"] == {"Arn": DEAD_LETTERS} for target in rule["Targets"]), name
    (policy,) = of_type(transformed, "AWS::SQS::QueuePolicy").values()
    allow = next(s for s in policy["PolicyDocument"]["Statement"] if s["Effect"] == "Allow")
    assert allow["Resource"] == DEAD_LETTERS
    allowed = {}
    for arn in allow["Condition"]["ArnEquals"]["aws:SourceArn"]:
        condition, there, _ = arn.get("Fn::If", [None, arn, None])
        allowed[there["Fn::GetAtt"][0]] = condition
    assert allowed == {name: transformed["Resources"][name].get("Condition") for name in rules}


def test_every_function_has_an_on_failure_destination_that_it_may_send_to(transformed: Json) -> None:
    configs = of_type(transformed, "AWS::Lambda::EventInvokeConfig").values()
    assert {c["FunctionName"]["Ref"] for c in configs} == functions(transformed).keys()
    assert all(c["DestinationConfig"]["OnFailure"] == {"Destination": DEAD_LETTERS} for c in configs)
    shared = [s for name, s in statements(transformed) if name == "FunctionPolicy"]
    assert any(s["Action"] == "sqs:SendMessage" and s["Resource"] == DEAD_LETTERS for s in shared)
    for function in functions(transformed).values():
        role = of_type(transformed, "AWS::IAM::Role")[function["Role"]["Fn::GetAtt"][0]]
        assert {"Ref": "FunctionPolicy"} in role["ManagedPolicyArns"]


@pytest.mark.parametrize("name", ["DataBucket", "ArtifactBucket", "RunTable"])
def test_what_people_made_outlives_the_stack(transformed: Json, name: str) -> None:
    resource = transformed["Resources"][name]
    # A creation that fails leaves nothing that the next one would stumble over.
    assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")


# ---- no one let in ---------------------------------------------------------------------------------------------------


def test_no_policy_allows_every_action_or_more_resources_than_it_must(transformed: Json) -> None:
    for name, statement in statements(transformed):
        assert statement["Effect"] == "Allow"
        for action in listed(statement["Action"]):
            assert "*" not in action, f"{name}: {action}"
            if statement["Resource"] == "*":
                assert any(fnmatch(action, known) for known in ON_EVERYTHING), f"{name}: {action} on *"
    assert not any("Policies" in f or "Policy" in f for f in functions(transformed).values())
    # Roles that SAM would make bring managed policies with broad resources.
    assert {n for n in of_type(transformed, "AWS::IAM::Role") if n.endswith("FunctionRole")} == set()


def test_each_role_is_passed_only_to_its_service(transformed: Json) -> None:
    passes = [(name, s) for name, s in statements(transformed) if "iam:PassRole" in listed(s["Action"])]
    passed = [
        ("StartJobsPolicy", "SageMakerRole", "sagemaker"),
        ("DeployModelRole", "ServingRole", "sagemaker"),
        ("DeployModelRole", "ImportRole", "bedrock"),
    ]
    expected = [
        (name, {"Fn::GetAtt": [role, "Arn"]}, {"StringEquals": {"iam:PassedToService": f"{service}.amazonaws.com"}})
        for name, role, service in passed
    ]
    found = [(name, s["Resource"], s["Condition"]) for name, s in passes]
    assert sorted(found, key=str) == sorted(expected, key=str)
    roles = of_type(transformed, "AWS::IAM::Role").items()
    allowed = {name for name, role in roles if {"Ref": "StartJobsPolicy"} in role.get("ManagedPolicyArns", [])}
    assert allowed == {"StartTrainingRole", "TestModelRole", "ReconcileRole"}


def test_buckets_are_private_versioned_and_encrypted_and_only_data_tells_eventbridge(transformed: Json) -> None:
    buckets = of_type(transformed, "AWS::S3::Bucket")
    assert buckets.keys() == {"DataBucket", "ArtifactBucket"}
    policies = {
        p["Bucket"]["Ref"]: p["PolicyDocument"]["Statement"] for p in of_type(transformed, "AWS::S3::BucketPolicy").values()
    }
    for name, bucket in buckets.items():
        assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
        assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
        (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
        assert [d["SSEAlgorithm"] for d in rule["ServerSideEncryptionByDefault"]["Fn::If"][1:]] == ["aws:kms", "AES256"]
        denials = {s["Sid"]: s for s in policies[name]}
        assert denials["TlsOnly"]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        assert all(s["Effect"] == "Deny" and s["Action"] == "s3:*" for s in denials.values())
        assert ("NotificationConfiguration" in bucket) == (name == "DataBucket")


# ---- interface -------------------------------------------------------------------------------------------------------


def test_parameters_and_outputs(transformed: Json) -> None:
    assert transformed["Parameters"].keys() == {
        *("JobPrefix", "InstanceTypes", "UseSpot", "MaxConcurrentJobs", "MaxRunCostUsd", "BaseModel", "TrainingImageUri"),
        *("NotificationEmail", "ReportLinkHours", "ReconcileInterval", "RunAgeLimitHours", "LogRetentionDays"),
        *("KmsKeyArn", "VpcSubnetIds", "VpcSecurityGroupIds", "SageMakerEndpointUrl"),
        *("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "MlflowTrackingUri"),
        *("EndpointInstanceType", "EndpointMaxInstances", "EndpointIdleMinutes", "EndpointBakeMinutes"),
        *REWARD_ENVIRONMENT.values(),
    }
    assert transformed["Outputs"].keys() == {
        *("DataBucket", "ArtifactBucket", "EventBusName", "RunTable", "TopicArn", "AlarmTopicArn", "DeadLetterQueueUrl"),
        *("StopRunsPolicyArn", "SageMakerRoleArn", "ModelPackageGroup", "TrainingImageUri", "JobPrefix"),
        *("KmsKeyArn", "VpcSubnetIds", "VpcSecurityGroupIds"),
        *("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "MlflowTrackingUri"),
        *("EndpointInstanceType", "ServingRoleArn", "InvokeModelsPolicyArn", "UndeployPolicyArn"),
        *REWARD_ENVIRONMENT.values(),
    }


@pytest.mark.parametrize(
    ("prefix", "fits"),
    [("tunedrop", True), ("a", True), ("a" * 16, True), ("a" * 17, False), ("-a", False), ("a-", False), ("A", False)],
)
def test_job_prefix(transformed: Json, prefix: str, fits: bool) -> None:
    assert bool(re.fullmatch(transformed["Parameters"]["JobPrefix"]["AllowedPattern"], prefix)) == fits


# ---- rules -----------------------------------------------------------------------------------------------------------


def takers(template: Json, known: dict[str, str], bus: str, event: Json) -> set[str]:
    """The functions of a stack (with these values) whose rules on this bus take the event."""
    taken = set()
    for rule in of_type(template, "AWS::Events::Rule").values():
        if "EventPattern" not in rule or resolve(rule["EventBusName"], known) != bus:
            continue
        if matches_pattern(resolve(rule["EventPattern"], known), event):
            taken |= {target["Arn"]["Fn::GetAtt"][0] for target in rule["Targets"]}
    return taken


def without_serving(value: Any) -> Any:
    """Take the second branch of every choice by the condition ServesModels."""
    if isinstance(value, dict) and value.get("Fn::If", [None])[0] == "ServesModels":
        return without_serving(value["Fn::If"][2])
    if isinstance(value, dict):
        return {name: without_serving(item) for name, item in value.items()}
    return [without_serving(item) for item in value] if isinstance(value, list) else value


def stack(prefix: str) -> dict[str, str]:
    return {
        "JobPrefix": prefix,
        "DataBucket": f"{prefix}-data",
        "EventBus": prefix,
        "SageMakerRole.Arn": f"arn:aws:iam::111122223333:role/{prefix}",
        "AWS::StackId": f"arn:aws:cloudformation:us-east-1:111122223333:stack/{prefix}/{prefix.encode().hex():0<8}-8e0a",
    }


def event(source: str, detail_type: str, detail: Json) -> Json:
    envelope = {"version": "0", "id": "1", "account": "111122223333", "region": "us-east-1", "resources": []}
    return {**envelope, "time": "2026-01-01T00:00:00Z", "source": source, "detail-type": detail_type, "detail": detail}


def job_event(name: str, status: str, role: str) -> Json:
    detail = {"TrainingJobName": name, "TrainingJobStatus": status, "RoleArn": f"arn:aws:iam::111122223333:role/{role}"}
    return event("aws.sagemaker", "SageMaker Training Job State Change", detail)


@pytest.mark.parametrize("status", ["Completed", "Failed", "Stopped"])
def test_final_jobs_reach_the_next_stage_and_whoever_waits(transformed: Json, status: str) -> None:
    def taken(name: str) -> set[str]:
        return takers(transformed, stack("one"), "default", job_event(name, status, "one"))

    assert taken("one-train-cars-0123456789ab-1") == {"TestModelFunction", "StartTrainingFunction"}
    assert taken("one-test-cars-0123456789ab-1") == {"PublishResultsFunction", "StartTrainingFunction"}
    assert taken("one-other-cars-0123456789ab-1") == set()


def test_changes_of_its_own_model_packages_reach_the_stack(transformed: Json) -> None:
    kind = "SageMaker Model Package State Change"
    for group, takes in (("one-6f6e6500", {"PublishResultsFunction"}), ("two-74776f00", set()), ("one", set())):
        happened = event("aws.sagemaker", kind, {"ModelPackageGroupName": group, "ModelApprovalStatus": "Approved"})
        assert takers(transformed, stack("one"), "default", happened) == takes


@pytest.mark.parametrize("status", ["CREATING", "IN_SERVICE", "FAILED", "DELETING"])
def test_every_change_of_its_own_endpoints_reaches_the_stack(transformed: Json, status: str) -> None:
    for name, takes in (("one-base-0a1b2c3d", {"DeployModelFunction"}), ("two-base-0a1b2c3d", set()), ("one", set())):
        detail = {"EndpointName": name, "EndpointStatus": status}
        happened = event("aws.sagemaker", "SageMaker Endpoint State Change", detail)
        assert takers(transformed, stack("one"), "default", happened) == takes


@pytest.mark.parametrize("status", ["InProgress", "Stopping"])
def test_unfinished_jobs_reach_nobody(transformed: Json, status: str) -> None:
    assert takers(transformed, stack("one"), "default", job_event("one-train-cars-1", status, "one")) == set()


@pytest.mark.parametrize("other", ["two", "one-train", "one-test", "on"])
def test_stacks_do_not_see_each_others_jobs(transformed: Json, other: str) -> None:
    for kind in ("train", "test"):
        for mine, theirs in (("one", other), (other, "one")):
            happened = job_event(f"{theirs}-{kind}-cars-1", "Completed", theirs)
            assert takers(transformed, stack(mine), "default", happened) == set()
            assert takers(transformed, stack(theirs), "default", happened) != set()


@pytest.mark.parametrize(
    ("bucket", "key", "taken"),
    [
        ("one-data", "training_data/cars.jsonl", True),
        ("one-data", "training_data/cars.json", True),
        ("one-data", "training_data/cars.csv", True),
        ("one-data", "training_data/cars.parquet", True),
        ("one-data", "training_data/a b+c%20ü.jsonl", True),
        ("one-data", "training_data/cars.xlsx", True),
        ("one-data", "inference_test/cars.json", False),
        ("one-data", "old/training_data/cars.json", False),
        ("two-data", "training_data/cars.jsonl", False),
    ],
)
def test_only_what_is_dropped_into_this_stacks_bucket_is_validated(
    transformed: Json, bucket: str, key: str, taken: bool
) -> None:
    dropped = event("aws.s3", "Object Created", {"bucket": {"name": bucket}, "object": {"key": key}})
    assert takers(transformed, stack("one"), "default", dropped) == ({"ValidateDatasetFunction"} if taken else set())


@pytest.mark.parametrize("function", ["start_training", "validate_dataset"])
def test_own_events_reach_the_functions_that_act_on_them_and_no_other_stack(transformed: Json, function: str) -> None:
    name = "".join(part.title() for part in function.split("_")) + "Function"
    for detail_type in OWN_RULES[function]:
        assert takers(transformed, stack("one"), "one", event("tunedrop", detail_type, {})) == {name}
        assert takers(transformed, stack("one"), "two", event("tunedrop", detail_type, {})) == set()


@pytest.mark.parametrize("detail_type", ["Champion Changed", "Undeploy Requested"])
def test_what_changes_a_lines_deployment_reaches_deploy_model(transformed: Json, detail_type: str) -> None:
    happened = event("tunedrop", detail_type, {"line": "cars"})
    assert takers(transformed, stack("one"), "one", happened) == {"DeployModelFunction"}


def test_a_stack_that_serves_no_model_has_nothing_for_it(transformed: Json) -> None:
    assert transformed["Conditions"]["ServesModels"] == {"Fn::Not": [{"Fn::Equals": [{"Ref": "EndpointInstanceType"}, ""]}]}
    assert transformed["Parameters"]["EndpointInstanceType"]["Default"] == ""
    resources = transformed["Resources"]
    serving = {name for name, resource in resources.items() if resource.get("Condition") == "ServesModels"}
    assert serving >= {name for name in resources if name.startswith("DeployModel")}
    others = json.dumps(without_serving({name: each for name, each in resources.items() if name not in serving}))
    assert [
        name for name in serving if f'"{name}"' in others or f"${{{name}" in others
    ] == []  # no such resource to refer to


@pytest.mark.parametrize(
    "detail_type",
    [
        *("Dataset Rejected", "Training Started", "Inference Tests Started"),
        *("Model Deployed", "Deployment Failed", "Model Rolled Back"),
    ],
)
def test_own_events_that_only_tell_people_reach_no_function(transformed: Json, detail_type: str) -> None:
    assert takers(transformed, stack("one"), "one", event("tunedrop", detail_type, {})) == set()


def test_jobs_without_network_need_an_image_that_has_it_all(transformed: Json) -> None:
    rule = transformed["Rules"]["IsolatedJobsInstallNothing"]
    assert rule["RuleCondition"] == {"Fn::Equals": [{"Ref": "EnableNetworkIsolation"}, "true"]}
    (assertion,) = rule["Assertions"]
    assert assertion["Assert"] == {"Fn::Not": [{"Fn::Equals": [{"Ref": "TrainingImageUri"}, ""]}]}
