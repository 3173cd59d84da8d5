"""SageMaker's API as botocore's service model describes it: checking requests, refusing them as AWS does, paging lists.

The model that boto3 ships is the contract, so nothing about a request's shape is written down twice.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterator
from typing import Any

import botocore.session
from botocore.model import ServiceModel, Shape
from botocore.utils import parse_timestamp
from botocore.validate import ParamValidator

Json = dict[str, Any]


class ServiceError(Exception):
    """An error answer of the service: `code` is what boto3 shows as `Error.Code`, `message` is for people."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


class JobError(Exception):
    """A failure of the job itself; the message becomes its FailureReason."""


def not_found(message: str = "Requested resource not found.") -> ServiceError:
    """Build what SageMaker answers for an unknown name: a ValidationException, not a 404."""
    return ServiceError("ValidationException", message)


@functools.cache
def service_model() -> ServiceModel:
    """Return botocore's model of SageMaker (read once: 2.5 MB of JSON)."""
    return botocore.session.get_session().get_service_model("sagemaker")


def fitting(shape: str, values: Json) -> Json:
    """Keep the members of `values` that a structure of the service model has."""
    members = service_model().shape_for(shape).members
    return {name: value for name, value in values.items() if name in members}


def validate_request(operation: str, request: Json) -> None:
    """Raise ServiceError("ValidationException") when `request` does not fit the operation's input shape.

    botocore checks required members, types and unknown names; lengths, ranges, patterns and enums are checked here.
    """
    if problems := shape_problems(service_model().operation_model(operation).input_shape, request):
        raise ServiceError("ValidationException", problems)


def shape_problems(shape: Shape, value: Any) -> str:
    """Say everything that keeps `value` from fitting `shape`; an empty string when it fits."""
    report = ParamValidator().validate(value, shape)
    if report.has_errors():
        return f"Parameter validation failed:\n{report.generate_report()}"
    violations = list(_violations(shape, value, ""))
    plural = "s" if len(violations) > 1 else ""
    return f"{len(violations)} validation error{plural} detected: {'; '.join(violations)}" if violations else ""


def _violations(shape: Shape, value: Any, path: str) -> Iterator[str]:
    """Yield one sentence, worded as AWS words it, for each constraint that `value` breaks anywhere below `path`."""
    rules = shape.metadata
    size, measure = (value, "value") if shape.type_name in ("integer", "long", "float", "double") else (None, "length")
    if shape.type_name in ("string", "list", "map"):
        size = len(value)
    broken = []
    if size is not None and "max" in rules and size > rules["max"]:
        broken.append(f"Member must have {measure} less than or equal to {rules['max']}")
    if size is not None and "min" in rules and size < rules["min"]:
        broken.append(f"Member must have {measure} greater than or equal to {rules['min']}")
    if shape.type_name == "string" and shape.enum and value not in shape.enum:
        broken.append(f"Member must satisfy enum value set: [{', '.join(shape.enum)}]")
    if "pattern" in rules and not _compiled(rules["pattern"]).fullmatch(value):
        broken.append(f"Member must satisfy regular expression pattern: {rules['pattern']}")
    for constraint in broken:
        yield f"Value '{value}' at '{path}' failed to satisfy constraint: {constraint}"
    if shape.type_name == "structure":
        for name, member in value.items():
            lower = name[0].lower() + name[1:]
            yield from _violations(shape.members[name], member, f"{path}.{lower}" if path else lower)
    elif shape.type_name == "list":
        for number, member in enumerate(value, start=1):
            yield from _violations(shape.member, member, f"{path}.{number}.member")
    elif shape.type_name == "map":
        for key, member in value.items():
            yield from _violations(shape.key, key, f"{path} (key)")
            yield from _violations(shape.value, member, f"{path}.{key}")


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile one of the model's patterns, which are Java's: `\\p{..}` classes become the nearest that Python has."""
    for java, python in {
        r"\p{Alnum}": "a-zA-Z0-9",
        r"\p{L}": r"\w",
        r"\p{M}": r"\S",
        r"\p{N}": r"\d",
        r"\p{Z}": r"\s",
        r"\p{P}": r"\S",
        r"\p{S}": r"\S",
        "${1,": "{1,",  # `$` with a count, as CustomerMetadataKey has it
    }.items():
        pattern = pattern.replace(java, python)
    return re.compile(pattern)


def page(items: list[Json], request: Json, name_key: str) -> Json:
    """Filter, sort and cut `items` as the List operations do: name and time filters, SortBy, SortOrder, MaxResults.

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
    sort_key = {"Name": name_key, "Status": "TrainingJobStatus"}.get(request.get("SortBy", ""), "CreationTime")
    items = sorted(items, key=lambda item: item[sort_key], reverse=request.get("SortOrder") == "Descending")
    try:
        start = int(base64.b64decode(request["NextToken"], validate=True)) if "NextToken" in request else 0
    except ValueError as error:
        raise ServiceError("ValidationException", "The NextToken is not one that this service gave out.") from error
    end = start + request.get("MaxResults", 10)
    result: Json = {"items": items[start:end]}
    if end < len(items):
        result["NextToken"] = base64.b64encode(str(end).encode()).decode()
    return result
