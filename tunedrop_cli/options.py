"""Options and arguments that several commands share."""

from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from local_app.stack import PROJECT, STACK_NAME, Stack, StackError
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.lines import all_lines

DEFAULT_FOLDER = PROJECT / ".tunedrop"


class RunName(click.ParamType[str]):
    """A run's id, the beginning of its id, or its dataset. The shell completes it from the runs of the local app."""

    name = "run"

    def shell_complete(self, context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the matching ids and datasets; an empty list when the local app does not run."""
        try:
            runs = Deployment.local(Stack(context.find_root().params.get("state") or DEFAULT_FOLDER)).all_runs()
        except StackError:
            return []
        names = dict.fromkeys([run.dataset for run in runs] + [run.run_id for run in runs])
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class LineName(click.ParamType[str]):
    """A line's name. The shell completes it from the lines of the local app."""

    name = "line"

    def shell_complete(self, context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the matching lines; an empty list when the local app does not run."""
        try:
            lines = all_lines(Deployment.local(Stack(context.find_root().params.get("state") or DEFAULT_FOLDER)))
        except StackError:
            return []
        return [CompletionItem(name) for name in lines if name.startswith(incomplete)]


class RunOrLineName(RunName):
    """A run as RunName, or a line. The shell completes both."""

    def shell_complete(self, context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the matching runs and lines, each name once."""
        both = (
            *super().shell_complete(context, parameter, incomplete),
            *LINE_NAME.shell_complete(context, parameter, incomplete),
        )
        return list({item.value: item for item in both}.values())


RUN_NAME, LINE_NAME, RUN_OR_LINE_NAME = RunName(), LineName(), RunOrLineName()
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/json.md).")
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def stack_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a stack on AWS."""
    for option in (
        click.option("--stack", help=f"Name of the stack on AWS.  [default with --region or --profile: {STACK_NAME}]"),
        click.option("--region", help="AWS region of a stack on AWS."),
        click.option("--profile", help="AWS profile for a stack on AWS."),
    ):
        command = option(command)
    return command


def deployment_of(state: Path, profile: str | None, region: str | None, stack: str | None) -> Deployment:
    """Return the local deployment, or one on AWS with a profile, region or stack."""
    if profile or region or stack:
        return Deployment.on_aws(state, profile, region, stack or STACK_NAME)
    return Deployment.local(Stack(state))


def with_deployment(command: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a deployment as the first argument: that of `deployment_of`."""

    @stack_options
    @click.pass_obj
    def wrapped(state: Path, /, profile: str | None, region: str | None, stack: str | None, **options: Any) -> Any:
        return command(deployment_of(state, profile, region, stack), **options)

    return update_wrapper(wrapped, command)
