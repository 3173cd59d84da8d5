"""Commands for lines: list them, and approve or reject the models of their runs."""

import json

import click

from local_app.stack import StackError
from pipeline.runs.lines import Line
from tunedrop_cli.deployment import Deployment, in_words
from tunedrop_cli.lines import NO_CHAMPION, all_lines, find_line, score, signed, sparkline, summaries, without_champion
from tunedrop_cli.options import LINE_NAME, RUN_NAME, with_deployment
from tunedrop_cli.output import console, print_facts, print_raw, print_table
from tunedrop_cli.registry import APPROVED, PENDING, REJECTED, champion_of, packages_of, set_approval

REASON = click.option("--reason", help="Why, for the registry (ApprovalDescription).")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the lines as JSON.")
@with_deployment
def lines(deployment: Deployment, as_json: bool) -> None:
    """List the lines with their champions, scores and trends.

    A line is a model that successive runs improve. Its champion is the model in use: the newest one that is approved in
    SageMaker's registry. The trend has a bar for the score of each champion on its own tests, the first champion first.

    \b
    Example: tunedrop lines
    """
    found = summaries(deployment)
    if as_json:
        print_raw(json.dumps(found, indent=1))
        return
    rows = [
        [
            *(line["line"], line["champion"] or "none", score(line["score"]), signed(line["lift"])),
            *(str(line["published"]), str(len(line["tries"])), sparkline(line["trend"])),
        ]
        for line in found
    ]
    if rows:
        print_table(rows, header=["line", "champion", "score", "over base", "published", "judged since", "trend"])
    else:
        console.print("No lines. The first run of a line makes it: start one with `tunedrop drop FILE`.")


@click.command()
@click.argument("run", type=RUN_NAME)
@REASON
@with_deployment
def approve(deployment: Deployment, run: str, reason: str | None) -> None:
    """Approve the model of a run in SageMaker's registry.

    The newest approved model of a line becomes its champion.

    \b
    Example: tunedrop approve cars-1f0c --reason "passed the review"
    """
    _decide(deployment, run, APPROVED, reason or "Approved with `tunedrop approve`.")


@click.command()
@click.argument("run", type=RUN_NAME)
@REASON
@with_deployment
def reject(deployment: Deployment, run: str, reason: str | None) -> None:
    """Reject the model of a run in SageMaker's registry.

    If it was its line's champion, the approved model before it becomes champion.

    \b
    Example: tunedrop reject cars-1f0c --reason "too slow"
    """
    _decide(deployment, run, REJECTED, reason or "Rejected with `tunedrop reject`.")


def _decide(deployment: Deployment, name: str, status: str, reason: str) -> None:
    run = deployment.find(name)
    if run.model_package is None:
        raise StackError(
            f"{run.run_id} has no model package: it is {in_words(run.state)}. A run has one from its publication on."
        )
    line = next((line for line in all_lines(deployment).values() if run.run_id in line.packages.values()), None)
    _set(deployment, line, run.run_id, run.model_package, status, reason)


@click.command()
@click.argument("line", type=LINE_NAME)
@REASON
@with_deployment
def rollback(deployment: Deployment, line: str, reason: str | None) -> None:
    """Reject a line's champion: the approved model before it becomes champion again.

    \b
    Example: tunedrop rollback cars --reason "complaints about prices"
    """
    match = find_line(deployment, line)
    if not match.settled:
        raise StackError(
            f"{match.champion} was approved a moment ago, and its model package is not in the registry yet: try again when "
            f"the run is published. Follow it with `tunedrop watch {match.champion}`."
        )
    now = champion_of(packages_of(deployment, match.packages))
    if now is None:
        raise without_champion(line)
    _set(deployment, match, now.run_id, now.arn, REJECTED, reason or "Rolled back with `tunedrop rollback`.")


def _set(deployment: Deployment, line: Line | None, run_id: str, arn: str, status: str, reason: str) -> None:
    """Set the approval status of a run's model package, and print what that changes and how to undo it."""
    before = set_approval(deployment, arn, status, reason)
    undo = {
        APPROVED: f"`tunedrop approve {run_id}`",
        REJECTED: f"`tunedrop reject {run_id}`",
        PENDING: f"`aws sagemaker update-model-package --model-package-arn {arn} --model-approval-status {PENDING}`",
    }
    facts = [("run", run_id), ("model package", arn), ("approval", f"{status} (before: {before})")]
    if line:
        # The registry's list may not have the change yet.
        packages = [
            each._replace(status=status) if each.arn == arn else each for each in packages_of(deployment, line.packages)
        ]
        champion = champion_of(packages)
        facts.append((f"champion of {line.line}", champion.run_id if champion else NO_CHAMPION))
    print_facts([*facts, ("undo", undo[before] if before != status else "nothing has changed")])
