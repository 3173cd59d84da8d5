"""SageMaker Runtime: passes invocations on to a component's server process, and its answers back, whole or streamed.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html
"""

from __future__ import annotations

import asyncio
import binascii
import json
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import NamedTuple

import httpx2

from local_app.asgi import Receive, Send, answer
from local_app.common import Json
from local_app.sagemaker.api import ServiceError, service_model
from local_app.sagemaker.components import InferenceComponents
from local_app.sagemaker.constraints import shape_problems
from local_app.sagemaker.copies import HOST
from local_app.sagemaker.hosting import Lease
from local_app.sagemaker.metrics import Metrics

OPERATIONS = {"invocations": "InvokeEndpoint", "invocations-response-stream": "InvokeEndpointWithResponseStream"}
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
# Headers that SageMaker passes to the container, and those that this emulator has no use for.
PASSED_ON = ("Content-Type", "Accept", "X-Amzn-SageMaker-Custom-Attributes", "X-Amzn-SageMaker-Inference-Id")
LACKING = ("TargetModel", "TargetVariant", "TargetContainerHostname", "EnableExplanations", "SessionId", "PrefixAwareId")
# "A customer's model containers must respond to requests within 60 seconds"; a stream may take 8 minutes in all
# (https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-test-endpoints.html).
RESPONSE_SECONDS = 60.0
STREAM_SECONDS = 480.0


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

    def __init__(self, components: InferenceComponents, metrics: Metrics) -> None:
        self._components, self._metrics = components, metrics
        self._client: httpx2.AsyncClient | None = None

    async def serve(self, invocation: Invocation, receive: Receive, send: Send) -> None:
        """Answer an authorized invocation. Raises ServiceError as long as no part of the answer is sent."""
        names = (invocation.parameters["EndpointName"], invocation.parameters.get("InferenceComponentName"))
        lease, component = await asyncio.to_thread(self._components.lease, *names)
        report = Report(self._metrics, self._components.dimensions(component))
        headers = {"x-amzn-invoked-production-variant": component["VariantName"]}
        try:
            async with asyncio.timeout(RESPONSE_SECONDS) as limit, aclosing(await self._send(invocation, lease)) as response:
                kind = response.headers.get("content-type", "application/octet-stream")
                if invocation.is_stream and response.is_success:
                    limit.reschedule(None)
                    await _stream(response, headers | {"x-amzn-sagemaker-content-type": kind}, report, receive, send)
                    return
                body = await response.aread()
            report.end(response.status_code)
            if not response.is_success:
                raise _model_error(response.status_code, body.decode(errors="replace"))
            await answer(send, 200, body, kind, headers)
        except TimeoutError:
            report.end(None)
            message = "Your invocation timed out while waiting for a response from container primary."
            raise _model_error(0, message) from None
        except httpx2.HTTPError as error:
            report.end(None)
            raise _model_error(0, f"The container closed the connection: {error!r}") from error
        finally:
            lease.release()

    async def _send(self, invocation: Invocation, lease: Lease) -> httpx2.Response:
        """Send the request to the container, and return its answer before the body."""
        if self._client is None:  # made in the event loop that uses it; a connection for each request outlives no process
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            self._client = httpx2.AsyncClient(timeout=None, trust_env=False, limits=limits)
        headers = dict(invocation.headers) | {"Authorization": f"Bearer {lease.copy.token}"}
        if lease.adapter:
            headers[ADAPTER_HEADER] = lease.adapter
        url = f"http://{HOST}:{lease.copy.port}/invocations"
        request = self._client.build_request("POST", url, content=invocation.parameters["Body"], headers=headers)
        return await self._client.send(request, stream=True)


class Report:
    """Counts one invocation that reached a container, under its component's dimensions.

    "If the model returned an error, a value of 1 is sent; otherwise, 0 is sent"
    (https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html).
    """

    def __init__(self, metrics: Metrics, dimensions: list[dict[str, str]]) -> None:
        self._add: Callable[[str, float], None] = lambda name, value: metrics.add(name, dimensions, value)
        self._begin = time.monotonic()
        self._add("Invocations", 1)

    def end(self, status: int | None) -> None:
        """Note the container's status; None if there is none. ModelLatency is in microseconds."""
        self._add("Invocation4XXErrors", status is not None and 400 <= status < 500)
        self._add("Invocation5XXErrors", status is None or status >= 500)
        if status is not None:
            self._add("ModelLatency", (time.monotonic() - self._begin) * 1e6)


async def _stream(
    response: httpx2.Response, headers: Mapping[str, str], report: Report, receive: Receive, send: Send
) -> None:
    """Send the container's answer as an event stream, each part as it comes, until the client is gone.

    An error in the middle is an event too.
    """
    fields = {"content-type": "application/vnd.amazon.eventstream", **headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": 200, "headers": encoded})
    gone = asyncio.create_task(_until_gone(receive))
    status: int | None = response.status_code
    try:
        async with asyncio.timeout(STREAM_SECONDS):
            async for part in response.aiter_raw():
                await send({"type": "http.response.body", "body": event(part), "more_body": True})
                if gone.done():
                    break
    except (httpx2.HTTPError, TimeoutError) as error:
        status = None
        content = {"Message": f"The container ended the stream: {error!r}", "ErrorCode": "ModelStreamBroken"}
        await send({"type": "http.response.body", "body": exception_event(content), "more_body": True})
    finally:
        gone.cancel()
        report.end(status)
    await send({"type": "http.response.body", "body": b""})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _model_error(status: int, text: str) -> ServiceError:
    """Return SageMaker's error for a container's error; status 0 is a container without an answer."""
    side = "client" if 400 <= status < 500 else "server"
    members = {"OriginalStatusCode": status, "OriginalMessage": text} if status else {}
    message = f'Received {side} error ({status}) from primary with message "{text}".'
    return ServiceError("ModelError", message, 424, members)


# ------------------------------------------------------------------------------------------------------------- event stream


def event(part: bytes) -> bytes:
    """Return a PayloadPart in the encoding of application/vnd.amazon.eventstream."""
    kind = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
    return _message(kind, part)


def exception_event(content: Json) -> bytes:
    """Return a ModelStreamError as a message of the stream."""
    kind = {":message-type": "exception", ":exception-type": "ModelStreamError", ":content-type": "application/json"}
    return _message(kind, json.dumps(content).encode())


def _message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return one message: two lengths and their CRC, headers, payload, CRC of all.

    https://smithy.io/2.0/aws/amazon-eventstream.html
    """
    encoded = b"".join(
        struct.pack("!B", len(name)) + name.encode() + b"\x07" + struct.pack("!H", len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(encoded) + len(payload), len(encoded))
    message = prelude + struct.pack("!I", binascii.crc32(prelude)) + encoded + payload
    return message + struct.pack("!I", binascii.crc32(message))
