"""EventBridge's "SageMaker Endpoint State Change", built from an endpoint as DescribeEndpoint returns it.

The SageMaker emulator sends this event. Source: the sample in "Events that SageMaker AI sends to EventBridge"
(https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html). AWS lists no event for
inference components.
"""

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

DETAIL_TYPE = "SageMaker Endpoint State Change"
EVENT_MEMBERS = (
    *("EndpointName", "EndpointArn", "EndpointConfigName", "ProductionVariants", "EndpointStatus", "FailureReason"),
    *("CreationTime", "LastModifiedTime"),
)
TIMES = ("CreationTime", "LastModifiedTime")


def endpoint_event(endpoint: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the event of an endpoint's present status.

    `endpoint` is DescribeEndpoint's response with its times in seconds since 1970. In the event's `detail`, times are
    milliseconds since 1970, and the status `InService` is `IN_SERVICE`.
    """
    _, _, _, region, account, _ = endpoint["EndpointArn"].split(":", 5)
    detail = {member: endpoint[member] for member in EVENT_MEMBERS if member in endpoint}
    times = {member: endpoint[member] * 1000.0 for member in TIMES}
    status = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", endpoint["EndpointStatus"]).upper()
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": DETAIL_TYPE,
        "source": "aws.sagemaker",
        "account": account,
        "time": datetime.fromtimestamp(endpoint["LastModifiedTime"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": region,
        "resources": [endpoint["EndpointArn"]],
        "detail": detail | times | {"EndpointStatus": status, "Tags": dict(tags)},
    }
