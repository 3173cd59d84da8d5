"""Deployment items of the run table (`deployment#<line>`): which run's model answers under a line's name.

`version` counts the writes, and each write is conditional on the version that its writer read. Whoever changes AWS's
resources for a line holds the item meanwhile (`busy`). The sparse index `open` lists all items under `DEPLOYMENT`.
"""

from enum import StrEnum
from typing import Any

import msgspec
from boto3.dynamodb.conditions import Key

from pipeline.runs import clock

DEPLOYMENT = "deployment#"
OPEN_DEPLOYMENT = "DEPLOYMENT"  # a deployment item's value in the index `open`


class Stage(StrEnum):
    """What happens to a line's deployment.

    PREPARING: endpoint and base model. TRYING: the new model under the candidate's name. SWITCHING: the new model under the
    line's name, and its alarms. RETURNING: the former model comes back. REMOVING: nothing will answer under the line's name.
    IDLE: nothing happens.
    """

    IDLE = "IDLE"
    PREPARING = "PREPARING"
    TRYING = "TRYING"
    SWITCHING = "SWITCHING"
    RETURNING = "RETURNING"
    REMOVING = "REMOVING"


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A line's deployment. Times are ISO 8601 in UTC.

    `number` counts the line's deployments and removals.

    `run` is the run whose model answers under the line's name, None without one; `target` is the run that is to replace it,
    or that could not. `refused` has the reasons of failed deployments by run. `refused_version` and `removed` are versions
    of the line: the champion of the first could not be deployed, that of the second is not to be served. Both stay so until
    the line has another version. `begun` is the beginning of the deployment, `since` that of the stage, and `updates` counts
    the stage's updates of the line's component. `answered` says how many tests the line's name answered as recorded, and
    `proved` when: the bake time begins then. `unused` are endpoints that the line has left, or has not come to, and models
    on Bedrock that it has left. `event` is still to be announced. Nobody else works on the line until `busy`.

    A line on Bedrock has no `endpoint` and no `instance_type`. Its `component` is the imported model's ARN, another one
    after each deployment. `imported` is the name of the target's import.
    """

    line: str
    version: int = 0
    number: int = 0
    stage: Stage = Stage.IDLE
    run: str | None = None
    target: str | None = None
    endpoint: str | None = None
    component: str | None = None
    imported: str | None = None
    model: str | None = None
    instance_type: str | None = None
    refused: dict[str, str] = {}
    refused_version: int | None = None
    removed: int | None = None
    begun: str | None = None
    since: str = ""
    updates: int = 0
    answered: str | None = None
    proved: str | None = None
    unused: list[str] = []
    deployed: str | None = None
    event: str | None = None
    reason: str | None = None
    busy: str | None = None
    arrived: str = ""

    @property
    def on_bedrock(self) -> bool:
        """Whether the line's model is one of Bedrock's."""
        return self.component is not None and self.endpoint is None

    @property
    def places(self) -> list[str]:
        """What is to be deleted once the line has left it: its endpoint, or its model's ARN on Bedrock. At most one."""
        return [place for place in (self.endpoint or self.component,) if place]


class StaleDeploymentError(Exception):
    """Another invocation wrote the deployment first."""


class DeploymentTable:
    """The deployment items of the run table."""

    def __init__(self, table: Any):
        self._table = table

    def get(self, line: str) -> Deployment:
        """Return a line's deployment; a line without an item has version 0."""
        item = self._table.get_item(Key={"id": DEPLOYMENT + line}, ConsistentRead=True).get("Item")
        return _of_item(item) if item else Deployment(line=line)

    def all(self) -> list[Deployment]:
        """Return all deployments. The index lags behind the table by up to seconds."""
        pages = self._table.meta.client.get_paginator("query").paginate(
            TableName=self._table.name, IndexName="open", KeyConditionExpression=Key("open").eq(OPEN_DEPLOYMENT)
        )
        return [_of_item(item) for page in pages for item in page["Items"]]

    def write(self, deployment: Deployment, **changes: Any) -> Deployment:
        """Write a deployment with changes, and return it. Raises StaleDeploymentError if it has another version by now."""
        now = clock.now()
        if "stage" in changes:
            changes |= {"since": now, "updates": 0}
        if changes.get("stage") in {Stage.PREPARING, Stage.REMOVING}:
            changes |= {"number": deployment.number + 1, "begun": now}
        written = msgspec.structs.replace(
            deployment, version=deployment.version + 1, arrived=deployment.arrived or now, **changes
        )
        values = {key: value for key, value in msgspec.to_builtins(written).items() if value is not None}
        try:
            self._table.put_item(
                Item={"id": DEPLOYMENT + written.line, "open": OPEN_DEPLOYMENT, **values},
                ConditionExpression="attribute_not_exists(id) OR version = :seen",
                ExpressionAttributeValues={":seen": deployment.version},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            raise StaleDeploymentError(
                f"the deployment of {written.line} no longer has version {deployment.version}"
            ) from None
        return written

    def release(self, deployment: Deployment) -> None:
        """End the time in which nobody else works on the line, unless another one began."""
        try:
            self._table.update_item(
                Key={"id": DEPLOYMENT + deployment.line},
                UpdateExpression="REMOVE busy",
                ConditionExpression="busy = :busy",
                ExpressionAttributeValues={":busy": deployment.busy},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return


def _of_item(item: dict[str, Any]) -> Deployment:
    numbers = {"version", "removed", "refused_version", "updates", "number"}
    return msgspec.convert({key: int(value) if key in numbers else value for key, value in item.items()}, Deployment)
