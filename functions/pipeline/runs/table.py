"""Runs: their identity, their states, and the table that every move is written to, conditionally.

The table has upload items (`upload#<key>`) and run items (`run#<run_id>`). The sparse index `open` lists what is not
finished: `open` is the item's state until everything that follows from it has been announced, then it is removed.
The item `capacity` has the places: the runs that have a SageMaker job, or are about to.
"""

import hashlib
import random
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import msgspec
from boto3.dynamodb.conditions import Attr, Key
from msgspec import structs

from tunedrop.object_keys import slug

RUN, UPLOAD, CAPACITY = "run#", "upload#", "capacity"
OPEN_UPLOAD = "UPLOAD"  # what the index `open` knows an unfinished upload by
# Two transactions on one item cannot run at once; DynamoDB cancels one, and the SDK does not repeat it. In seconds.
CONFLICT_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
LONGEST_BACKOFF = timedelta(hours=1)


class RunState(StrEnum):
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


FINAL = frozenset(
    {RunState.REJECTED, RunState.TRAINING_FAILED, RunState.TESTING_FAILED, RunState.PUBLISHED, RunState.CANCELLED}
)
# A run in one of these may be tried again, when its dataset is dropped again.
RETRYABLE = FINAL - {RunState.PUBLISHED}
# From which states a run may move to each. One that waits may begin to wait for another reason.
MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: frozenset({RunState.VALIDATED, RunState.WAITING}),
    RunState.TRAINING: frozenset({RunState.VALIDATED, RunState.WAITING}),
    RunState.TRAINED: frozenset({RunState.TRAINING, RunState.TRAINED}),
    RunState.TRAINING_FAILED: frozenset({RunState.TRAINING, RunState.VALIDATED, RunState.WAITING}),
    RunState.TESTING: frozenset({RunState.TRAINED}),
    RunState.TESTED: frozenset({RunState.TESTING}),
    RunState.TESTING_FAILED: frozenset({RunState.TESTING, RunState.TRAINED}),
    RunState.PUBLISHED: frozenset({RunState.TESTED}),
    RunState.CANCELLED: frozenset(RunState) - FINAL,
}
# The same for the moves that begin the next attempt: a job found no machine.
MOVES_TO_NEXT_ATTEMPT: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: frozenset({RunState.TRAINING}),
    RunState.TRAINED: frozenset({RunState.TESTING}),
}
# What a move does to the run's place, in DynamoDB's words: a run whose job exists has one, a waiting run has none.
PLACE: dict[RunState, str] = {RunState.TRAINING: "ADD", RunState.WAITING: "DELETE"}


def run_id(dataset: str, parts: Iterable[bytes | str]) -> str:
    """Return `<dataset slug>-<12 hex>`, the digest of everything that makes a run what it is.

    `parts` are the data's format and digest, the config, the inference tests, the base model's identity and the trainer's
    digest. Each is hashed by itself first, so that no byte can move from one part to the next unnoticed.
    """
    digest = hashlib.sha256(dataset.encode())
    for part in parts:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return f"{slug(dataset)}-{digest.hexdigest()[:12]}"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run item. Times are ISO 8601 in UTC; `trigger` is the upload (`key@sequencer`) that began this attempt.

    `choices` is how many instance types (or lists of them, on demand) attempts can be made with.
    """

    run_id: str
    dataset: str
    state: RunState
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
    choices: int = 1
    not_before: str | None = None
    artifacts: str | None = None
    bounded: bool = False
    reason: str | None = None
    verdict: str | None = None
    model_package: str | None = None
    open: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the run ended without a model."""
        return self.state in RETRYABLE

    @property
    def waits(self) -> bool:
        """Whether the run waits for room: for its training job, or with its tests still to come."""
        return self.state == RunState.WAITING or (self.state == RunState.TRAINED and self.reason is not None)

    @property
    def backs_off(self) -> bool:
        """Whether it is too early to look for a machine again."""
        return self.not_before is not None and self.not_before > now()


class StaleMoveError(Exception):
    """A move is not possible any more: the run is further on, or in another attempt. Its event has nothing left to do."""


def now() -> str:
    """Return the time, ISO 8601 in UTC with microseconds, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def ago(age: timedelta) -> str:
    """Return the time that was so long ago, as `now` does."""
    return (datetime.fromisoformat(now()) - age).isoformat(timespec="microseconds")


def backoff(run: Run) -> str | None:
    """Return the time before which a run whose job found no machine should not try again; None: at once.

    The run's next choice is tried at once; when all have been, after 1, 2, 4, … minutes, an hour at most.
    """
    walks, left = divmod(run.attempt, run.choices)
    if left:
        return None
    pause = min(timedelta(minutes=2 ** min(walks - 1, 10)), LONGEST_BACKOFF)
    return ago(-pause)


class _ConditionFailedError(Exception):
    """A transaction was cancelled since a condition does not hold: `index` is the first such item's."""

    def __init__(self, index: int):
        self.index = index
        super().__init__(f"the condition of item {index} does not hold")


