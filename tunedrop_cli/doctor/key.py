"""Checks a customer's KMS key: its state, and the permissions in its policy (docs/operations.md, Keys)."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import msgspec

from tunedrop_cli.doctor.finding import DeployedStack, Finding, Json

# The actions that roles, log groups and alarms need.
ROLES_USE = "kms:Encrypt kms:Decrypt kms:GenerateDataKey kms:DescribeKey kms:CreateGrant".split()
LOGS_USE = "kms:Encrypt kms:Decrypt kms:ReEncryptFrom kms:ReEncryptTo kms:GenerateDataKey kms:DescribeKey".split()
ALARMS_USE = "kms:Decrypt kms:GenerateDataKey".split()


class _Use(NamedTuple):
    """A use of the key: its user's name, principals of a `kind` (one of them is enough), actions, and condition keys."""

    user: str
    kind: str
    principals: set[str]
    actions: list[str]
    context: dict[str, str]


def key(stack: DeployedStack) -> Iterator[Finding]:
    """The key is enabled, and its policy allows every use."""
    arn = stack.outputs["KmsKeyArn"]
    if not arn:
        return
    kms = stack.client("kms")
    state = kms.describe_key(KeyId=arn)["KeyMetadata"]["KeyState"]
    if state != "Enabled":
        enable = stack.location.aws_command(f"kms enable-key --key-id {arn}")
        message = f"The key {arn} is {state}: data under it can be neither read nor written."
        yield Finding("KEY_STATE", message, f"If its deletion is scheduled, cancel the deletion. Then run `{enable}`.")
    policy = msgspec.json.decode(kms.get_key_policy(KeyId=arn, PolicyName="default")["Policy"])
    allowed = [statement for statement in _listed(policy["Statement"]) if statement["Effect"] == "Allow"]
    missing: dict[str, dict[str, None]] = {}
    for use in _uses(stack):
        for action in use.actions:
            if not any(_allows(statement, use, action) for statement in allowed):
                missing.setdefault(use.user, {})[action] = None
    for user, actions in missing.items():
        message = f"The policy of the key {arn} does not allow {user}: {', '.join(actions)}."
        fix = "Add the statement from docs/operations.md (Keys), with this stack's names in its conditions."
        yield Finding("KEY_POLICY", message, fix)


def _uses(stack: DeployedStack) -> Iterator[_Use]:
    region, account, partition = stack.region, stack.account, stack.partition
    iam = f"arn:{partition}:iam::{account}"
    for role in stack.resources("AWS::IAM::Role").values():
        principals = {account, f"{iam}:root", f"{iam}:role/{role}"}
        yield _Use("the account's roles", "AWS", principals, ROLES_USE, {"aws:PrincipalAccount": account})
    logs = {f"logs.{region}.amazonaws.com", f"logs.{region}.amazonaws.com.cn"}
    for group in stack.resources("AWS::Logs::LogGroup").values():
        context = {"kms:EncryptionContext:aws:logs:arn": f"arn:{partition}:logs:{region}:{account}:log-group:{group}"}
        yield _Use("CloudWatch Logs", "Service", logs, LOGS_USE, context)
    yield _Use("alarms", "Service", {"cloudwatch.amazonaws.com"}, ALARMS_USE, {"aws:SourceAccount": account})


def _allows(statement: Json, use: _Use, action: str) -> bool:
    """Return whether an Allow statement covers an action of a use.

    Conditions on the use's condition keys are checked; other conditions are assumed to hold.
    """
    named = statement.get("Principal", {})
    principals = {"*"} if named == "*" else set(_listed(named.get(use.kind, [])))
    actions = [pattern.lower() for pattern in _listed(statement.get("Action", []))]
    return (
        bool(principals & (use.principals | {"*"}))
        and any(fnmatchcase(action.lower(), pattern) for pattern in actions)
        and all(
            any(fnmatchcase(use.context[name], pattern) for pattern in _listed(patterns))
            for condition in statement.get("Condition", {}).values()
            for name, patterns in condition.items()
            if name in use.context
        )
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
