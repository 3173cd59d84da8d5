"""Passes invocations on to a copy's server process, and its answers back, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import NamedTuple, Protocol

import httpx2

from local_app.asgi import Receive, Send, answer
from local_app.sagemaker import event_stream
from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.copies import HOST
from local_app.sagemaker.hosting import Lease

ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
# "A customer's model containers must respond to requests within 60 seconds"; a stream may take 8 minutes in all
# (https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-test-endpoints.html). Assumption: so it is on Bedrock.
RESPONSE_SECONDS = 60.0
STREAM_SECONDS = 480.0


class Question(NamedTuple):
    """A request for a container."""

    body: bytes
    headers: Mapping[str, str]
    is_stream: bool


class Exchange(Protocol):
    """One invocation, as its service counts it and words the answer.

    `headers` are those of the answer, and `type_header` is the one that has the type of a stream's content.
    """

    headers: Mapping[str, str]
    type_header: str

    def end(self, status: int | None) -> None:
        """Count the invocation by the container's status, None if there is none."""

    def error(self, status: int, text: str) -> ServiceError:
        """Return the service's error for a container's; status 0 is a container without an answer."""

    def timed_out(self) -> ServiceError:
        """Return the service's error for an answer that does not come in time."""

    def events(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """Yield the messages of the event stream, as the parts of the container's answer come."""

    def broken(self, reason: str) -> bytes:
        """Return the message of the event stream for a container that ends it too early."""


class Containers:
    """The client of all copies' servers, in the HTTP server's event loop."""

    def __init__(self) -> None:
        self._client: httpx2.AsyncClient | None = None

    async def pass_on(self, question: Question, lease: Lease, exchange: Exchange, receive: Receive, send: Send) -> None:
        """Answer an invocation, and release its copy. Raises ServiceError as long as no part of the answer is sent."""
        try:
            async with asyncio.timeout(RESPONSE_SECONDS) as limit, aclosing(await self._send(question, lease)) as response:
                kind = response.headers.get("content-type", "application/octet-stream")
                if question.is_stream and response.is_success:
                    limit.reschedule(None)
                    await _stream(response, kind, exchange, receive, send)
                    return
                body = await response.aread()
            exchange.end(response.status_code)
            if not response.is_success:
                raise exchange.error(response.status_code, body.decode(errors="replace"))
            await answer(send, 200, body, kind, exchange.headers)
        except TimeoutError:
            exchange.end(None)
            raise exchange.timed_out() from None
        except httpx2.HTTPError as error:
            exchange.end(None)
            raise exchange.error(0, f"The container closed the connection: {error!r}") from error
        finally:
            lease.release()

    async def _send(self, question: Question, lease: Lease) -> httpx2.Response:
        """Send the request to the container, and return its answer before the body."""
        if self._client is None:  # made in the event loop that uses it; a connection for each request outlives no process
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            self._client = httpx2.AsyncClient(timeout=None, trust_env=False, limits=limits)
        headers = dict(question.headers) | {"Authorization": f"Bearer {lease.copy.token}"}
        if lease.adapter:
            headers[ADAPTER_HEADER] = lease.adapter
        url = f"http://{HOST}:{lease.copy.port}/invocations"
        request = self._client.build_request("POST", url, content=question.body, headers=headers)
        return await self._client.send(request, stream=True)


async def _stream(response: httpx2.Response, kind: str, exchange: Exchange, receive: Receive, send: Send) -> None:
    """Send the container's answer as an event stream, each part as it comes, until the client is gone.

    An error in the middle is an event too.
    """
    fields = {"content-type": event_stream.CONTENT_TYPE, exchange.type_header: kind, **exchange.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": 200, "headers": encoded})
    gone = asyncio.create_task(_until_gone(receive))
    status: int | None = response.status_code
    try:
        async with asyncio.timeout(STREAM_SECONDS):
            async for message in exchange.events(response):
                await send({"type": "http.response.body", "body": message, "more_body": True})
                if gone.done():
                    break
    except (httpx2.HTTPError, TimeoutError) as error:
        status = None
        message = exchange.broken(f"The container ended the stream: {error!r}")
        await send({"type": "http.response.body", "body": message, "more_body": True})
    finally:
        gone.cancel()
        exchange.end(status)
    await send({"type": "http.response.body", "body": b""})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
