"""Stacks for the tests of the handlers: see tests/support/world.py."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from click.testing import CliRunner
from fake_stack import OUTPUTS
from world import World, deployed

from local_app.stack import StackError
from tunedrop_cli.documents import DOCUMENTS
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


def fits(command: str, printed: str) -> None:
    """Assert that the output of a command with `--json` has the form that docs/json.md says."""
    (form,) = [form for names, form in DOCUMENTS.items() if command in names.split(", ")]
    for document in printed.splitlines() if command == "rollouts" else [printed]:
        msgspec.json.decode(document, type=form)


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
        if "--json" in arguments:
            fits(arguments[0], done.output)
        return done.output

    return run