class RunTable:
    """The run table. A move that has been made already succeeds again; one that is too late raises StaleMoveError."""

    def __init__(self, table: Any):
        self._table = table

    # --- uploads ---

    def claim_upload(self, key: str, version_id: str, sequencer: str) -> bool:
        """Record that an upload is being validated; False if it has been already, or if a newer one of its key was seen."""
        try:
            self._table.update_item(
                Key={"id": UPLOAD + key},
                UpdateExpression="SET version_id = :version, sequencer = :sequencer, #state = :state, #open = :open, "
                "arrived = :now, tries = if_not_exists(tries, :none) + :one REMOVE run_id",
                ConditionExpression="attribute_not_exists(id) OR sequencer < :sequencer "
                "OR (sequencer = :sequencer AND #state = :state)",
                ExpressionAttributeNames={"#state": "state", "#open": "open"},
                ExpressionAttributeValues={
                    ":version": version_id,
                    ":sequencer": sequencer,
                    ":state": RunState.VALIDATING.value,
                    ":open": OPEN_UPLOAD,
                    ":now": now(),
                    ":none": 0,
                    ":one": 1,
                },
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def finish_upload(self, key: str, sequencer: str, state: RunState, run_id: str) -> None:
        """Record what became of an upload, unless a newer one of the same key is under way. No run: `run_id` is empty."""
        try:
            self._table.update_item(
                Key={"id": UPLOAD + key},
                UpdateExpression="SET #state = :state, run_id = :run REMOVE #open, tries",
                ConditionExpression="sequencer = :sequencer",
                ExpressionAttributeNames={"#state": "state", "#open": "open"},
                ExpressionAttributeValues={":state": state.value, ":run": run_id, ":sequencer": sequencer},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return

    def open_uploads(self) -> list[dict[str, Any]]:
        """Return the items of the uploads whose validation is not finished, the oldest first."""
        return self._open(OPEN_UPLOAD)

    def upload(self, key: str) -> dict[str, Any] | None:
        """Return the upload item of a key."""
        item: dict[str, Any] | None = self._table.get_item(Key={"id": UPLOAD + key}, ConsistentRead=True).get("Item")
        return item

    # --- runs ---

    def get(self, run_id: str) -> Run | None:
        """Return a run, None if there is none of this id."""
        item = self._table.get_item(Key={"id": RUN + run_id}, ConsistentRead=True).get("Item")
        return run_of_item(item) if item else None

    def create(self, run: Run, sequencer: str) -> Run:
        """Create a run, or begin the next attempt of a failed one that another upload triggered; return what is there.

        The same content joins the run that has it, whatever state it is in; one whose end has not been announced yet, too.
        `sequencer` is the upload's: only the newest of its key begins another attempt, and only while it is being validated.
        """
        try:
            self._table.put_item(Item=_item_of(run), ConditionExpression=Attr("id").not_exists())
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            there = self.get(run.run_id)
            assert there is not None  # runs are never deleted
            if there.state in RETRYABLE and there.open is None and there.trigger != run.trigger:
                return self._next_attempt(there, run, sequencer)
            return there
        return run

    def _next_attempt(self, there: Run, run: Run, sequencer: str) -> Run:
        run = structs.replace(run, attempt=there.attempt + 1)
        put = {"Item": _item_of(run)} | {name: part for name, part in self._is(there, there.state).items() if name != "Key"}
        newest = {
            "Key": {"id": UPLOAD + run.key},
            "ConditionExpression": "sequencer = :sequencer AND #state = :state",
            "ExpressionAttributeNames": {"#state": "state"},
            "ExpressionAttributeValues": {":sequencer": sequencer, ":state": RunState.VALIDATING},
        }
        try:
            self._transact({"Put": put}, {"ConditionCheck": newest})
        except _ConditionFailedError:
            return self.get(run.run_id) or run
        return run

    def move(self, run: Run, to: RunState, *, next_attempt: bool = False, **values: Any) -> Run:
        """Move a run to another state, set `values` on it and remove those that are None.

        The write is conditional on the attempt that the caller saw and on a state that the move is possible from: a late
        event moves nothing. `next_attempt` raises the attempt with the move. Where the state decides whether the run has
        a place, both are written in one transaction. A move that has been made already is a no-op. Raises StaleMoveError
        when the run is further on, or in another attempt.
        """
        possible = sorted((MOVES_TO_NEXT_ATTEMPT if next_attempt else MOVES)[to])
        assert run.state in possible, f"no move from {run.state} to {to}"
        sources = {f":from{n}": state for n, state in enumerate(possible)}
        attempt = run.attempt + int(next_attempt)
        changes = {"state": to, "open": to.value, "updated": now(), "attempt": attempt, **values}
        written = {name: value for name, value in changes.items() if value is not None}
        removed = changes.keys() - written.keys()
        update = {
            "Key": {"id": RUN + run.run_id},
            "UpdateExpression": "SET "
            + ", ".join(f"#{name} = :{name}" for name in written)
            + (" REMOVE " + ", ".join(f"#{name}" for name in sorted(removed)) if removed else ""),
            "ConditionExpression": f"#attempt = :seen AND #state IN ({', '.join(sources)})",
            "ExpressionAttributeNames": {f"#{name}": name for name in changes},
            "ExpressionAttributeValues": {f":{name}": value for name, value in written.items()}
            | {":seen": run.attempt}
            | sources,
        }
        try:
            if to in PLACE:
                self._transact({"Update": update}, {"Update": _place(run, PLACE[to])})
                return structs.replace(run, **changes)
            return run_of_item(self._table.update_item(**update, ReturnValues="ALL_NEW")["Attributes"])
        except (self._table.meta.client.exceptions.ConditionalCheckFailedException, _ConditionFailedError):
            there = self.get(run.run_id)
            if there is not None and there.state == to and there.attempt == attempt:
                return there
            raise StaleMoveError(f"{run.run_id} cannot move to {to} in attempt {attempt}: it is {there}") from None

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

    def open_runs(self, state: RunState, limit: int | None = None) -> list[Run]:
        """Return the runs whose work in `state` is not finished, the oldest first. The index may lag a little behind."""
        return [run_of_item(item) for item in self._open(state.value, limit)]

    def _open(self, value: str, limit: int | None = None) -> list[dict[str, Any]]:
        query: dict[str, Any] = {"IndexName": "open", "KeyConditionExpression": Key("open").eq(value)}
        if limit is not None:
            return list(self._table.query(**query, Limit=limit)["Items"])
        pages = self._table.meta.client.get_paginator("query").paginate(TableName=self._table.name, **query)
        return [item for page in pages for item in page["Items"]]

    # --- places ---

    def acquire(self, run: Run, limit: int) -> bool:
        """Take one of `limit` places for a run that is to be started; True as well if the run has a place already.

        Raises StaleMoveError when the run is not to be started any more.
        """
        place = _place(run, "ADD")
        place["ConditionExpression"] = "attribute_not_exists(running) OR size(running) < :limit OR contains(running, :run)"
        place["ExpressionAttributeValues"] |= {":run": run.run_id, ":limit": limit}
        try:
            self._transact({"ConditionCheck": self._is(run, *MOVES[RunState.TRAINING])}, {"Update": place})
        except _ConditionFailedError as failed:
            if failed.index == 0:
                raise StaleMoveError(f"{run.run_id} is not to be started in attempt {run.attempt} any more") from None
            return False
        return True

    def has_place(self, run: Run) -> bool:
        """Whether a run has a place."""
        item = self._table.get_item(Key={"id": CAPACITY}, ConsistentRead=True).get("Item", {})
        return run.run_id in item.get("running", ())

    def release(self, run: Run) -> None:
        """Give the place of a run that has ended back, unless the run has begun another attempt with it."""
        try:
            self._transact({"ConditionCheck": self._is(run, run.state)}, {"Update": _place(run, "DELETE")})
        except _ConditionFailedError:
            return

    @staticmethod
    def _is(run: Run, *states: RunState) -> dict[str, Any]:
        """Return the condition that a run is in the same attempt and in one of these states."""
        values = {f":state{n}": state for n, state in enumerate(sorted(states))}
        return {
            "Key": {"id": RUN + run.run_id},
            "ConditionExpression": f"attempt = :attempt AND #state IN ({', '.join(values)})",
            "ExpressionAttributeNames": {"#state": "state"},
            "ExpressionAttributeValues": {":attempt": run.attempt, **values},
        }

    def _transact(self, *items: dict[str, Any]) -> None:
        """Write all of these items of TransactWriteItems or none. Raises _ConditionFailedError."""
        client = self._table.meta.client
        named = [{kind: {"TableName": self._table.name} | item} for each in items for kind, item in each.items()]
        for pause in (*CONFLICT_PAUSES, None):
            try:
                client.transact_write_items(TransactItems=named)
                return
            except client.exceptions.TransactionCanceledException as error:
                codes = [reason["Code"] for reason in error.response["CancellationReasons"]]
                if "ConditionalCheckFailed" in codes:
                    raise _ConditionFailedError(codes.index("ConditionalCheckFailed")) from None
                if pause is None or "TransactionConflict" not in codes:
                    raise
                time.sleep(random.uniform(0, pause))


def _place(run: Run, what: str) -> dict[str, Any]:
    """Return the update that `ADD`s a run's place or `DELETE`s it."""
    return {
        "Key": {"id": CAPACITY},
        "UpdateExpression": f"{what} running :runs",
        "ExpressionAttributeValues": {":runs": {run.run_id}},
    }


def _item_of(run: Run) -> dict[str, Any]:
    """Return the item of a run that begins."""
    item = msgspec.to_builtins(run) | {"id": RUN + run.run_id, "open": run.state.value}
    return {key: value for key, value in item.items() if value is not None}


def run_of_item(item: dict[str, Any]) -> Run:
    """Return the run that a run item of the table holds."""
    numbers = {"attempt", "rows", "choices"}
    return msgspec.convert({key: int(value) if key in numbers else value for key, value in item.items()}, Run)
