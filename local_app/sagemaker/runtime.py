"""SageMaker Runtime: what an invocation of an endpoint may be, how it is counted, and how its errors are worded.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import httpx2

from local_app.asgi import Receive, Send
from local_app.common import Json
from local_app.sagemaker import event_stream
from local_app.sagemaker.api import ServiceError, service_model
from local_app.sagemaker.components import InferenceComponents
from local_app.sagemaker.constraints import shape_problems
from local_app.sagemaker.metrics import Metrics
from local_app.sagemaker.passing import Containers, Question

OPERATIONS = {"invocations": "InvokeEndpoint", "invocations-response-stream": "InvokeEndpointWithResponseStream"}
# Headers that SageMaker passes to the container, and those that this emulator has no use for.
PASSED_ON = ("Content-Type", "Accept", "X-Amzn-SageMaker-Custom-Attributes", "X-Amzn-SageMaker-Inference-Id")
LACKING = ("TargetModel", "TargetVariant", "TargetContainerHostname", "EnableExplanations", "SessionId", "PrefixAwareId")


class Invocation(NamedTuple):
    """A request to an endpoint: the operation's parameters, and the headers of the request for the container."""

    operation: str
    parameters: Json
    headers: Mapping[str, str]

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream."""
        return self.operation == "InvokeEndpointWithResponseStream"


def parse(method: str, path: str, headers: Mapping[str, str], body: bytes) -> Invocation:
    """Return the invocation in a request. Raises ServiceError if it does not fit the service model."""
    parts = path.strip("/").split("/")
    if method != "POST" or len(parts) != 3 or parts[2] not in OPERATIONS:
        raise ServiceError("UnknownOperationException", f"There is no {method} {path} here.", 404)
    operation = OPERATIONS[parts[2]]
    shape = service_model("sagemaker-runtime").operation_model(operation).input_shape
    parameters: Json = {"EndpointName": parts[1], "Body": body}
    passed_on = {name: headers[name.lower()] for name in PASSED_ON if name.lower() in headers}
    for member, member_shape in shape.members.items():
        header = member_shape.serialization.get("name", "").lower()
        if member_shape.serialization.get("location") == "header" and header in headers:
            parameters[member] = headers[header]
    if "Accept" in parameters:  # the streaming operation has it in X-Amzn-SageMaker-Accept
        passed_on["Accept"] = parameters["Accept"]
    problems = shape_problems(shape, parameters)
    longest = shape.members["Body"].metadata["max"]
    lacking = [member for member in LACKING if member in parameters]
    if problems or len(body) > longest or lacking:
        too_long = f"The body has {len(body)} bytes; at most {longest} are allowed." if len(body) > longest else ""
        absent = f"The local SageMaker emulator does not have {', '.join(lacking)}." if lacking else ""
        raise ServiceError("ValidationError", problems or too_long or absent)
    return Invocation(operation, parameters, passed_on)


class Runtime:
    """Serves invocations in the HTTP server's event loop."""

    def __init__(self, components: InferenceComponents, containers: Containers, metrics: Metrics) -> None:
        self._components, self._containers, self._metrics = components, containers, metrics

    async def serve(self, invocation: Invocation, receive: Receive, send: Send) -> None:
        """Answer an authorized invocation. Raises ServiceError as long as no part of the answer is sent."""
        names = (invocation.parameters["EndpointName"], invocation.parameters.get("InferenceComponentName"))
        lease, component = await asyncio.to_thread(self._components.lease, *names)
        question = Question(invocation.parameters["Body"], invocation.headers, invocation.is_stream)
        exchange = EndpointExchange(component, self._components.dimensions(component), self._metrics)
        await self._containers.pass_on(question, lease, exchange, receive, send)


class EndpointExchange:
    """One invocation that reaches a container (an `Exchange`), counted under its component's dimensions.

    "If the model returned an error, a value of 1 is sent; otherwise, 0 is sent"
    (https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html).
    """

    type_header = "x-amzn-sagemaker-content-type"

    def __init__(self, component: Json, dimensions: list[dict[str, str]], metrics: Metrics) -> None:
        self._dimensions, self._metrics = dimensions, metrics
        self._begin = time.monotonic()
        self.headers: Mapping[str, str] = {"x-amzn-invoked-production-variant": component["VariantName"]}
        self._add("Invocations", 1)

    def end(self, status: int | None) -> None:
        """Count the container's status. ModelLatency is in microseconds."""
        self._add("Invocation4XXErrors", status is not None and 400 <= status < 500)
        self._add("Invocation5XXErrors", status is None or status >= 500)
        if status is not None:
            self._add("ModelLatency", (time.monotonic() - self._begin) * 1e6)

    def error(self, status: int, text: str) -> ServiceError:
        """Return a ModelError."""
        side = "client" if 400 <= status < 500 else "server"
        members = {"OriginalStatusCode": status, "OriginalMessage": text} if status else {}
        message = f'Received {side} error ({status}) from primary with message "{text}".'
        return ServiceError("ModelError", message, 424, members)

    def timed_out(self) -> ServiceError:
        """Return a ModelError."""
        return self.error(0, "Your invocation timed out while waiting for a response from container primary.")

    async def events(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """Yield each part of the answer as a PayloadPart."""
        async for part in response.aiter_raw():
            yield event_stream.event("PayloadPart", part, "application/octet-stream")

    def broken(self, reason: str) -> bytes:
        """Return a ModelStreamError."""
        return event_stream.exception("ModelStreamError", {"Message": reason, "ErrorCode": "ModelStreamBroken"})

    def _add(self, name: str, value: float) -> None:
        self._metrics.add(name, self._dimensions, value)
