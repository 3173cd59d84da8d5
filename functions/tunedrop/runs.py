"""Runs: their identity, their states, and the table that every move is written to, conditionally.

The table has upload items (`upload#<key>`) and run items (`run#<run_id>`). The sparse index `open` lists what is not
finished: `open` is the item's state until everything that follows from it has been announced, then it is removed.
"""

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec
from boto3.dynamodb.conditions import Attr, Key

from tunedrop.layout import slug

RUN, UPLOAD, CAPACITY = "run#", "upload#", "capacity"
SEQUENCER_LENGTH = 64


class State(StrEnum):
    """The states of a run."""

    VALIDATING = "VALIDATING"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    WAITING = "WAITING"
    TRAINING = "TRAINING"
    TRAINED = "TRAINED"
    TRAINING_FAILED = "TRAINING_FAILED"
    TESTING = "TESTING"
    TESTED = "TESTED"
    TESTING_FAILED = "TESTING_FAILED"
    PUBLISHED = "PUBLISHED"
    CANCELLED = "CANCELLED"


FINAL = frozenset({State.REJECTED, State.TRAINING_FAILED, State.TESTING_FAILED, State.PUBLISHED, State.CANCELLED})
# A run in one of these may be tried again, when its dataset is dropped again.
RETRYABLE = frozenset({State.TRAINING_FAILED, State.TESTING_FAILED, State.CANCELLED})
# From which states a run may move to each.
MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.VALIDATED, State.TRAINING}),  # from TRAINING with the next attempt only
    State.TRAINING: frozenset({State.VALIDATED, State.WAITING}),
    State.TRAINED: frozenset({State.TRAINING}),
    State.TRAINING_FAILED: frozenset({State.TRAINING, State.VALIDATED, State.WAITING}),
    State.TESTING: frozenset({State.TRAINED}),
    State.TESTED: frozenset({State.TESTING}),
    State.TESTING_FAILED: frozenset({State.TESTING, State.TRAINED}),
    State.PUBLISHED: frozenset({State.TESTED}),
    State.CANCELLED: frozenset(State) - FINAL,
}


def run_id(dataset: str, parts: Iterable[bytes | str]) -> str:
    """Return `<dataset slug>-<12 hex>`, the digest of everything that makes a run what it is.

    `parts` are the data's digest, the config, the inference tests, the base model's identity and the trainer's digest. Each
    is hashed by itself first, so that no byte can move from one part to the next unnoticed.
    """
    digest = hashlib.sha256(dataset.encode())
    for part in parts:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return f"{slug(dataset)}-{digest.hexdigest()[:12]}"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run item. Times are ISO 8601 in UTC; `trigger` is the upload (`key@sequencer`) that began this attempt."""

    run_id: str
    dataset: str
    state: State
    attempt: int
    trigger: str
    key: str
    version_id: str
    arrived: str
    updated: str
    model: str
    plan: str
    rows: int = 0
    train_job: str | None = None
    test_job: str | None = None
    instance_type: str | None = None
    artifacts: str | None = None
    bounded: bool = False
    reason: str | None = None
    verdict: str | None = None
    model_package: str | None = None
    open: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the run ended without a model."""
        return self.state in FINAL - {State.PUBLISHED}


class StaleMoveError(Exception):
    """A move is not possible any more: the run is further on, or in another attempt. Its event has nothing left to do."""


