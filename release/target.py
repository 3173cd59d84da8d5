"""The settings that all jobs of a stack share, read from the stack's outputs or from the requests of a launch plan."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunedrop.rewards import REWARD_ENVIRONMENT

# The jobs' environment variables, and the stack's output that sets each of them.
ENVIRONMENT = {**REWARD_ENVIRONMENT, "EVENT_BUS": "EventBusName", "MLFLOW_TRACKING_URI": "MlflowTrackingUri"}


# An image of ECR in any partition: registry/repository[:tag] or registry/repository[@digest]
# (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_AlgorithmSpecification.html).
ECR_IMAGE = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.[a-z0-9.-]+/"
    r"(?P<repository>[a-z0-9._/-]+)(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)


class Target(NamedTuple):
    """The settings that all jobs of a stack share."""

    artifact_bucket: str
    role: str
    image: str
    job_prefix: str = "tunedrop"
    kms_key: str = ""
    subnets: Sequence[str] = ()
    security_groups: Sequence[str] = ()
    network_isolation: bool = False
    encrypt_traffic: bool = False
    environment: Mapping[str, str] = {}  # the reward permissions, the bus for alerts, the tracker


def target_of_outputs(outputs: Mapping[str, str]) -> Target:
    """Return the target that a stack's outputs describe. Raises KeyError when an output is missing."""
    return Target(
        artifact_bucket=outputs["ArtifactBucket"],
        role=outputs["SageMakerRoleArn"],
        image=outputs["TrainingImageUri"],
        job_prefix=outputs["JobPrefix"],
        kms_key=outputs.get("KmsKeyArn", ""),
        subnets=comma_separated(outputs.get("VpcSubnetIds", "")),
        security_groups=comma_separated(outputs.get("VpcSecurityGroupIds", "")),
        network_isolation=outputs.get("EnableNetworkIsolation") == "true",
        encrypt_traffic=outputs.get("EnableInterContainerTrafficEncryption") == "true",
        environment={
            variable: value
            for variable, output in ENVIRONMENT.items()
            if (value := outputs.get(output, "")) not in {"", "false"}
        },
    )


def comma_separated(text: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [name for name in text.split(",") if name]


def differences(target: Target, request: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the differences between the target of a stack and a launch plan's CreateTrainingJob request.

    Each difference is the output's name, the stack's value and the plan's value, an empty text if it is not set. The job
    prefix is not compared, because the functions set it.
    """
    network = request.get("VpcConfig", {})
    environment = request.get("Environment", {})
    captured = Target(
        artifact_bucket=request["OutputDataConfig"]["S3OutputPath"].split("/")[2],
        role=request["RoleArn"],
        image=request["AlgorithmSpecification"]["TrainingImage"],
        kms_key=request["OutputDataConfig"].get("KmsKeyId", ""),
        subnets=network.get("Subnets", []),
        security_groups=network.get("SecurityGroupIds", []),
        network_isolation=request.get("EnableNetworkIsolation", False),
        encrypt_traffic=request.get("EnableInterContainerTrafficEncryption", False),
        environment=environment,
    )
    stack, plan = _outputs_of(target), _outputs_of(captured)
    yield from ((name, stack[name], plan[name]) for name in stack if stack[name] != plan[name])


def _outputs_of(target: Target) -> dict[str, str]:
    """Return the outputs that describe a target, without its job prefix."""
    return {
        "ArtifactBucket": target.artifact_bucket,
        "SageMakerRoleArn": target.role,
        "TrainingImageUri": target.image,
        "KmsKeyArn": target.kms_key,
        "VpcSubnetIds": ",".join(target.subnets),
        "VpcSecurityGroupIds": ",".join(target.security_groups),
        "EnableNetworkIsolation": str(target.network_isolation).lower(),
        "EnableInterContainerTrafficEncryption": str(target.encrypt_traffic).lower(),
        **{output: target.environment.get(variable, "") for variable, output in ENVIRONMENT.items()},
    }
