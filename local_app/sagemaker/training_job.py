"""One training job's data: what CreateTrainingJob refuses, the job's record, and the event that tells its status."""

from __future__ import annotations

import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from local_app.sagemaker.job_run import Outcome
from local_app.sagemaker.model import Json, ServiceError, fitting
from release.target import ECR_IMAGE
from tunedrop.config.instances import has_local_disk

EVENT_MEMBERS = (
    *("TrainingJobName", "TrainingJobArn", "ModelArtifacts", "TrainingJobStatus", "SecondaryStatus", "FailureReason"),
    *("HyperParameters", "AlgorithmSpecification", "RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig"),
    *("VpcConfig", "StoppingCondition", "CreationTime", "TrainingStartTime", "TrainingEndTime", "LastModifiedTime"),
    *("SecondaryStatusTransitions", "FinalMetricDataList", "EnableNetworkIsolation"),
    *("EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining", "CheckpointConfig"),
    *("TrainingTimeInSeconds", "BillableTimeInSeconds"),
)
TIMES = ("CreationTime", "TrainingStartTime", "TrainingEndTime", "LastModifiedTime", "StartTime", "EndTime", "Timestamp")


def check_request(request: Json, region: str) -> None:
    """Raise ServiceError for what botocore's model cannot say: AWS's rules between members, then what only runs there."""
    for refused, message in (*_aws_rules(request), *_image_rules(request, region), *_local_limits(request)):
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


def _image_rules(request: Json, region: str) -> list[tuple[bool, str]]:
    image = request.get("AlgorithmSpecification", {}).get("TrainingImage")
    if image is None or ".dkr.ecr" not in image:
        return []  # an image of one's own machine, or of another registry
    found = ECR_IMAGE.fullmatch(image)
    return [
        (found is None, f'ECR image "{image}" is invalid.'),
        # Assumption: the API reference asks for one region of models' images only.
        (found is not None and found["region"] != region, f'ECR image "{image}" is not in the region of the job, {region}.'),
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
    """Build the record of a new job: its DescribeTrainingJob response before the first status."""
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


def training_time(job: Json, outcome: Outcome) -> Json:
    """Return how long the job has trained, over all its runs; nothing (not 0) before it has, as AWS has it."""
    seconds = job.get("TrainingTimeInSeconds", 0) + outcome.seconds
    return {"TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": seconds} if seconds else {}


def state_change_event(job: Json, tags: dict[str, str]) -> Json:
    """Build EventBridge's "SageMaker Training Job State Change" for the job as it is now.

    Source: "Events that SageMaker AI sends to EventBridge" in the developer guide; times inside `detail` are
    milliseconds since 1970, as numbers.
    """
    _, _, _, region, account, _ = job["TrainingJobArn"].split(":", 5)
    detail = {member: _milliseconds(member, job[member]) for member in EVENT_MEMBERS if member in job}
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "SageMaker Training Job State Change",
        "source": "aws.sagemaker",
        "account": account,
        "time": datetime.fromtimestamp(job["LastModifiedTime"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": region,
        "resources": [job["TrainingJobArn"]],
        "detail": detail | {"Tags": tags},
    }


def _milliseconds(member: str, value: Any) -> Any:
    if member in TIMES:
        return int(value * 1000)
    if member in ("SecondaryStatusTransitions", "FinalMetricDataList"):
        return [{name: _milliseconds(name, part) for name, part in item.items()} for item in value]
    return value