def now() -> str:
    """Return the time, ISO 8601 in UTC with microseconds, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class RunTable:
    """The run table. A move that has been made already succeeds again; one that is too late raises StaleMoveError."""

    def __init__(self, table: Any):
        self._table = table

    # --- uploads ---

    def claim_upload(self, key: str, version_id: str, sequencer: str) -> bool:
        """Record that an upload is being validated; False if a newer upload of this key has been seen.

        S3 sequencers of one key are compared as text after padding the shorter one on the right with zeros
        (https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html).
        """
        padded = sequencer.ljust(SEQUENCER_LENGTH, "0")
        try:
            self._table.update_item(
                Key={"id": UPLOAD + key},
                UpdateExpression="SET version_id = :version, sequencer = :sequencer, #state = :state, #open = :open, "
                "arrived = if_not_exists(arrived, :now)",
                ConditionExpression="attribute_not_exists(id) OR sequencer <= :sequencer",
                ExpressionAttributeNames={"#state": "state", "#open": "open"},
                ExpressionAttributeValues={
                    ":version": version_id,
                    ":sequencer": padded,
                    ":state": State.VALIDATING.value,
                    ":open": "UPLOAD",
                    ":now": now(),
                },
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def finish_upload(self, key: str, sequencer: str, state: State, run_id: str) -> None:
        """Record what became of an upload, unless a newer one of the same key is under way."""
        try:
            self._table.update_item(
                Key={"id": UPLOAD + key},
                UpdateExpression="SET #state = :state, run_id = :run REMOVE #open",
                ConditionExpression="sequencer = :sequencer",
                ExpressionAttributeNames={"#state": "state", "#open": "open"},
                ExpressionAttributeValues={
                    ":state": state.value,
                    ":run": run_id,
                    ":sequencer": sequencer.ljust(SEQUENCER_LENGTH, "0"),
                },
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return

    def upload(self, key: str) -> dict[str, Any] | None:
        """Return the upload item of a key."""
        item: dict[str, Any] | None = self._table.get_item(Key={"id": UPLOAD + key}, ConsistentRead=True).get("Item")
        return item

    # --- runs ---

    def get(self, run_id: str) -> Run | None:
        """Return a run, None if there is none of this id."""
        item = self._table.get_item(Key={"id": RUN + run_id}, ConsistentRead=True).get("Item")
        return run_of_item(item) if item else None

    def create(self, run: Run) -> Run:
        """Create a run, or begin the next attempt of a failed one that another upload triggered; return what is there.

        The same content joins the run that has it, whatever state it is in.
        """
        item = msgspec.to_builtins(run) | {"id": RUN + run.run_id, "open": run.state.value}
        try:
            self._table.put_item(
                Item={key: value for key, value in item.items() if value is not None},
                ConditionExpression=Attr("id").not_exists(),
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            there = self.get(run.run_id)
            assert there is not None  # runs are never deleted
            if there.state in RETRYABLE and there.trigger != run.trigger:
                return self._next_attempt(there, run)
            return there
        return run

    def _next_attempt(self, there: Run, run: Run) -> Run:
        try:
            item = self._table.update_item(
                Key={"id": RUN + run.run_id},
                UpdateExpression="SET #state = :state, #open = :state, attempt = attempt + :one, #trigger = :trigger, "
                "arrived = :arrived, updated = :arrived, version_id = :version "
                "REMOVE train_job, test_job, artifacts, bounded, reason, verdict, instance_type",
                ConditionExpression=Attr("attempt").eq(there.attempt) & Attr("state").is_in(sorted(RETRYABLE)),
                ExpressionAttributeNames={"#state": "state", "#open": "open", "#trigger": "trigger"},
                ExpressionAttributeValues={
                    ":state": State.VALIDATED.value,
                    ":one": 1,
                    ":trigger": run.trigger,
                    ":arrived": run.arrived,
                    ":version": run.version_id,
                },
                ReturnValues="ALL_NEW",
            )["Attributes"]
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            retried = self.get(run.run_id)
            assert retried is not None
            return retried
        return run_of_item(item)

    def move(self, run: Run, to: State, *, next_attempt: bool = False, **values: Any) -> Run:
        """Move a run to another state and set `values` on it. Made already: a no-op that returns the run as it is.

        The write is conditional on the state and the attempt that the caller saw: a late event moves nothing.
        `next_attempt` raises the attempt with the move (a job that never ran for want of capacity). Raises
        StaleMoveError when the run is not as the caller saw it.
        """
        assert run.state in MOVES[to], f"no move from {run.state} to {to}"
        attempt = run.attempt + int(next_attempt)
        assignments = {"state": to.value, "open": to.value, "updated": now(), "attempt": attempt} | values
        condition = Attr("attempt").eq(run.attempt) & Attr("state").eq(run.state.value)
        names = {f"#{name}": name for name in assignments}
        try:
            item = self._table.update_item(
                Key={"id": RUN + run.run_id},
                UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in assignments),
                ConditionExpression=condition,
                ExpressionAttributeNames=names,
                ExpressionAttributeValues={f":{name}": value for name, value in assignments.items()},
                ReturnValues="ALL_NEW",
            )["Attributes"]
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            there = self.get(run.run_id)
            if there is not None and there.state == to and there.attempt == attempt:
                return there
            raise StaleMoveError(f"{run.run_id} cannot move to {to} in attempt {attempt}: it is {there}") from None
        return run_of_item(item)

    def close(self, run: Run) -> None:
        """Take a finished run off the list of open ones, after its end has been announced."""
        try:
            self._table.update_item(
                Key={"id": RUN + run.run_id},
                UpdateExpression="REMOVE #open",
                ConditionExpression=Attr("attempt").eq(run.attempt) & Attr("state").eq(run.state.value),
                ExpressionAttributeNames={"#open": "open"},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return

    def open_runs(self, state: State, limit: int | None = None) -> list[Run]:
        """Return the runs whose work in `state` is not finished, the oldest first."""
        query: dict[str, Any] = {"IndexName": "open", "KeyConditionExpression": Key("open").eq(state.value)}
        if limit is not None:
            return [run_of_item(item) for item in self._table.query(**query, Limit=limit)["Items"]]
        pages = self._table.meta.client.get_paginator("query").paginate(TableName=self._table.name, **query)
        return [run_of_item(item) for page in pages for item in page["Items"]]

    # --- capacity ---

    def acquire(self, run: Run, limit: int) -> bool:
        """Take one of `limit` places among the runs that have a job; True as well if the run has a place already."""
        try:
            self._table.update_item(
                Key={"id": CAPACITY},
                UpdateExpression="ADD running :runs",
                ConditionExpression="attribute_not_exists(running) OR size(running) < :limit OR contains(running, :run)",
                ExpressionAttributeValues={":runs": {run.run_id}, ":run": run.run_id, ":limit": limit},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def release(self, run: Run) -> None:
        """Give a run's place back."""
        self._table.update_item(
            Key={"id": CAPACITY},
            UpdateExpression="DELETE running :runs",
            ExpressionAttributeValues={":runs": {run.run_id}},
        )


def run_of_item(item: dict[str, Any]) -> Run:
    """Return the run that a run item of the table holds."""
    return msgspec.convert({key: int(value) if key in {"attempt", "rows"} else value for key, value in item.items()}, Run)


__all__ = ["FINAL", "MOVES", "RETRYABLE", "Run", "RunTable", "StaleMoveError", "State", "now", "run_id"]
