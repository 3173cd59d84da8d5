"""AWS's documented rules for a training job's request, one sentence a test: the emulator accepts what AWS accepts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

G5, G6 = "ml.g5.4xlarge", "ml.g6e.4xlarge"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch"


def on(*types: str, count: int | None = 1, counts: tuple[int | None, ...] = ()) -> dict[str, Any]:
    """ResourceConfig of one type, or of a list of types with their `counts`."""
    if len(types) == 1:
        return {"InstanceType": types[0], "InstanceCount": count, "VolumeSizeInGB": 1}
    entries = [
        {"InstanceType": name} | ({"InstanceCount": each} if each else {})
        for name, each in zip(types, counts or (None,) * len(types), strict=True)
    ]
    return {"InstancePreferences": entries, "VolumeSizeInGB": 1} | ({"InstanceCount": count} if count else {})


def spot(name: str = G5) -> dict[str, Any]:
    limits = {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60}
    return {"ResourceConfig": on(name), "EnableManagedSpotTraining": True, "StoppingCondition": limits}


# --- quotas: "Service quotas" in sagemaker/latest/dg/train-instance-preferences.html, and the message that users quote ---


def test_a_quota_is_of_one_instance_type(start: Callable[..., Any]) -> None:
    local = start(quotas={f"{G5} for training job usage": 1})
    local.create("first", "sleep 60", ResourceConfig=on(G5))
    local.create("other-type", "sleep 60", ResourceConfig=on(G6))
    with pytest.raises(local.client.exceptions.ResourceLimitExceeded) as refused:
        local.create("second", "true", ResourceConfig=on(G5))
    assert refused.value.response["Error"]["Message"].startswith(
        f"The account-level service limit '{G5} for training job usage' is 1 Instances, with current utilization of "
        "1 Instances and a request delta of 1 Instances. Please use AWS Service Quotas to request an increase"
    )
    local.client.stop_training_job(TrainingJobName="first")
    local.wait("first")
    local.create("third", "true", ResourceConfig=on(G5))


def test_spot_and_on_demand_are_counted_apart(start: Callable[..., Any]) -> None:
    local = start(quotas={f"{G5} for spot training job usage": 0})
    with pytest.raises(local.client.exceptions.ResourceLimitExceeded, match=f"'{G5} for spot training job usage' is 0"):
        local.create("spot", "true", **spot())
    local.create("on-demand", "true", ResourceConfig=on(G5))


def test_each_types_quota_must_cover_the_instance_count(start: Callable[..., Any]) -> None:
    local = start(quotas={f"{G5} for training job usage": 1})
    with pytest.raises(local.client.exceptions.ResourceLimitExceeded, match="a request delta of 2 Instances"):
        local.create("two", "true", ResourceConfig=on(G5, count=2))


def test_a_list_is_refused_if_any_type_falls_short_even_behind_one_that_would_have_done(start: Callable[..., Any]) -> None:
    local = start(quotas={f"{G5} for training job usage": 0})
    with pytest.raises(local.client.exceptions.ResourceLimitExceeded, match=f"'{G5} for training job usage' is 0"):
        local.create("list", "true", ResourceConfig=on(G6, G5))
    local.create("alone", "true", ResourceConfig=on(G6))


# --- preference lists: the same page, and InstancePreference in the API reference ---


@pytest.mark.breaks_the_model
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ResourceConfig": on(G5, G6, counts=(1, 1))}, "and not in both"),
        ({"ResourceConfig": on(G5, G6, count=None)}, "InstanceCount must be in"),
        ({"ResourceConfig": on(G5, G6, count=None, counts=(1, None))}, "InstanceCount must be in"),
        ({"ResourceConfig": on(G5, G5)}, "can appear only once"),
        ({"ResourceConfig": on(G5, G6) | {"InstanceType": G5}}, "either InstanceType or InstancePreferences"),
        (spot() | {"ResourceConfig": on(G5, G6)}, "cannot be used with managed spot training"),
        ({"ResourceConfig": on(*(f"ml.g5.{size}xlarge" for size in (2, 4, 8, 12, 16, 24)))}, "less than or equal to 5"),
    ],
)
def test_what_a_preference_list_may_not_be(idle: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClientError, match=message) as refused:
        idle.create("refused", "true", **changes)
    assert refused.value.response["Error"]["Code"] == "ValidationException"


# --- images: AlgorithmSpecification in the API reference ---


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (f"{IMAGE}:2.13-cu133-amzn2023-sagemaker", ""),
        (f"{IMAGE}@sha256:{'0f' * 32}", ""),
        ("123456789012.dkr.ecr.us-east-1.amazonaws.com/team/tunedrop:1", ""),
        (f"{IMAGE}@sha256:short", "is invalid"),
        (f"{IMAGE}:", "is invalid"),
        (f"{IMAGE.replace('us-east-1', 'eu-west-1')}:1", "is not in the region of the job, us-east-1"),
    ],
)
def test_images_are_taken_by_tag_and_by_digest_and_from_the_jobs_region(local: Any, image: str, message: str) -> None:
    specification = {"TrainingImage": image}
    if message:
        with pytest.raises(ClientError, match=message):
            local.create("image", "true", specification=specification)
    else:
        local.create("image", "true", specification=specification)


# --- network: sagemaker/latest/dg/train-vpc.html ---


def test_a_job_in_a_vpc_reaches_the_internet_through_a_nat_gateway_only(local: Any, endpoint: str) -> None:
    ec2 = boto3.client("ec2", endpoint_url=endpoint)
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = {}
    for number, name in enumerate(("without-a-way", "by-internet-gateway", "by-nat")):
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{number}.0/24")["Subnet"]["SubnetId"]
        table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)
        way = {}
        if name == "by-internet-gateway":
            way["GatewayId"] = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
            ec2.attach_internet_gateway(InternetGatewayId=way["GatewayId"], VpcId=vpc)
        elif name == "by-nat":
            way["NatGatewayId"] = ec2.create_nat_gateway(SubnetId=subnet)["NatGateway"]["NatGatewayId"]
        if way:
            ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", **way)
        subnets[name] = subnet
    script = """
    import os, socket, sys
    try:
        socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 1)
    except OSError as error:
        sys.exit(f"unreachable; credentials: {'AWS_ACCESS_KEY_ID' in os.environ}")
    """
    for name, subnet in subnets.items():
        local.create(
            name,
            "python - 2> /opt/ml/output/failure <<'END'\n" + textwrap.dedent(script) + "END",
            VpcConfig={"Subnets": [subnet], "SecurityGroupIds": ["sg-0123456789abcdef0"]},
            Environment={"PORT": local.url.rpartition(":")[2]},
        )
    for name in ("without-a-way", "by-internet-gateway"):  # the service itself goes through the VPC's endpoints
        assert "unreachable; credentials: True" in local.wait(name)["FailureReason"]
    assert local.wait("by-nat")["TrainingJobStatus"] == "Completed"
