"""Commands for operators: print events, redrive dead letters, and find what keeps runs from working."""

import json
import sys
from pathlib import Path

import click

from local_app.stack import STACK_NAME, Stack, StackError
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.documents import Findings, Redriven, print_document
from tunedrop_cli.location import StackLocation
from tunedrop_cli.options import JSON, stack_options, with_deployment
from tunedrop_cli.output import console, print_raw


@click.command()
@click.argument("name", metavar="KEY|JOB|PACKAGE|RUN")
@click.option("--stage", type=click.Choice(["start", "test", "publish"]), help="The next stage of the RUN.")
@with_deployment
def event(deployment: Deployment, name: str, stage: str | None) -> None:
    """Print the event that a function receives.

    For `sam local invoke --event`. With the KEY of an object in the data bucket: S3's event. With a JOB that has ended:
    SageMaker's event. With the ARN of a model PACKAGE: SageMaker's event of its present approval status. With a RUN and
    `--stage`: the event that starts its training, its tests or its publication.

    \b
    Example: tunedrop event training_data/cars.jsonl
    """
    from tunedrop_cli.printed_event import event_of

    print_raw(json.dumps(event_of(deployment, name, stage), indent=1))


@click.command()
@JSON
@with_deployment
def redrive(deployment: Deployment, as_json: bool) -> None:
    """Send undelivered events to their functions again.

    The events are in the stack's dead-letter queue.

    \b
    Example: tunedrop redrive --region eu-central-1
    """
    functions = []
    for function in deployment.redrive():
        functions.append(function)
        if not as_json:
            console.print(function, markup=False)
    if as_json:
        return print_document(Redriven(functions=functions))
    return console.print(f"{len(functions)} events sent again")


@click.command()
@JSON
@stack_options
@click.pass_obj
def doctor(state: Path, profile: str | None, region: str | None, stack: str | None, as_json: bool) -> None:
    """Find what keeps runs from working, and how to fix it.

    Changes nothing. Exit codes: 0 nothing is wrong, 1 errors.

    \b
    Example: tunedrop doctor --stack tunedrop --region eu-central-1
    """
    from tunedrop_cli.doctor.examine import examine
    from tunedrop_cli.doctor.finding import Finding
    from tunedrop_cli.doctor.report import print_report

    name = stack or STACK_NAME
    try:
        on_aws = profile or region or stack
        location = StackLocation.aws(profile, region, name) if on_aws else StackLocation.local(Stack(state))
        findings = examine(location)
    except StackError as error:  # the local app does not run, or the profile does not exist
        findings = [Finding("NOT_REACHED", str(error), "")]
    ok = not any(finding.trouble for finding in findings)
    if as_json:
        print_document(Findings(ok=ok, findings=findings))
    else:
        print_report(name, findings)
    if not ok:
        sys.exit(1)
