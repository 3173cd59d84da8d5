"""EventBridge's "SageMaker Model Package State Change", built from a package as DescribeModelPackage returns it.

The SageMaker emulator sends this event, and `tunedrop event` prints it. Sources: the sample in "Events that SageMaker AI
sends to EventBridge" (https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html), and for
`ModelPackageName`, `ModelPackageDescription` and `Tags` EventBridge's schema registry.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

DETAIL_TYPE = "SageMaker Model Package State Change"
EVENT_MEMBERS = (
    *("ModelPackageName", "ModelPackageGroupName", "ModelPackageVersion", "ModelPackageArn", "ModelPackageDescription"),
    *("CreationTime", "InferenceSpecification", "SourceAlgorithmSpecification", "ValidationSpecification"),
    *("ModelPackageStatus", "ModelPackageStatusDetails", "CertifyForMarketplace", "ModelApprovalStatus"),
    *("MetadataProperties", "ModelMetrics", "ModelLifeCycle", "LastModifiedTime"),
)
TIMES = ("CreationTime", "LastModifiedTime")


def package_event(package: Mapping[str, Any], tags: Mapping[str, str], updated: Sequence[str] = ()) -> dict[str, Any]:
    """Return the event of a model package's present status.

    `package` is DescribeModelPackage's response with its times in seconds since 1970. In the event, times are text, unlike
    those of a training job's event. `updated` are the members that UpdateModelPackage changed.
    """
    _, _, _, region, account, _ = package["ModelPackageArn"].split(":", 5)
    detail = {member: package[member] for member in EVENT_MEMBERS if member in package}
    times = {member: _text(package[member]) for member in TIMES if member in package}
    changed = {"UpdatedModelPackageFields": list(updated)} if updated else {}
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": DETAIL_TYPE,
        "source": "aws.sagemaker",
        "account": account,
        "time": times.get("LastModifiedTime", times["CreationTime"]),
        "region": region,
        "resources": [package["ModelPackageArn"]],
        "detail": detail | times | changed | {"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]},
    }


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
