"""Where a stack is, on this machine or on AWS, and how to reach it."""

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import boto3
from botocore.exceptions import ConnectionError as AwsConnectionError
from botocore.exceptions import HTTPClientError, ProfileNotFound

from local_app.stack import STACK_NAME, Stack, StackError

# What botocore raises where nothing answers: refused connections, and those that end or take too long.
UNREACHABLE = (AwsConnectionError, HTTPClientError)


class StackLocation(NamedTuple):
    """A stack's name, clients, and command-line options.

    `connect` returns a boto3 `client` or `resource` (its first argument) of a service. The AWS CLI reaches the stack with
    `aws_options`, the `tunedrop` command with `options`.
    """

    connect: Callable[[str, str], Any]
    stack_name: str
    on_aws: bool
    aws_options: dict[str, str]
    options: dict[str, str]

    @classmethod
    def local(cls, stack: Stack) -> "StackLocation":
        """Return the location of the stack on this machine. Raises StackError when the stack does not run."""
        stack.check_running()
        options = {"endpoint-url": stack.endpoint, "ca-bundle": str(stack.tls.authority), "region": stack.region}
        return cls(stack.connect, STACK_NAME, False, options, {})

    @classmethod
    def aws(cls, profile: str | None, region: str | None, stack_name: str) -> "StackLocation":
        """Return the location of a stack on AWS. Raises StackError for an unknown profile."""
        try:
            session = boto3.Session(profile_name=profile, region_name=region)
        except ProfileNotFound as error:
            raise StackError(f"{error}. List the profiles with `aws configure list-profiles`.") from None
        named = {"region": session.region_name, "profile": profile}
        options = {name: value for name, value in named.items() if value}
        return cls(
            lambda kind, service: getattr(session, kind)(service),
            stack_name,
            True,
            options,
            {"stack": stack_name, **options},
        )

    def aws_command(self, text: str) -> str:
        """Return a command of the AWS CLI with the options for this stack."""
        return _with("aws " + text, self.aws_options)

    def command(self, text: str) -> str:
        """Return a `tunedrop` command with the options for this stack."""
        return _with("tunedrop " + text, self.options)

    @property
    def release(self) -> str:
        """The command that stores a launch plan for this stack."""
        if not self.on_aws:
            return "tunedrop up"
        profile = f"AWS_PROFILE={shlex.quote(self.options['profile'])} " if "profile" in self.options else ""
        options = {name: value for name, value in self.options.items() if name != "profile"}
        return _with(f"{profile}python -m release", options)


def _with(command: str, options: dict[str, str]) -> str:
    return " ".join([command, *(f"--{name} {shlex.quote(value)}" for name, value in options.items())])
