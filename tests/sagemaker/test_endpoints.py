"""Models, endpoints and inference components: what is refused and how, and their states.

A test with a URL holds the emulator to a sentence of that page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError
from components import COMPUTE, IMAGE, ROLE, VARIANT, Serving, is_alive

ARN = "arn:aws:sagemaker:us-east-1:000000000000"
ADAPTER = {"BaseInferenceComponentName": "base"}
KINDS = {
    "model": "Model",
    "endpoint-config": "EndpointConfig",
    "endpoint": "Endpoint",
    "inference-component": "InferenceComponent",
}
WORDS = {"endpoint-config": "endpoint configuration", "inference-component": "inference component"}


def refused(call: Callable[..., Any], message: str, code: str = "ValidationException", **request: Any) -> None:
    with pytest.raises(ClientError, match=message) as error:
        call(**request)
    assert error.value.response["Error"]["Code"] == code


@pytest.mark.parametrize("kind", KINDS)
def test_a_taken_and_an_unknown_name_are_refused_in_aws_words(shared: Serving, kind: str) -> None:
    operation, words = KINDS[kind], WORDS.get(kind, kind)
    taken = {"model": "base-model", "endpoint-config": "ep-config", "endpoint": "ep", "inference-component": "base"}[kind]
    create = {
        "model": lambda: shared.model(taken),
        "endpoint-config": lambda: shared.client.create_endpoint_config(
            EndpointConfigName=taken, ExecutionRoleArn=ROLE, ProductionVariants=[VARIANT]
        ),
        "endpoint": lambda: shared.client.create_endpoint(EndpointName=taken, EndpointConfigName="ep-config"),
        "inference-component": lambda: shared.base(model="base-model", wait=False),
    }[kind]
    refused(create, re.escape(f'Cannot create already existing {words} "{ARN}:{kind}/{taken}".'))
    member = f"{operation}Name"
    for verb in ("describe", "delete"):
        call = getattr(shared.client, f"{verb}_{kind.replace('-', '_')}")
        refused(call, re.escape(f'Could not find {words} "{ARN}:{kind}/none".'), **{member: "none"})


@pytest.mark.breaks_the_model
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ModelName": "-"}, "at 'modelName' failed .* regular expression"),
        ({"PrimaryContainer": {"Environment": {}}}, "either an Image or a ModelPackageName"),
        # API_S3ModelDataSource: "A valid key name prefix identified by S3Uri always ends with a forward slash (/)."
        ({"PrimaryContainer": Serving.container("s3://art/models/m")}, "must end with a slash"),
        ({"PrimaryContainer": Serving.container("s3://art/nothing/")}, "Could not find model data at s3://art/nothing/"),
        ({"PrimaryContainer": Serving.container("s3://art/models/m/", LONG="x" * 1025)}, "1024"),
        ({"ExecutionRoleArn": "arn:aws:iam::123456789012:user/nobody"}, "at 'executionRoleArn' failed"),
    ],
)
def test_what_create_model_refuses(shared: Serving, changes: dict[str, Any], message: str) -> None:
    shared.s3.put_object(Bucket="art", Key="models/m/version", Body="base")
    request = {"ModelName": "refused", "PrimaryContainer": Serving.container("s3://art/models/m/")} | changes
    status, answer = shared.local.post("CreateModel", request)
    assert (status, answer["__type"]) == (400, "ValidationException")
    assert re.search(message, answer["message"]), answer["message"]


@pytest.mark.breaks_the_model
@pytest.mark.parametrize(
    ("changes", "variant", "message"),
    [
        ({"ExecutionRoleArn": None}, {}, "ExecutionRoleArn is required .* no ModelName"),
        ({}, {"ModelName": "base-model"}, "inference components: leave out the variant's ModelName"),
        ({}, {"InitialInstanceCount": 0}, "at 'productionVariants.1.member.initialInstanceCount' failed|Invalid value"),
        ({}, {"InitialInstanceCount": 3}, "InitialInstanceCount must be between"),
        ({}, {"InferenceAmiVersion": "al2030"}, "enum value set"),
        ({}, {"InstanceType": "ml.h100"}, "enum value set"),
        ({"AsyncInferenceConfig": {"OutputConfig": {}}}, {}, "without AsyncInferenceConfig"),
    ],
)
def test_what_create_endpoint_config_refuses(
    shared: Serving, changes: dict[str, Any], variant: dict[str, Any], message: str
) -> None:
    request = {
        "EndpointConfigName": "refused",
        "ExecutionRoleArn": ROLE,
        "ProductionVariants": [VARIANT | variant],
    } | changes
    status, answer = shared.local.post("CreateEndpointConfig", {k: v for k, v in request.items() if v is not None})
    assert (status, answer["__type"]) == (400, "ValidationException")
    assert re.search(message, answer["message"]), answer["message"]


@pytest.mark.breaks_the_model
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"InferenceComponentName": "x" * 64}, "length less than or equal to 63"),
        ({"EndpointName": "none"}, 'Could not find endpoint "'),
        ({"VariantName": "other"}, "Could not find variant other"),
        ({"VariantName": None}, "VariantName is required"),
        ({"RuntimeConfig": None}, "RuntimeConfig is required"),
        ({"Specification": {"ComputeResourceRequirements": COMPUTE}}, "must have a ModelName"),
        ({"Specification": {"ModelName": "base-model"}}, "must have ComputeResourceRequirements"),
        ({"Specification": {"ModelName": "none", "ComputeResourceRequirements": COMPUTE}}, 'Could not find model "'),
        (
            {"Specification": {"ModelName": "base-model", "ComputeResourceRequirements": {"MinMemoryRequiredInMb": 1}}},
            "at 'specification.computeResourceRequirements.minMemoryRequiredInMb' failed|Invalid value",
        ),
        (
            {"Specification": ADAPTER | {"Container": {"ArtifactUrl": "s3://art/adapters/one.tar.gz"}}},
            "omit RuntimeConfig",  # it has the copies of its base
        ),
    ],
)
def test_what_create_inference_component_refuses(shared: Serving, changes: dict[str, Any], message: str) -> None:
    request = {
        "InferenceComponentName": "refused",
        "EndpointName": "ep",
        "VariantName": "AllTraffic",
        "Specification": {"ModelName": "base-model", "ComputeResourceRequirements": COMPUTE},
        "RuntimeConfig": {"CopyCount": 1},
    } | changes
    status, answer = shared.local.post("CreateInferenceComponent", {k: v for k, v in request.items() if v is not None})
    assert (status, answer["__type"]) == (400, "ValidationException")
    assert re.search(message, answer["message"]), answer["message"]


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        # InferenceComponentContainerSpecification: "This path must point to a single gzip compressed tar archive (.tar.gz
        # suffix)."
        ({"Container": {"ArtifactUrl": "s3://art/adapters/"}}, r"\.tar\.gz suffix"),
        ({"Container": {"ArtifactUrl": "s3://art/none.tar.gz"}}, "Could not find model data at s3://art/none.tar.gz"),
        ({}, r"needs Container\.ArtifactUrl"),
        # "Omit this parameter if your request is meant to create an adapter inference component."
        ({"Container": {"ArtifactUrl": "s3://art/a.tar.gz"}, "ComputeResourceRequirements": COMPUTE}, "omit ModelName and"),
        # "Before you can create an adapter inference component, you must have an existing inference component".
        ({"BaseInferenceComponentName": "none"}, 'Could not find inference component "'),
    ],
)
def test_what_an_adapter_may_not_be(shared: Serving, specification: dict[str, Any], message: str) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_InferenceComponentSpecification.html"""
    good = ADAPTER | ({"Container": {"ArtifactUrl": shared.archive("one")}} if specification.keys() & ADAPTER.keys() else {})
    refused(
        shared.client.create_inference_component,
        message,
        InferenceComponentName="refused",
        EndpointName="ep",
        Specification=good | specification,
    )


