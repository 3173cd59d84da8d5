"""REST-JSON by botocore's service models: which operation an HTTP request is, its parameters, and the form of its answer.

https://smithy.io/2.0/aws/protocols/aws-restjson1-protocol.html
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import unquote

from botocore.model import OperationModel, Shape

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, service_model
from local_app.sagemaker.constraints import shape_problems


class Request(NamedTuple):
    """An HTTP request; `path` is as it was sent, and the names in `headers` are in lower case."""

    method: str
    path: str
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    body: bytes


class Call(NamedTuple):
    """A call of an operation, with its parameters as botocore names them."""

    operation: OperationModel
    parameters: Json


def parse(request: Request, operations: Mapping[str, Sequence[str]]) -> Call | None:
    """Return the call in a request, of one of the `operations` by service; None if it is none of them.

    Raises ServiceError, and JSONDecodeError, if it does not fit the service model.
    """
    for service, names in operations.items():
        for name in names:
            operation = service_model(service).operation_model(name)
            match = _pattern(operation.http["requestUri"]).fullmatch(request.path)
            if match and operation.http["method"] == request.method:
                labels = {label: unquote(text) for label, text in match.groupdict().items()}
                parameters = _parameters(operation.input_shape, labels, request)
                if problems := shape_problems(operation.input_shape, parameters):
                    raise ServiceError("ValidationException", problems)
                return Call(operation, parameters)
    return None


def answer(call: Call, result: Json) -> tuple[int, Json]:
    """Return the HTTP status and the document of an operation's result; what its shape does not have is left out."""
    return call.operation.http["responseCode"], _rendered(call.operation.output_shape, result)


@functools.cache
def error_statuses(*services: str) -> dict[str, int]:
    """Return the HTTP statuses of the services' errors, as far as their models have them."""
    shapes = [shape for service in services for shape in service_model(service).error_shapes]
    return {shape.name: shape.metadata["error"]["httpStatusCode"] for shape in shapes if "error" in shape.metadata}


@functools.cache
def _pattern(uri: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", uri))


def _parameters(shape: Shape, labels: Mapping[str, str], request: Request) -> Json:
    """Return a request's parameters: of its path, its query, its headers and its body."""
    payload = shape.serialization.get("payload")
    parameters: Json = {payload: request.body} if payload else json.loads(request.body or b"{}")
    if not isinstance(parameters, dict):
        raise ServiceError("SerializationException", "The body must be a JSON object.")
    query = {name: values[0] for name, values in request.query.items()}
    for member, its_shape in shape.members.items():
        name, location = its_shape.serialization.get("name", member), its_shape.serialization.get("location")
        places = {"uri": (labels, name), "querystring": (query, name), "header": (request.headers, name.lower())}
        place, key = places.get(location, ({}, ""))
        if key in place:
            text = place[key]
            parameters[member] = int(text) if its_shape.type_name == "integer" and text.isdecimal() else text
    return parameters


def _rendered(shape: Shape, value: Any) -> Any:
    """Return a value in the form of its shape in JSON; a time is a number of seconds, and becomes text (ISO 8601)."""
    if shape.type_name == "structure":
        return {name: _rendered(shape.members[name], member) for name, member in value.items() if name in shape.members}
    if shape.type_name == "list":
        return [_rendered(shape.member, member) for member in value]
    if shape.type_name == "timestamp":
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return value
