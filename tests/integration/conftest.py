"""Stacks for the tests of the handlers: see tests/support/world.py."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from world import World, deployed


@pytest.fixture
def deploy(load_event: Callable[[str], dict[str, Any]]) -> Callable[[], AbstractContextManager[World]]:
    """Make stacks, one after another."""
    return lambda: deployed(load_event)


@pytest.fixture
def world(load_event: Callable[[str], dict[str, Any]]) -> Iterator[World]:
    """One stack."""
    with deployed(load_event) as world:
        yield world