def test_a_base_is_a_component_with_a_model_on_the_same_endpoint(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base(copies=0)
    serving.adapter("line", "one")
    serving.endpoint("other")
    for base, endpoint in (("line", "ep"), ("base", "other")):
        with pytest.raises(ClientError, match="is no base inference component on endpoint"):
            serving.adapter("refused", "one", base=base, endpoint=endpoint)


def test_an_endpoint_is_created_and_deleted_with_events_of_aws_shape(hosted: Callable[..., Serving]) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html"""
    serving = hosted()
    client, events = serving.client, serving.local.events
    described = client.describe_endpoint(EndpointName="ep")
    [variant] = described["ProductionVariants"]
    assert (variant["CurrentInstanceCount"], variant["VariantName"]) == (0, "AllTraffic")
    client.add_tags(ResourceArn=described["EndpointArn"], Tags=[{"Key": "line", "Value": "a"}])
    client.delete_endpoint(EndpointName="ep")
    serving.local.until(lambda: client.list_endpoints(NameContains="ep")["Endpoints"] == [])
    serving.local.until(lambda: len(events) == 3)
    assert [event["detail"]["EndpointStatus"] for event in events] == ["CREATING", "IN_SERVICE", "DELETING"]
    event = events[2]
    assert {name: event[name] for name in ("detail-type", "source", "resources", "region", "account")} == {
        "detail-type": "SageMaker Endpoint State Change",
        "source": "aws.sagemaker",
        "resources": [described["EndpointArn"]],
        "region": "us-east-1",
        "account": "000000000000",
    }
    detail = event["detail"]
    assert (detail["EndpointName"], detail["EndpointConfigName"], detail["Tags"]) == ("ep", "ep-config", {"line": "a"})
    assert {"DesiredWeight": 1.0, "DesiredInstanceCount": 1}.items() <= detail["ProductionVariants"][0].items()
    assert detail["CreationTime"] == pytest.approx(described["CreationTime"].timestamp() * 1000, abs=1)


def test_an_instance_type_without_capacity_fails_the_endpoint(hosted: Callable[..., Serving]) -> None:
    serving = hosted(without_capacity=["ml.g6.xlarge"])
    client = serving.client
    variant = VARIANT | {"InstanceType": "ml.g6.xlarge"}
    client.create_endpoint_config(EndpointConfigName="g6", ExecutionRoleArn=ROLE, ProductionVariants=[variant])
    client.create_endpoint(EndpointName="g6", EndpointConfigName="g6")
    serving.local.until(lambda: client.describe_endpoint(EndpointName="g6")["EndpointStatus"] == "Failed")
    assert "InsufficientInstanceCapacity" in client.describe_endpoint(EndpointName="g6")["FailureReason"]
    serving.local.until(lambda: serving.local.events[-1]["detail"]["EndpointStatus"] == "FAILED")
    refused(
        serving.base,
        "on endpoint .* in status Failed",
        name="refused",
        endpoint="g6",
        model=serving.model("model"),
    )
    client.delete_endpoint(EndpointName="g6")


def test_endpoints_have_a_quota_of_their_own(hosted: Callable[..., Serving]) -> None:
    """https://docs.aws.amazon.com/general/latest/gr/sagemaker.html"""
    serving = hosted(quotas={"ml.g5.xlarge for endpoint usage": 1})
    with pytest.raises(ClientError, match=r"'ml\.g5\.xlarge for endpoint usage' is 1 Inst") as error:
        serving.endpoint("second")
    assert error.value.response["Error"]["Code"] == "ResourceLimitExceeded"


def test_what_changes_is_neither_updated_nor_deleted(hosted: Callable[..., Serving]) -> None:
    """SageMaker's messages: https://github.com/huggingface/skills, and Terraform's aws_sagemaker_inference_component."""
    serving = hosted(startup_limit=2)
    client = serving.client
    serving.base(model=serving.model("slow", UNHEALTHY="1"), wait=False)
    assert serving.describe("base")["InferenceComponentStatus"] == "Creating"
    change: dict[str, Any] = {"InferenceComponentName": "base", "DesiredRuntimeConfig": {"CopyCount": 2}}
    refused(client.delete_inference_component, "Cannot delete .* in state CREATE_IN_PROGRESS", InferenceComponentName="base")
    refused(client.update_inference_component_runtime_config, "Cannot update .* in state CREATE_IN_PROGRESS", **change)
    refused(serving.adapter, "base inference component .* is in status Creating", name="line", version="one")
    failed = serving.settled("base")
    assert failed["InferenceComponentStatus"] == "Failed"
    assert "did not pass the ping health check" in failed["FailureReason"]
    assert failed["RuntimeConfig"]["CurrentCopyCount"] == 0
    refused(client.update_inference_component_runtime_config, "in status Failed", **change)
    serving.gone("base")


def test_an_update_of_copies_is_in_progress_until_they_are_healthy(hosted: Callable[..., Serving]) -> None:
    serving = hosted(startup_limit=1)
    serving.base(model=serving.model("slow", UNHEALTHY="1"), copies=0)
    change: dict[str, Any] = {"InferenceComponentName": "base", "DesiredRuntimeConfig": {"CopyCount": 1}}
    serving.client.update_inference_component_runtime_config(**change)
    described = serving.describe("base")
    assert (described["InferenceComponentStatus"], described["RuntimeConfig"]) == (
        "Updating",
        {"DesiredCopyCount": 1, "CurrentCopyCount": 0},
    )
    refused(
        serving.client.update_inference_component_runtime_config, "Cannot update .* in state UPDATE_RC_IN_PROGRESS", **change
    )
    settled = serving.settled("base")
    assert (settled["InferenceComponentStatus"], settled["RuntimeConfig"]["DesiredCopyCount"]) == ("InService", 0)
    assert "did not pass the ping health check" in settled["FailureReason"]


def test_a_base_goes_after_its_adapters(shared: Serving) -> None:
    shared.adapter("line", "one")
    listed = shared.client.list_inference_components(EndpointNameEquals="ep", SortBy="Name")["InferenceComponents"]
    assert [(item["InferenceComponentName"], item["InferenceComponentStatus"]) for item in listed] == [
        ("base", "InService"),
        ("line", "InService"),
    ]
    assert shared.client.list_inference_components(EndpointNameEquals="other")["InferenceComponents"] == []
    message = "is a base inference component for one or more associated"
    refused(shared.client.delete_inference_component, message, InferenceComponentName="base")
    shared.gone("line")


def test_components_outlive_their_endpoint_and_block_their_names(hosted: Callable[..., Serving]) -> None:
    """https://github.com/huggingface/skills: "delete-endpoint does not delete the components"."""
    serving = hosted()
    serving.base()
    pid = serving.ask("base")["pid"]
    serving.client.delete_endpoint(EndpointName="ep")
    serving.local.until(lambda: serving.client.list_endpoints()["Endpoints"] == [])
    assert serving.describe("base")["InferenceComponentStatus"] == "InService"
    serving.local.until(lambda: not is_alive(pid))
    with pytest.raises(ClientError, match="Endpoint ep of account 000000000000 not found"):
        serving.ask("base")
    serving.client.delete_endpoint_config(EndpointConfigName="ep-config")
    serving.endpoint()
    with pytest.raises(ClientError, match="Cannot create already existing inference component"):
        serving.base(model="base-model")
    serving.gone("base")
    serving.base(model="base-model")


def test_more_copies_than_the_instances_hold_are_refused(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base(copies=1)
    settled = serving.scale("base", 3)  # two instances of one accelerator at most
    assert settled["RuntimeConfig"] == {"DesiredCopyCount": 1, "CurrentCopyCount": 1}
    assert "There is not enough hardware resources on the instances for this endpoint" in settled["FailureReason"]
    assert serving.scale("base", 2)["RuntimeConfig"]["CurrentCopyCount"] == 2
    [variant] = serving.client.describe_endpoint(EndpointName="ep")["ProductionVariants"]
    assert (variant["CurrentInstanceCount"], variant["DesiredInstanceCount"]) == (2, 2)


def test_a_model_of_a_package_has_the_packages_files_and_environment(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    client = serving.client
    serving.s3.put_object(Bucket="art", Key="models/packaged/version", Body="packaged")
    client.create_model_package_group(ModelPackageGroupName="tuned")
    package = client.create_model_package(
        ModelPackageGroupName="tuned",
        InferenceSpecification={
            "Containers": [serving.container("s3://art/models/packaged/")],
            "SupportedContentTypes": ["application/json"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
    )["ModelPackageArn"]
    client.create_model(ModelName="packaged", PrimaryContainer={"ModelPackageName": package}, ExecutionRoleArn=ROLE)
    serving.base(model="packaged")
    assert serving.ask("base")["version"] == "packaged"


def test_a_model_of_the_hub_is_the_containers_to_fetch(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    container = {"Image": IMAGE, "Environment": {"SM_VLLM_MODEL": "team/model", "SM_VLLM_REVISION": "main"}}
    serving.client.create_model(ModelName="hub", PrimaryContainer=container)
    serving.base(model="hub")
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children()]
    assert any("--model team/model --port" in command for command in commands)
