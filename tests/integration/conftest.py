"""Stacks for the tests of the handlers: see tests/support/world.py."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import boto3
import pytest
from click.testing import CliRunner
from fake_stack import OUTPUTS
from world import World, deployed

from local_app.stack import StackError
from tunedrop_cli.main import cli

REGION = ["--region", "us-east-1"]


@pytest.fixture
def deploy(load_event: Callable[[str], dict[str, Any]]) -> Callable[[], AbstractContextManager[World]]:
    """Make stacks, one after another."""
    return lambda: deployed(load_event)


@pytest.fixture
def world(load_event: Callable[[str], dict[str, Any]]) -> Iterator[World]:
    """One stack."""
    with deployed(load_event) as world:
        yield world


@pytest.fixture
def tunedrop(world: World, tmp_path: Path) -> Callable[..., str]:
    """Run the command against the stack."""
    outputs = {name: {"Value": value or "-"} for name, value in OUTPUTS.items()}
    topic = {"Topic": {"Type": "AWS::SNS::Topic"}}
    boto3.client("cloudformation").create_stack(
        StackName="tunedrop", TemplateBody=json.dumps({"Resources": topic, "Outputs": outputs})
    )

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["--state", str(tmp_path), *arguments, *REGION])
        if isinstance(done.exception, StackError):
            return f"error: {done.exception}"
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    return run
