"""The server of the console, on 127.0.0.1."""

import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from tunedrop_cli.console.app import application
from tunedrop_cli.deployment import Deployment

SECRET_BYTES = 24
END_SECONDS = 2  # for running requests, at the end


class Server:
    """A console under a secret address of its own. `port` 0 chooses a free port. Raises OSError for a port in use."""

    def __init__(self, make: Callable[[], Deployment], place: str, port: int = 0):
        secret = secrets.token_urlsafe(SECRET_BYTES)
        self._socket = socket.create_server(("127.0.0.1", port))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}/{secret}/"
        config = uvicorn.Config(
            application(make, secret, place), log_level="warning", timeout_graceful_shutdown=END_SECONDS, lifespan="off"
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Answer requests until the process is interrupted, or another thread calls `end`."""
        self._server.run(sockets=[self._socket])

    def end(self) -> None:
        """End `run`."""
        self._server.should_exit = True


@contextmanager
def serving(make: Callable[[], Deployment], place: str, port: int = 0) -> Iterator[Server]:
    """Answer requests in a thread for the duration of the block."""
    server = Server(make, place, port)
    thread = threading.Thread(target=server.run, name="console", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end()
        thread.join()
