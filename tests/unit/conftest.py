"""Fixtures that several unit tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from answering_server import Server, answering_server, aws_clients


@pytest.fixture(scope="module")
def _server() -> Iterator[Server]:
    with answering_server() as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Server:
    """A server that notes what it is asked, with nothing noted yet."""
    _server.asked, _server.authorized = [], []
    return _server


@pytest.fixture(scope="module")
def clients(_server: Server) -> Callable[[str], Any]:
    """What makes AWS clients whose endpoint is the server."""
    return aws_clients(_server)
