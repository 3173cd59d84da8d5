"""The API itself: what is refused and how, listing, tags, the model registry, and the events' shape.

The client of these tests checks every answer against botocore's output shapes (see conftest).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from local_app.sagemaker.constraints import compiled

SPOT = {"EnableManagedSpotTraining": True}
G5 = {"InstanceType": "ml.g5.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50}
GROUPS = [{"InstanceType": "ml.g5.4xlarge", "InstanceCount": 1, "InstanceGroupName": "a"}]
KEY = "arn:aws:kms:us-east-1:000000000000:key/0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RoleArn": None}, 'Missing required parameter in input: "RoleArn"'),
        ({"Typo": "x"}, 'Unknown parameter in input: "Typo"'),
        ({"HyperParameters": {"lr": 0.1}}, "Invalid type for parameter HyperParameters.lr"),
        ({"TrainingJobName": "under_score"}, "at 'trainingJobName' failed .* Member must satisfy regular"),
        ({"TrainingJobName": "x" * 64}, "Member must have length less than or equal to 63"),
        ({"HyperParameters": {str(i): "1" for i in range(101)}}, "at 'hyperParameters' failed .* less than or equal to 100"),
        ({"HyperParameters": {"p": "x" * 2501}}, "at 'hyperParameters.p' failed .* less than or equal to 2500"),
        ({"HyperParameters": {"p": "two\nlines"}}, r"at 'hyperParameters.p' failed .* pattern: \.\*"),
        ({"Environment": {"1A": "x"}}, r"at 'environment \(key\)' failed"),
        ({"ResourceConfig": G5 | {"InstanceType": "ml.h100"}}, "at 'resourceConfig.instanceType' failed .* enum value set"),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 0}}, "Invalid value for .*MaxRuntimeInSeconds"),
        (SPOT, "Invalid MaxWaitTimeInSeconds"),
        (SPOT | {"StoppingCondition": {"MaxRuntimeInSeconds": 9, "MaxWaitTimeInSeconds": 8}}, "Invalid MaxWaitTime"),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 9, "MaxWaitTimeInSeconds": 9}}, "managed spot training only"),
        ({"ResourceConfig": G5 | {"VolumeKmsKeyId": KEY}}, "not supported for instance type ml.g5.4xlarge"),
        ({"ResourceConfig": {"InstanceCount": 1, "VolumeSizeInGB": 1}}, "either InstanceType or InstancePreferences"),
        ({"Tags": [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}]}, "Duplicate tag keys"),
        ({"specification": {"MetricDefinitions": [{"Name": "m", "Regex": "(1)"}] * 41}}, "less than or equal to 40"),
        ({"specification": {"MetricDefinitions": [{"Name": "m", "Regex": "(["}]}}, "Invalid regex in metric definition m"),
        ({"specification": {"AlgorithmName": "x"}}, "either TrainingImage or AlgorithmName"),
        ({"ResourceConfig": G5 | {"InstanceGroups": GROUPS}}, "emulator runs instances of one type"),
        ({"specification": {"TrainingInputMode": "Pipe"}}, "TrainingInputMode File and FastFile, not Pipe"),
        ({"specification": {"ContainerEntrypoint": None}}, "ContainerEntrypoint"),
        ({"CheckpointConfig": {"S3Uri": "s3://art/c", "LocalPath": "/data/c"}}, "LocalPath of the form /opt/ml/"),
    ],
)  # fmt: skip
def test_what_create_training_job_refuses(idle: Any, changes: dict[str, Any], message: str) -> None:
    request = idle.request("refused", "true", **changes)
    # The server is asked directly: botocore would keep some of these requests to itself.
    request = {key: value for key, value in request.items() if value is not None}
    specification = request["AlgorithmSpecification"]
    request["AlgorithmSpecification"] = {key: value for key, value in specification.items() if value is not None}
    status, answer = idle.post("CreateTrainingJob", request)
    assert (status, answer["__type"]) == (400, "ValidationException")
    assert re.search(message, answer["message"]), answer["message"]
    assert idle.client.list_training_jobs()["TrainingJobSummaries"] == []


def test_manifests_and_repeated_channels_are_refused(idle: Any) -> None:
    manifest, twice = idle.channel("a", "s3://art/m"), [idle.channel("a", "s3://art/a")] * 2
    manifest["DataSource"]["S3DataSource"]["S3DataType"] = "ManifestFile"
    for channels, message in (([manifest], "S3DataType S3Prefix"), (twice, "Duplicate channel")):
        with pytest.raises(ClientError, match=message):
            idle.create("refused", "true", InputDataConfig=channels)


def test_names_are_unique_and_unknown_jobs_are_not_found(local: Any) -> None:
    local.create("once", "true")
    for _ in range(2):
        with pytest.raises(local.client.exceptions.ResourceInUse, match="once exists already"):
            local.create("once", "true")
        local.wait("once")
    for call in (local.client.describe_training_job, local.client.stop_training_job):
        with pytest.raises(ClientError, match=r"ValidationException.*Requested resource not found"):
            call(TrainingJobName="unknown")
    with pytest.raises(ClientError, match=r"UnknownOperationException.*no operation ListModels\. It has: CreateTrainingJob"):
        local.client.list_models()
    assert local.post("DescribeTrainingJob", b"{no json")[1]["__type"] == "SerializationException"


def test_jobs_are_listed_by_name_status_and_page(local: Any) -> None:
    for name, script in (("ab-1", "true"), ("ab-2", "exit 1"), ("ab-3", "true"), ("other", "true")):
        local.wait(local.create(name, script))

    def names(**request: Any) -> list[str]:
        return [item["TrainingJobName"] for item in local.client.list_training_jobs(**request)["TrainingJobSummaries"]]

    assert names() == ["ab-1", "ab-2", "ab-3", "other"]
    assert names(NameContains="AB-", SortOrder="Descending") == ["ab-3", "ab-2", "ab-1"]
    assert names(StatusEquals="Failed") == ["ab-2"]
    hour_ago = local.describe("ab-2")["CreationTime"] - timedelta(hours=1)
    assert names(CreationTimeAfter=hour_ago, NameContains="ab-1") == ["ab-1"]
    assert names(CreationTimeBefore=hour_ago) == names(LastModifiedTimeBefore=hour_ago) == []
    pages = local.client.get_paginator("list_training_jobs").paginate(PaginationConfig={"PageSize": 3}, SortBy="Name")
    assert [len(page["TrainingJobSummaries"]) for page in pages] == [3, 1]
    with pytest.raises(ClientError, match="NextToken"):
        names(NextToken="!")


def test_events_have_aws_shape_and_come_once_per_change_in_order(local: Any) -> None:
    local.create("told", "exit 1", Tags=[{"Key": "run-id", "Value": "a b+c@d"}], HyperParameters={"run-id": "a-1"})
    job = local.wait("told")
    local.until(lambda: len(local.events) == len(local.statuses("told")))
    assert [event["detail"]["SecondaryStatus"] for event in local.events] == local.statuses("told")
    assert len({event["id"] for event in local.events}) == len(local.events)
    event = local.events[-1]
    detail = event.pop("detail")
    assert event | {"id": "", "time": ""} == {
        "version": "0",
        "id": "",
        "detail-type": "SageMaker Training Job State Change",
        "source": "aws.sagemaker",
        "account": "000000000000",
        "time": "",
        "region": "us-east-1",
        "resources": [job["TrainingJobArn"]],
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"])
    assert detail["Tags"] == {"run-id": "a b+c@d"}
    assert detail["CreationTime"] == int(job["CreationTime"].timestamp() * 1000)
    transition = detail["SecondaryStatusTransitions"][-1]
    assert (transition["Status"], type(transition["StartTime"])) == ("Failed", int)
    for member in (
        *("TrainingJobName", "TrainingJobArn", "TrainingJobStatus", "SecondaryStatus", "FailureReason", "RoleArn"),
        *("HyperParameters", "AlgorithmSpecification", "InputDataConfig", "OutputDataConfig", "ResourceConfig"),
        *("StoppingCondition", "ModelArtifacts"),
    ):
        assert detail[member] == job[member], member
    assert {"TrainingStartTime", "TrainingEndTime", "LastModifiedTime"} <= detail.keys()


def test_an_event_that_is_not_taken_is_tried_again_before_the_next(start: Callable[..., Any]) -> None:
    seen: list[str] = []

    def unreliable(event: dict[str, Any]) -> None:
        seen.append(event["detail"]["SecondaryStatus"])
        if len(seen) == 1:
            raise ConnectionError("not yet")

    local = start(on_state_change=unreliable)
    local.wait(local.create("again", "true"))
    local.until(lambda: seen[-1] == "Completed")
    assert seen == ["Starting", *local.statuses("again")]


def test_tags(local: Any) -> None:
    local.create("tagged", "true", Tags=[{"Key": "a", "Value": "1"}])
    arn = local.describe("tagged")["TrainingJobArn"]
    local.client.add_tags(ResourceArn=arn, Tags=[{"Key": "b", "Value": "2"}, {"Key": "a", "Value": "3"}])
    local.client.delete_tags(ResourceArn=arn, TagKeys=["b", "unknown"])
    assert local.client.list_tags(ResourceArn=arn)["Tags"] == [{"Key": "a", "Value": "3"}]
    with pytest.raises(ClientError, match="ValidationException"):
        local.client.list_tags(ResourceArn=arn + "x")


def test_the_model_registry(idle: Any) -> None:
    client = idle.client
    group = client.create_model_package_group(ModelPackageGroupName="tuned", Tags=[{"Key": "a", "Value": "1"}])
    assert client.list_tags(ResourceArn=group["ModelPackageGroupArn"])["Tags"] == [{"Key": "a", "Value": "1"}]
    with pytest.raises(ClientError, match="already exists"):
        client.create_model_package_group(ModelPackageGroupName="tuned")

    def create(**more: Any) -> str:
        container = {"Image": "image:1", "ModelDataSource": {"S3DataSource": {
            "S3Uri": "s3://art/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}}}  # fmt: skip
        specification = {"Containers": [container], "SupportedContentTypes": ["application/json"]}
        answer = client.create_model_package(
            ModelPackageGroupName="tuned",
            InferenceSpecification=specification | {"SupportedResponseMIMETypes": ["application/json"]},
            CustomerMetadataProperties={"run-id": "a-1"},
            **more,
        )
        return answer["ModelPackageArn"]

    first = create(ClientToken="a" * 36, ModelApprovalStatus="Approved")
    assert first == create(ClientToken="a" * 36, ModelApprovalStatus="Approved")
    with pytest.raises(client.exceptions.ConflictException):
        create(ClientToken="a" * 36, ModelApprovalStatus="Rejected")
    second = create()
    assert (first.rpartition(":")[2], second.rpartition(":")[2]) == ("model-package/tuned/1", "model-package/tuned/2")
    package = client.describe_model_package(ModelPackageName=second)
    assert (package["ModelPackageVersion"], package["ModelApprovalStatus"]) == (2, "PendingManualApproval")
    assert package["ModelPackageStatus"] == "Completed"

    client.update_model_package(
        ModelPackageArn=second,
        ModelApprovalStatus="Approved",
        ApprovalDescription="better",
        CustomerMetadataProperties={"lift": "0.4"},
        CustomerMetadataPropertiesToRemove=["run-id"],
    )
    package = client.describe_model_package(ModelPackageName=second)
    assert (package["ModelApprovalStatus"], package["CustomerMetadataProperties"]) == ("Approved", {"lift": "0.4"})

    pages = client.get_paginator("list_model_packages").paginate(
        ModelPackageGroupName="tuned", SortOrder="Descending", PaginationConfig={"PageSize": 1}
    )
    assert [item["ModelPackageVersion"] for page in pages for item in page["ModelPackageSummaryList"]] == [2, 1]
    assert client.list_model_packages(ModelApprovalStatus="Approved")["ModelPackageSummaryList"] == []
    with pytest.raises(client.exceptions.ConflictException, match="still contains"):
        client.delete_model_package_group(ModelPackageGroupName="tuned")
    client.delete_model_package(ModelPackageName=second)
    assert create().endswith("tuned/3"), "a version number was used twice"
    for arn in (first, first.replace("/1", "/3")):
        client.delete_model_package(ModelPackageName=arn)
    with pytest.raises(ClientError, match="does not exist"):
        client.describe_model_package(ModelPackageName=first)
    client.delete_model_package_group(ModelPackageGroupName="tuned")
    assert client.list_model_package_groups()["ModelPackageGroupSummaryList"] == []
    with pytest.raises(ClientError, match="Model Package Group tuned does not exist"):
        create()


def test_every_pattern_of_the_supported_operations_compiles(supported_shapes: list[Any]) -> None:
    seen: set[str] = set()

    def visit(shape: Any) -> None:
        if shape.name in seen:
            return
        seen.add(shape.name)
        if pattern := shape.metadata.get("pattern"):
            compiled(pattern)
        members = getattr(shape, "members", {}).values()
        for child in (*members, *(getattr(shape, name, None) for name in ("member", "key", "value"))):
            if child is not None:
                visit(child)

    for shape in supported_shapes:
        visit(shape)
    assert len(seen) > 300
