"""The HTTP server of both emulators: hypercorn, and the few lines that every ASGI application needs.

https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from local_app.common import Json

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Json]]
Send = Callable[[Json], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
KEEP_ALIVE_SECONDS = 75
# Requests that wait for another service at the same time.
WORKER_THREADS = 32


def server_config(**settings: Any) -> Any:
    """Return a hypercorn configuration; the names are those of `hypercorn.config.Config`."""
    from hypercorn.config import Config

    config = Config()
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    for name, value in settings.items():
        setattr(config, name, value)
    return config


async def read_body(receive: Receive) -> bytes:
    """Return the whole body of a request."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def answer(send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> None:
    """Answer with a document."""
    fields = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def answer_json(send: Send, status: int, content: Json, headers: Mapping[str, str] | None = None) -> None:
    """Answer with a JSON document."""
    await answer(send, status, json.dumps(content).encode(), "application/json", headers)


def headers_of(scope: Scope) -> dict[str, str]:
    """Return the headers of a request, by their names in lower case. Commas join repeated headers (RFC 9110, 5.2)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


class ThreadedServer:
    """Serves an ASGI application over HTTP from a background thread, until `close`.

    `port` is the port that it listens on; port 0 chooses a free one. `asyncio.to_thread` has `WORKER_THREADS` threads.
    """

    def __init__(self, application: Application, host: str, port: int) -> None:
        listener = socket.create_server((host, port))
        self.port: int = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(WORKER_THREADS, "http-worker"))
        self._end = asyncio.Event()
        config = server_config(bind=[f"fd://{listener.detach()}"], graceful_timeout=1, loglevel="WARNING")
        self._thread = threading.Thread(target=self._run, args=(application, config), name="http", daemon=True)
        self._thread.start()

    def _run(self, application: Application, config: Any) -> None:
        from hypercorn.asyncio import serve

        asyncio.set_event_loop(self._loop)
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(serve(application, config, shutdown_trigger=self._end.wait))  # type: ignore[arg-type]
            self._loop.run_until_complete(self._loop.shutdown_default_executor())

    def close(self) -> None:
        """Refuse new requests, finish the running ones, and end the thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
