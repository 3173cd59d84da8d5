"""Model packages: their events, the rules of their approval, their lists, and the permissions of all that."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from local_app.sagemaker.permissions import RequiredPermission, required_permissions

PREFIX = "arn:aws:sagemaker:us-east-1:000000000000"
CONTAINER = {"Image": "image:1", "ModelDataSource": {"S3DataSource": {
    "S3Uri": "s3://art/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}}}  # fmt: skip
SPECIFICATION = {
    "Containers": [CONTAINER],
    "SupportedContentTypes": ["application/json"],
    "SupportedResponseMIMETypes": ["application/json"],
}
# The members of AWS's sample (docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html) that a
# package of this registry has, and of the schema registry. The sample's ModelLifeCycle and MetadataProperties are optional.
DETAIL = {
    *("ModelPackageGroupName", "ModelPackageVersion", "ModelPackageArn", "CreationTime", "InferenceSpecification"),
    *("ModelPackageStatus", "ModelPackageStatusDetails", "ModelApprovalStatus", "ModelPackageName", "Tags"),
}


def register(client: Any, group: str = "tuned", **more: Any) -> str:
    answer = client.create_model_package(ModelPackageGroupName=group, InferenceSpecification=SPECIFICATION, **more)
    return str(answer["ModelPackageArn"])


@pytest.fixture
def group(idle: Any) -> Iterator[str]:
    """A group of its own for each test, empty again afterwards."""
    name = "listed"
    idle.client.create_model_package_group(ModelPackageGroupName=name)
    yield name
    pages = idle.client.get_paginator("list_model_packages").paginate(ModelPackageGroupName=name)
    for item in [item for page in pages for item in page["ModelPackageSummaryList"]]:
        idle.client.delete_model_package(ModelPackageName=item["ModelPackageArn"])
    idle.client.delete_model_package_group(ModelPackageGroupName=name)


def test_each_change_of_a_package_is_an_event_in_awss_shape(local: Any) -> None:
    tags = [{"Key": "team", "Value": "a"}]
    local.client.create_model_package_group(ModelPackageGroupName="tuned", Tags=tags)
    arn = register(local.client, ModelApprovalStatus="PendingManualApproval", ModelPackageDescription="cars")
    local.client.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved", ApprovalDescription="better")
    local.client.update_model_package(ModelPackageArn=arn, CustomerMetadataProperties={"lift": "0.4"})
    local.client.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Rejected")
    package = local.client.describe_model_package(ModelPackageName=arn)
    local.client.delete_model_package(ModelPackageName=arn)
    local.until(lambda: len(local.events) == 5)

    created, *updated, deleted = local.events
    assert [(event["detail-type"], event["source"], event["resources"]) for event in local.events] == [
        ("SageMaker Model Package State Change", "aws.sagemaker", [arn])
    ] * 5
    assert len({event["id"] for event in local.events}) == 5
    assert created["detail"].keys() == DETAIL | {"ModelPackageDescription"}
    assert {key for event in updated for key in event["detail"]} == created["detail"].keys() | {
        "UpdatedModelPackageFields",
        "LastModifiedTime",
    }
    statuses = [event["detail"]["ModelApprovalStatus"] for event in local.events]
    assert statuses == ["PendingManualApproval", "Approved", "Approved", "Rejected", "Rejected"]
    assert [event["detail"]["UpdatedModelPackageFields"] for event in updated] == [
        ["ModelApprovalStatus", "ApprovalDescription"],
        ["CustomerMetadataProperties"],
        ["ModelApprovalStatus"],
    ]
    said = updated[-1]["detail"]
    for member in ("ModelPackageGroupName", "ModelPackageVersion", "ModelPackageArn", "InferenceSpecification"):
        assert said[member] == package[member], member
    assert said["CreationTime"] == package["CreationTime"].astimezone().strftime("%Y-%m-%dT%H:%M:%SZ")
    assert updated[-1]["time"] == said["LastModifiedTime"]
    assert said["Tags"] == tags
    assert (deleted["detail"]["ModelPackageStatus"], said["ModelPackageStatus"]) == ("Deleting", "Completed")


@pytest.mark.parametrize("name", ["publish_results.package_approved", "publish_results.package_rejected"])
def test_the_sample_events_are_what_the_registry_sends(
    local: Any, load_event: Callable[[str], dict[str, Any]], name: str
) -> None:
    sample = load_event(name)
    said = sample["detail"]
    local.client.create_model_package_group(ModelPackageGroupName=said["ModelPackageGroupName"])
    same = ("ModelPackageGroupName", "ModelPackageDescription", "InferenceSpecification", "ModelMetrics")
    for _ in range(said["ModelPackageVersion"]):
        arn = local.client.create_model_package(**{member: said[member] for member in same})["ModelPackageArn"]
    local.client.update_model_package(
        ModelPackageArn=arn, ModelApprovalStatus=said["ModelApprovalStatus"], ApprovalDescription="by hand"
    )
    event = local.until(lambda: next((each for each in local.events if "LastModifiedTime" in each["detail"]), None))
    changing = {"ModelPackageArn", "CreationTime", "LastModifiedTime"}  # the account and the times
    assert event.keys() == sample.keys()
    assert event["detail"].keys() == said.keys()
    assert [(key, event["detail"][key]) for key in said.keys() - changing] == [
        (key, said[key]) for key in said.keys() - changing
    ]


def test_a_refused_change_has_no_event(local: Any) -> None:
    local.client.create_model_package_group(ModelPackageGroupName="tuned")
    arn = register(local.client, ClientToken="a")
    assert register(local.client, ClientToken="a") == arn  # no second package, and no second event
    with pytest.raises(ClientError):
        local.client.update_model_package(ModelPackageArn=f"{arn}0", ModelApprovalStatus="Approved")
    with pytest.raises(ClientError, match="has its group's tags"):
        register(local.client, Tags=[{"Key": "team", "Value": "a"}])
    local.client.update_model_package(ModelPackageArn=arn, CustomerMetadataProperties={str(n): "x" for n in range(50)})
    with pytest.raises(ClientError, match="at most 50 CustomerMetadataProperties"):
        local.client.update_model_package(ModelPackageArn=arn, CustomerMetadataProperties={"one": "more"})
    local.client.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")
    local.until(lambda: len(local.events) == 3)
    statuses = [event["detail"]["ModelApprovalStatus"] for event in local.events]
    assert statuses == ["PendingManualApproval", "PendingManualApproval", "Approved"]


def test_the_events_of_packages_survive_a_kill(
    command: Callable[..., tuple[subprocess.Popen[bytes], Any]], sink: Any
) -> None:
    sink.broken = True
    process, local = command()
    local.client.create_model_package_group(ModelPackageGroupName="tuned")
    arn = register(local.client)
    local.client.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sink.events == []
    sink.broken = False
    command()
    local.until(lambda: len(sink.events) == 2)
    assert [event["detail"]["ModelApprovalStatus"] for event in sink.events] == ["PendingManualApproval", "Approved"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ModelApprovalStatus": "APPROVED"}, "enum value set: .Approved, Rejected, PendingManualApproval"),
    ({"ApprovalDescription": "x" * 1025}, "length less than or equal to 1024"),
    ({"ApprovalDescription": "two\nlines"}, "regular expression pattern"),
    ({"CustomerMetadataProperties": {}}, "length greater than or equal to 1"),
    ({"CustomerMetadataProperties": {"a": ""}}, "valid min length: 1"),
    ({"ModelPackageDescription": "other"}, "Unknown parameter"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_an_update_may_not_say(idle: Any, group: str, change: dict[str, Any], problem: str) -> None:
    arn = register(idle.client, group)
    status, answer = idle.post("UpdateModelPackage", {"ModelPackageArn": arn} | change)
    assert (status, answer["__type"]) == (400, "ValidationException")
    assert re.search(problem, answer["message"])
    assert (
        idle.client.describe_model_package(ModelPackageName=arn).keys() & {"ApprovalDescription", "LastModifiedTime"}
        == set()
    )


def test_only_versions_of_a_group_are_approved_and_additions_have_a_limit(idle: Any, group: str) -> None:
    single = idle.client.create_model_package(ModelPackageName="single", InferenceSpecification=SPECIFICATION)
    with pytest.raises(ClientError, match="not a versioned model package"):
        idle.client.update_model_package(ModelPackageArn=single["ModelPackageArn"], ModelApprovalStatus="Approved")
    idle.client.delete_model_package(ModelPackageName="single")

    arn = register(idle.client, group)
    more = {"Name": "other", "Containers": [CONTAINER]}
    for count in (8, 7):
        idle.client.update_model_package(ModelPackageArn=arn, AdditionalInferenceSpecificationsToAdd=[more] * count)
    with pytest.raises(ClientError, match="at most 15 AdditionalInferenceSpecifications"):
        idle.client.update_model_package(ModelPackageArn=arn, AdditionalInferenceSpecificationsToAdd=[more])


@pytest.mark.parametrize("order", ["Ascending", "Descending"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_lists_are_in_the_order_of_creation_whatever_changed_later(idle: Any, group: str, order: str, size: int) -> None:
    arns = [
        register(idle.client, group, ModelApprovalStatus=status) for status in ["Approved", "Rejected"] * 2 + ["Approved"]
    ]
    idle.client.update_model_package(ModelPackageArn=arns[0], ModelApprovalStatus="Approved", ApprovalDescription="again")

    def versions(**filters: Any) -> list[list[int]]:
        pages = idle.client.get_paginator("list_model_packages").paginate(
            ModelPackageGroupName=group,
            SortBy="CreationTime",
            SortOrder=order,
            PaginationConfig={"PageSize": size},
            **filters,
        )
        return [[item["ModelPackageVersion"] for item in page["ModelPackageSummaryList"]] for page in pages]

    def paged(numbers: list[int]) -> list[list[int]]:
        numbers = numbers if order == "Ascending" else numbers[::-1]
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    assert versions() == paged([1, 2, 3, 4, 5])
    assert versions(ModelApprovalStatus="Approved") == paged([1, 3, 5])
    assert versions(ModelApprovalStatus="PendingManualApproval") == [[]]


def test_a_list_without_sizes_and_orders_is_ten_of_the_oldest(idle: Any, group: str) -> None:
    for _ in range(11):
        register(idle.client, group)
    page = idle.client.list_model_packages(ModelPackageGroupName=f"{PREFIX}:model-package-group/{group}")
    assert [item["ModelPackageVersion"] for item in page["ModelPackageSummaryList"]] == list(range(1, 11))
    rest = idle.client.list_model_packages(ModelPackageGroupName=group, NextToken=page["NextToken"])
    assert [item["ModelPackageVersion"] for item in rest["ModelPackageSummaryList"]] == [11]
    assert "NextToken" not in rest
    with pytest.raises(ClientError, match="does not exist"):
        idle.client.list_model_packages(ModelPackageGroupName="unknown")
    with pytest.raises(ClientError, match="NextToken"):
        idle.client.list_model_packages(ModelPackageGroupName=group, NextToken="mine")


# Resource types: https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemakerai.html.
# AWS's policy for another account gives ListModelPackages on the versions, too
# (https://docs.aws.amazon.com/sagemaker/latest/dg/model-registry-version.html).
PERMISSIONS: list[tuple[str, dict[str, Any], list[tuple[str, dict[str, str]]]]] = [
    ("ListModelPackages", {"ModelPackageGroupName": "tuned"}, [("model-package/tuned/*", {})]),
    ("ListModelPackages", {"ModelPackageGroupName": f"{PREFIX}:model-package-group/tuned"}, [("model-package/tuned/*", {})]),
    ("ListModelPackages", {}, [("model-package/*", {})]),
    ("DescribeModelPackage", {"ModelPackageName": f"{PREFIX}:model-package/tuned/3"}, [("model-package/tuned/3", {})]),
    ("DescribeModelPackage", {"ModelPackageName": "single"}, [("model-package/single", {})]),
    ("DeleteModelPackage", {"ModelPackageName": f"{PREFIX}:model-package/tuned/3"}, [("model-package/tuned/3", {})]),
    (
        "UpdateModelPackage",
        {"ModelPackageArn": f"{PREFIX}:model-package/tuned/3", "ModelApprovalStatus": "Approved"},
        [("model-package/tuned/3", {"sagemaker:ModelApprovalStatus": "Approved"})],
    ),
    (
        "UpdateModelPackage",
        {"ModelPackageArn": f"{PREFIX}:model-package/tuned/3", "ApprovalDescription": "x"},
        [("model-package/tuned/3", {})],
    ),
    (
        "CreateModelPackage",
        {"ModelPackageGroupName": "tuned", "ModelApprovalStatus": "Rejected"},
        [
            ("model-package-group/tuned", {"sagemaker:ModelApprovalStatus": "Rejected"}),
            ("model-package/tuned/1", {"sagemaker:ModelApprovalStatus": "Rejected"}),
        ],
    ),
]


@pytest.mark.parametrize(
    ("operation", "request_", "expected"), PERMISSIONS, ids=[f"{o}-{len(r)}" for o, r, _ in PERMISSIONS]
)
def test_the_permissions_of_model_packages(
    operation: str, request_: dict[str, Any], expected: list[tuple[str, dict[str, str]]]
) -> None:
    assert required_permissions(operation, request_, PREFIX) == [
        RequiredPermission(f"sagemaker:{operation}", f"{PREFIX}:{resource}", context) for resource, context in expected
    ]
