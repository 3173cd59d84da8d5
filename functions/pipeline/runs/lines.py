"""Line items of the run table (`line#<line>`): a line's champion, and the challengers that were judged against it.

`version` counts the champions: each change of the champion raises it, and a verdict is written only if the version is still
that of the run's tests. The sparse index `open` lists all line items under `LINE`.
"""

from typing import Any

import msgspec
from boto3.dynamodb.conditions import Key

from pipeline.runs import clock
from pipeline.runs.states import Run, RunState, StaleMoveError
from pipeline.runs.table import RUN, run_of_item
from pipeline.runs.transactions import ConditionFailedError, transact

LINE = "line#"
OPEN_LINE = "LINE"  # a line item's value in the index `open`


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line. `champion` is a run's id, None without a champion, and `champion_package` the ARN of its model package.

    `suite` is the digest of the line's suite. `packages` has the run of each model package, by the package's version.
    `tries` are the runs that were judged since the last champion, in order. `announced` is the version of the last
    announced champion. `arrived` is the time of the last change of the champion.
    """

    line: str
    version: int = 0
    champion: str | None = None
    champion_package: str | None = None
    suite: str | None = None
    packages: dict[str, str] = {}
    tries: list[str] = []
    announced: int = 0
    arrived: str = ""

    @property
    def settled(self) -> bool:
        """Whether the registry knows the champion. A champion that the gate approved a moment ago has no package yet."""
        return self.champion is None or self.champion_package is not None


class StaleLineError(Exception):
    """The line has another champion than the one that a run was tested against."""


class LineTable:
    """The line items of the run table. Repeating a write changes nothing."""

    def __init__(self, table: Any):
        self._table = table

    def get(self, name: str) -> Line:
        """Return a line; a line without an item has version 0."""
        item = self._table.get_item(Key={"id": LINE + name}, ConsistentRead=True).get("Item")
        return _line_of_item(item) if item else Line(line=name)

    def all(self) -> list[Line]:
        """Return all lines. The index lags behind the table by up to seconds."""
        pages = self._table.meta.client.get_paginator("query").paginate(
            TableName=self._table.name, IndexName="open", KeyConditionExpression=Key("open").eq(OPEN_LINE)
        )
        return [_line_of_item(item) for page in pages for item in page["Items"]]

    def add_try(self, line: Line, run_id: str) -> Line:
        """Add a run to the tries of a line's present champion, and return the line. Raises StaleLineError."""
        try:
            answer = self._table.update_item(
                Key={"id": LINE + line.line},
                UpdateExpression="SET tries = list_append(if_not_exists(tries, :none), :runs), line = :line, #open = :open, "
                "version = :seen, packages = if_not_exists(packages, :empty), announced = if_not_exists(announced, :zero), "
                "arrived = if_not_exists(arrived, :now)",
                ConditionExpression="(attribute_not_exists(id) OR version = :seen) AND NOT contains(tries, :run)",
                ExpressionAttributeNames={"#open": "open"},
                ExpressionAttributeValues={
                    ":none": [],
                    ":runs": [run_id],
                    ":run": run_id,
                    ":line": line.line,
                    ":open": OPEN_LINE,
                    ":seen": line.version,
                    ":empty": {},
                    ":zero": 0,
                    ":now": clock.now(),
                },
                ReturnValues="ALL_NEW",
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            current = self.get(line.line)
            if current.version != line.version:
                raise StaleLineError(f"the line {line.line} has version {current.version} by now") from None
            return current
        return _line_of_item(answer["Attributes"])

    def decide(self, run: Run, line: Line, verdict: str, tries: int, suite: str | None) -> Run:
        """Write a tested run's verdict, and with a `suite` make the run the line's champion; return the run.

        Both are one transaction, conditional on the line's version. A second delivery gets the run with its first verdict.
        Raises StaleLineError, or StaleMoveError for a run that is no longer tested, for example because it was stopped.
        """
        now = clock.now()
        decided = {
            "Key": {"id": RUN + run.run_id},
            "UpdateExpression": "SET verdict = :verdict, tries = :tries, updated = :now",
            "ConditionExpression": "attempt = :attempt AND #state = :tested AND attribute_not_exists(verdict)",
            "ExpressionAttributeNames": {"#state": "state"},
            "ExpressionAttributeValues": {
                ":verdict": verdict,
                ":tries": tries,
                ":now": now,
                ":attempt": run.attempt,
                ":tested": RunState.TESTED.value,
            },
        }
        try:
            transact(self._table, {"Update": decided}, _unchanged(line) if suite is None else _champion(line, run, suite))
        except ConditionFailedError as failed:
            item = self._table.get_item(Key={"id": RUN + run.run_id}, ConsistentRead=True)["Item"]
            current = run_of_item(item)
            if current.attempt == run.attempt and current.verdict is not None:
                return current
            if failed.index == 0:
                raise StaleMoveError(f"{run.run_id} is no longer tested in attempt {run.attempt}: {current}") from None
            raise StaleLineError(f"the line {line.line} no longer has version {line.version}") from None
        return msgspec.structs.replace(run, verdict=verdict, tries=tries, updated=now)

    def add_package(self, name: str, version: str, run_id: str, arn: str) -> None:
        """Record the model package of a run of the line, and as the champion's if the run is the champion."""
        self._table.update_item(
            Key={"id": LINE + name},
            UpdateExpression="SET packages.#version = :run",
            ExpressionAttributeNames={"#version": version},
            ExpressionAttributeValues={":run": run_id},
        )
        self._write(
            name,
            "SET champion_package = :package",
            "champion = :run AND attribute_not_exists(champion_package)",
            {":run": run_id, ":package": arn},
        )

    def set_champion(self, line: Line, champion: str | None, package: str | None, suite: str | None) -> None:
        """Give a line another champion, or none, unless the line has changed."""
        values = {"champion": champion, "champion_package": package, "suite": suite}
        written = {name: value for name, value in values.items() if value is not None}
        removed = sorted(values.keys() - written.keys())
        self._write(
            line.line,
            "SET version = :next, tries = :none, arrived = :now"
            + "".join(f", {name} = :{name}" for name in written)
            + (f" REMOVE {', '.join(removed)}" if removed else ""),
            "version = :seen",
            {":seen": line.version, ":next": line.version + 1, ":none": [], ":now": clock.now()}
            | {f":{name}": value for name, value in written.items()},
        )

    def mark_announced(self, line: Line) -> None:
        """Record that a line's champion is announced, unless the line has changed."""
        self._write(line.line, "SET announced = :seen", "version = :seen", {":seen": line.version})

    def _write(self, name: str, update: str, condition: str, values: dict[str, Any]) -> None:
        """Update a line item if a condition holds."""
        try:
            self._table.update_item(
                Key={"id": LINE + name},
                UpdateExpression=update,
                ConditionExpression=condition,
                ExpressionAttributeValues=values,
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return


def _unchanged(line: Line) -> dict[str, Any]:
    check = {
        "Key": {"id": LINE + line.line},
        "ConditionExpression": "version = :seen",
        "ExpressionAttributeValues": {":seen": line.version},
    }
    return {"ConditionCheck": check}


def _champion(line: Line, run: Run, suite: str) -> dict[str, Any]:
    update = {
        "Key": {"id": LINE + line.line},
        "UpdateExpression": "SET version = :next, champion = :run, suite = :suite, tries = :none, arrived = :now "
        "REMOVE champion_package",
        "ConditionExpression": "version = :seen",
        "ExpressionAttributeValues": {
            ":seen": line.version,
            ":next": line.version + 1,
            ":run": run.run_id,
            ":suite": suite,
            ":none": [],
            ":now": clock.now(),
        },
    }
    return {"Update": update}


def _line_of_item(item: dict[str, Any]) -> Line:
    numbers = {"version", "announced"}
    return msgspec.convert({key: int(value) if key in numbers else value for key, value in item.items()}, Line)
