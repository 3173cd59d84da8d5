"""The APIs by botocore's service models: checks requests, words refusals as AWS does, and pages lists."""

from __future__ import annotations

import base64
import functools

import botocore.session
from botocore.model import ServiceModel
from botocore.utils import parse_timestamp

from local_app.common import Json
from local_app.sagemaker.constraints import shape_problems


class ServiceError(Exception):
    """An error response of the service: boto3 shows `code` as `Error.Code`; `message` is for people.

    `members` are the other members of the error's shape.
    """

    def __init__(self, code: str, message: str, status: int = 400, members: Json | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status, self.members = code, message, status, members or {}


class JobError(Exception):
    """The job itself failed; the message becomes its FailureReason."""


def not_found(message: str = "Requested resource not found.") -> ServiceError:
    """Return SageMaker's error for an unknown name: a ValidationException, not a 404."""
    return ServiceError("ValidationException", message)


@functools.cache
def service_model(service: str = "sagemaker") -> ServiceModel:
    """Return botocore's model of a service (read once: SageMaker's is 2.5 MB of JSON)."""
    return botocore.session.get_session().get_service_model(service)


def fitting(shape: str, values: Json) -> Json:
    """Return the members of `values` that a structure of the service model has."""
    members = service_model().shape_for(shape).members
    return {name: value for name, value in values.items() if name in members}


def validate_request(operation: str, request: Json, service: str = "sagemaker") -> None:
    """Raise ServiceError("ValidationException") when `request` does not fit the operation's input shape."""
    if problems := shape_problems(service_model(service).operation_model(operation).input_shape, request):
        raise ServiceError("ValidationException", problems)


def page(items: list[Json], request: Json, name_key: str, status_key: str = "TrainingJobStatus") -> Json:
    """Filter, sort and page `items` as the List operations do: name and time filters, SortBy, SortOrder, MaxResults.

    Returns {"items": [...]} and, when more follow, "NextToken".
    """
    filters = (
        ("CreationTimeAfter", "CreationTime", 1),
        ("CreationTimeBefore", "CreationTime", -1),
        ("LastModifiedTimeAfter", "LastModifiedTime", 1),
        ("LastModifiedTimeBefore", "LastModifiedTime", -1),
    )
    for parameter, key, sign in filters:
        if parameter in request:
            limit = parse_timestamp(request[parameter]).timestamp()
            items = [item for item in items if sign * (item[key] - limit) > 0]
    items = [item for item in items if request.get("NameContains", "").lower() in item[name_key].lower()]
    sort_key = {"Name": name_key, "Status": status_key}.get(request.get("SortBy", ""), "CreationTime")
    items = sorted(items, key=lambda item: item[sort_key], reverse=request.get("SortOrder") == "Descending")
    try:
        start = int(base64.b64decode(request["NextToken"], validate=True)) if "NextToken" in request else 0
    except ValueError as error:
        raise ServiceError("ValidationException", "The NextToken does not come from this service.") from error
    end = start + request.get("MaxResults", 10)
    result: Json = {"items": items[start:end]}
    if end < len(items):
        result["NextToken"] = base64.b64encode(str(end).encode()).decode()
    return result
