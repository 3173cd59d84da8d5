"""EventBridge's "SageMaker Training Job State Change", built from a job as DescribeTrainingJob returns it.

The SageMaker emulator sends this event, and `tunedrop event` prints it. Source: "Events that SageMaker AI sends to
EventBridge" in the developer guide (https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html).
"""

import uuid
from datetime import UTC, datetime
from typing import Any

EVENT_MEMBERS = (
    *("TrainingJobName", "TrainingJobArn", "ModelArtifacts", "TrainingJobStatus", "SecondaryStatus", "FailureReason"),
    *("HyperParameters", "AlgorithmSpecification", "RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig"),
    *("VpcConfig", "StoppingCondition", "CreationTime", "TrainingStartTime", "TrainingEndTime", "LastModifiedTime"),
    *("SecondaryStatusTransitions", "FinalMetricDataList", "EnableNetworkIsolation"),
    *("EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining", "CheckpointConfig"),
    *("TrainingTimeInSeconds", "BillableTimeInSeconds"),
)
TIMES = ("CreationTime", "TrainingStartTime", "TrainingEndTime", "LastModifiedTime", "StartTime", "EndTime", "Timestamp")


def state_change_event(job: dict[str, Any], tags: dict[str, str]) -> dict[str, Any]:
    """Return the event of a job's present status.

    `job` is DescribeTrainingJob's response with its times in seconds since 1970. In the event's `detail`, times are whole
    milliseconds since 1970.
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
