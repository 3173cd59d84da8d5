"""Checks the CloudFormation stack itself."""

from typing import Any

from botocore.exceptions import ClientError

from pipeline.aws import error_code
from release.target import target_of_outputs
from tunedrop_cli.doctor.finding import DeployedStack, Finding
from tunedrop_cli.location import StackLocation

# Statuses of a deployed stack
# (https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/view-stack-events.html).
DEPLOYED = frozenset({"CREATE_COMPLETE", "UPDATE_COMPLETE", "IMPORT_COMPLETE"})
# The last deploy failed, and the earlier stack is complete.
ROLLED_BACK = "UPDATE_ROLLBACK_COMPLETE"
# How to repair a stack in another status.
REPAIRS = {
    "REVIEW_IN_PROGRESS": "Its change set was not executed. Run `make deploy` and answer yes.",
    "UPDATE_ROLLBACK_FAILED": "Fix the cause, run `{continue}`, then deploy again.",
    "DELETE_FAILED": "Delete by hand the resource that CloudFormation cannot delete, then run `{delete}` again.",
}
REPAIR_OF_A_FAILED_CREATION = "Fix the cause, delete the rest of the stack with `{delete}`, then deploy again."


def find_stack(location: StackLocation) -> tuple[DeployedStack | None, list[Finding]]:
    """Return the stack if all its resources exist, else None; and the findings about the stack as a whole."""
    cloudformation = location.connect("client", "cloudformation")
    try:
        (stack,) = cloudformation.describe_stacks(StackName=location.stack_name)["Stacks"]
    except ClientError as error:
        if error_code(error) != "ValidationError":
            raise
        message = f"There is no stack '{location.stack_name}' in {location.aws_options['region']}."
        return None, [Finding("STACK_MISSING", message, "Deploy it with `make deploy`, or name another stack (`--stack`).")]
    status = stack["StackStatus"]
    findings = [] if status in DEPLOYED else [_status_finding(location, status, cloudformation)]
    if status not in DEPLOYED | {ROLLED_BACK}:
        return None, findings
    deployed = DeployedStack(location, stack)
    try:
        target_of_outputs(deployed.outputs)
    except KeyError as missing:
        message = f"The stack has no output {missing}: this template did not create it."
        fix = "Name another stack (`--stack`), or deploy this version with `make deploy`."
        return None, [*findings, Finding("STACK_FOREIGN", message, fix)]
    return deployed, findings


def _status_finding(location: StackLocation, status: str, cloudformation: Any) -> Finding:
    name = location.stack_name
    message = f"The stack is {status}"
    if status == ROLLED_BACK:
        message, fix = (
            f"{message}: the last deploy failed, and the earlier stack was restored",
            "Fix the cause, then deploy again.",
        )
    elif status in REPAIRS:
        fix = REPAIRS[status]
    elif "ROLLBACK" in status or "FAILED" in status:
        fix = REPAIR_OF_A_FAILED_CREATION
    else:
        fix = "Wait until CloudFormation has finished, then run the command again."
    for word, command in {"delete": "delete-stack", "continue": "continue-update-rollback"}.items():
        fix = fix.replace(f"{{{word}}}", location.aws_command(f"cloudformation {command} --stack-name {name}"))
    failure = None if status == "REVIEW_IN_PROGRESS" else _first_failure(name, cloudformation)
    return Finding("STACK_STATE", f"{message}. First failure: {failure}" if failure else f"{message}.", fix)


def _first_failure(name: str, cloudformation: Any) -> str | None:
    """Return the first failure of CloudFormation's last operation on the stack. The newest events come first."""
    failure = None
    for page in cloudformation.get_paginator("describe_stack_events").paginate(StackName=name):
        for event in page["StackEvents"]:
            status, of_stack = event.get("ResourceStatus", ""), event.get("LogicalResourceId") == name
            if of_stack and status in {"CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS", "DELETE_IN_PROGRESS"}:
                return failure
            if not of_stack and status.endswith("_FAILED"):
                failure = f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', status)}"
    return failure
