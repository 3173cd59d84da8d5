"""Commands for lines: list them, and approve or reject the models of their runs."""

import click
import msgspec

from local_app.stack import StackError
from pipeline.runs.lines import Line
from tunedrop_cli.deployment import Deployment, in_words
from tunedrop_cli.documents import Approval, Lines, LineSummary, print_document
from tunedrop_cli.lines import NO_CHAMPION, all_lines, find_line, score, signed, sparkline, summaries, without_champion
from tunedrop_cli.options import JSON, LINE_NAME, RUN_NAME, with_deployment
from tunedrop_cli.output import console, print_facts, print_table
from tunedrop_cli.registry import APPROVED, PENDING, REJECTED, champion_of, packages_of, set_approval

REASON = click.option("--reason", help="Why, for the registry (ApprovalDescription).")


@click.command()
@JSON
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
        print_document(Lines(lines=msgspec.convert(found, list[LineSummary])))
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
@JSON
@with_deployment
def approve(deployment: Deployment, run: str, reason: str | None, as_json: bool) -> None:
    """Approve the model of a run in SageMaker's registry.

    The newest approved model of a line becomes its champion.

    \b
    Example: tunedrop approve cars-1f0c --reason "passed the review"
    """
    _decide(deployment, run, APPROVED, reason or "Approved with `tunedrop approve`.", as_json)


@click.command()
@click.argument("run", type=RUN_NAME)
@REASON
@JSON
@with_deployment
def reject(deployment: Deployment, run: str, reason: str | None, as_json: bool) -> None:
    """Reject the model of a run in SageMaker's registry.

    If it was its line's champion, the approved model before it becomes champion.

    \b
    Example: tunedrop reject cars-1f0c --reason "too slow"
    """
    _decide(deployment, run, REJECTED, reason or "Rejected with `tunedrop reject`.", as_json)


def _decide(deployment: Deployment, name: str, status: str, reason: str, as_json: bool) -> None:
    run = deployment.find(name)
    if run.model_package is None:
        raise StackError(
            f"{run.run_id} has no model package: it is {in_words(run.state)}. A run has one from its publication on."
        )
    line = next((line for line in all_lines(deployment).values() if run.run_id in line.packages.values()), None)
    _report(_set(deployment, line, run.run_id, run.model_package, status, reason), as_json)


@click.command()
@click.argument("line", type=LINE_NAME)
@REASON
@JSON
@with_deployment
def rollback(deployment: Deployment, line: str, reason: str | None, as_json: bool) -> None:
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
    reason = reason or "Rolled back with `tunedrop rollback`."
    _report(_set(deployment, match, now.run_id, now.arn, REJECTED, reason), as_json)


def _set(deployment: Deployment, line: Line | None, run_id: str, arn: str, status: str, reason: str) -> Approval:
    """Set the approval status of a run's model package; return what that changes."""
    before, champion = set_approval(deployment, arn, status, reason), None
    if line:
        # The registry's list may not have the change yet.
        packages = [
            each._replace(status=status) if each.arn == arn else each for each in packages_of(deployment, line.packages)
        ]
        champion = champion_of(packages)
    return Approval(
        run_id=run_id,
        model_package=arn,
        status=status,
        before=before,
        line=line.line if line else None,
        champion=champion.run_id if champion else None,
    )


def _report(done: Approval, as_json: bool) -> None:
    """Print a change of an approval status, and how to undo it."""
    if as_json:
        return print_document(done)
    by_hand = f"--model-package-arn {done.model_package} --model-approval-status {PENDING}"
    undo = {
        APPROVED: f"`tunedrop approve {done.run_id}`",
        REJECTED: f"`tunedrop reject {done.run_id}`",
        PENDING: f"`aws sagemaker update-model-package {by_hand}`",
    }
    facts = [
        ("run", done.run_id),
        ("model package", done.model_package),
        ("approval", f"{done.status} (before: {done.before})"),
    ]
    if done.line:
        facts.append((f"champion of {done.line}", done.champion or NO_CHAMPION))
    return print_facts([*facts, ("undo", undo[done.before] if done.before != done.status else "nothing has changed")])
