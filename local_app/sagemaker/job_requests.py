"""CreateTrainingJob's request: the rules that botocore's model cannot express, and the record of a new job."""

from __future__ import annotations

import re
import time

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, fitting
from release.target import ECR_IMAGE
from tunedrop.config.instances import has_local_disk


def check_request(request: Json, region: str) -> None:
    """Raise ServiceError if a request breaks AWS's rules between members, or needs a feature that this emulator lacks."""
    for refused, message in (
        *_aws_rules(request),
        *image_rules(request.get("AlgorithmSpecification", {}).get("TrainingImage"), region),
        *_local_limits(request),
    ):
        if refused:
            raise ServiceError("ValidationException", message)


def _aws_rules(request: Json) -> list[tuple[bool, str]]:
    resources, condition = request.get("ResourceConfig", {}), request.get("StoppingCondition", {})
    specification = request.get("AlgorithmSpecification", {})
    runtime, wait = condition.get("MaxRuntimeInSeconds", 86_400), condition.get("MaxWaitTimeInSeconds")
    spot = request.get("EnableManagedSpotTraining", False)
    preferences = [preference["InstanceType"] for preference in resources.get("InstancePreferences", [])]
    types = preferences or [resources.get("InstanceType", "")]
    counts = [each["InstanceType"] for each in resources.get("InstancePreferences", []) if "InstanceCount" in each]
    disks = [kind for kind in types if kind and has_local_disk(kind)]
    channels = [channel["ChannelName"] for channel in request.get("InputDataConfig", [])]
    keys = [tag["Key"] for tag in request.get("Tags", [])]
    return [
        (
            spot and (wait is None or wait < runtime),
            "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds",
        ),
        (not spot and wait is not None, "MaxWaitTimeInSeconds is supported for managed spot training only"),
        (
            bool(disks) and "VolumeKmsKeyId" in resources,
            f"VolumeKmsKeyId is not supported for instance type {''.join(disks[:1])}, which encrypts its local storage",
        ),
        (
            ("TrainingImage" in specification) == ("AlgorithmName" in specification),
            "You must specify either TrainingImage or AlgorithmName in AlgorithmSpecification, and not both",
        ),
        (
            bool(preferences) == ("InstanceType" in resources),
            "ResourceConfig must have either InstanceType or InstancePreferences",
        ),
        (bool(preferences) and spot, "InstancePreferences cannot be used with managed spot training"),
        (len(set(preferences)) < len(preferences), "An instance type can appear only once in InstancePreferences"),
        (
            bool(preferences) and counts != ([] if "InstanceCount" in resources else preferences),
            "InstanceCount must be in ResourceConfig or in every entry of InstancePreferences, and not in both",
        ),
        (len(set(channels)) < len(channels), "Duplicate channel names are not allowed in InputDataConfig"),
        (len(set(keys)) < len(keys), "Duplicate tag keys are not allowed"),
        *(
            (not _compiles(definition["Regex"]), f"Invalid regex in metric definition {definition['Name']}")
            for definition in specification.get("MetricDefinitions", [])
        ),
    ]


def image_rules(image: str | None, region: str) -> list[tuple[bool, str]]:
    """Return the rules for an image of a job or a model: whether it breaks each, and the message."""
    if image is None or ".dkr.ecr" not in image:
        return []  # an image of this machine, or of another registry
    parts = ECR_IMAGE.fullmatch(image)
    return [
        (parts is None, f'ECR image "{image}" is invalid.'),
        # ContainerDefinition in the API reference has this rule for models' images. Assumption: it holds for jobs' too.
        (parts is not None and parts["region"] != region, f'ECR image "{image}" is not in the region of the job, {region}.'),
    ]


def _local_limits(request: Json) -> list[tuple[bool, str]]:
    resources, specification = request.get("ResourceConfig", {}), request.get("AlgorithmSpecification", {})
    channels = request.get("InputDataConfig", [])
    sources = [channel["DataSource"].get("S3DataSource", {}) for channel in channels]
    modes = [specification.get("TrainingInputMode"), *(channel.get("InputMode", "File") for channel in channels)]
    checkpoints = request.get("CheckpointConfig", {}).get("LocalPath", "/opt/ml/checkpoints")
    here = "The local SageMaker emulator runs"
    return [
        (
            "InstanceGroups" in resources
            or any(p.get("InstanceCount", 1) > 1 for p in resources.get("InstancePreferences", [])),
            f"{here} instances of one type: set ResourceConfig.InstanceCount",
        ),
        (
            "ContainerEntrypoint" not in specification,
            f"{here} AlgorithmSpecification.ContainerEntrypoint (ModelTrainer's SourceCode sets it), not an image's own",
        ),
        (not set(modes) <= {"File", "FastFile"}, f"{here} TrainingInputMode File and FastFile, not Pipe"),
        (
            any(source.get("S3DataType") != "S3Prefix" for source in sources),
            f"{here} channels with an S3DataSource of S3DataType S3Prefix, not manifests or file systems",
        ),
        (
            not re.fullmatch(r"/opt/ml/(?!(input|output|model|tmp|home)\b)[^/.]+/?", checkpoints),
            f"{here} jobs with a CheckpointConfig.LocalPath of the form /opt/ml/<folder>, not {checkpoints}",
        ),
    ]


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups > 0
    except re.error:
        return False


def new_job(request: Json, arn: str) -> Json:
    """Return the record of a new job: its DescribeTrainingJob response before the first status."""
    name, output = request["TrainingJobName"], request["OutputDataConfig"]
    artifacts = "model/" if output.get("CompressionType") == "NONE" else "model.tar.gz"
    job = fitting("DescribeTrainingJobResponse", request) | {
        "TrainingJobArn": arn,
        "ModelArtifacts": {"S3ModelArtifacts": f"{output['S3OutputPath'].rstrip('/')}/{name}/output/{artifacts}"},
        "StoppingCondition": {"MaxRuntimeInSeconds": 86_400} | request.get("StoppingCondition", {}),  # AWS's default
        "CreationTime": time.time(),
        "SecondaryStatusTransitions": [],
    }
    for switch in ("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining"):
        job.setdefault(switch, False)
    return job
