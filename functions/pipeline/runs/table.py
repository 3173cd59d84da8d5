"""The run table: conditional writes, one for each move of a run.

The table has upload items (`upload#<key>`), run items (`run#<run_id>`), line items (`pipeline.runs.lines`) and one item
`capacity`, whose set `running` holds the runs that have a slot: the right to have a SageMaker job. The sparse index `open`
lists unfinished uploads and runs: a run's attribute `open` is its state until every announcement of that state is out;
`close` removes it.
"""

from typing import Any

import msgspec
from boto3.dynamodb.conditions import Attr, Key
from msgspec import structs

from pipeline.runs import clock
from pipeline.runs.states import (
    MOVES,
    MOVES_TO_NEXT_ATTEMPT,
    RETRYABLE,
    SLOT_CHANGES,
    IdTakenError,
    Run,
    RunState,
    StaleMoveError,
    UploadDoneError,
)
from pipeline.runs.transactions import ConditionFailedError, transact

RUN, UPLOAD, CAPACITY = "run#", "upload#", "capacity"
OPEN_UPLOAD = "UPLOAD"  # an unfinished upload's value in the index `open`


class RunTable:
    """The run table. Repeating a move succeeds; a move that comes too late raises StaleMoveError."""

    def __init__(self, table: Any):
        self._table = table

    # --- uploads ---

    def claim_upload(self, key: str, version_id: str, sequencer: str) -> bool:
        """Record that validation of an upload begins; False after its validation, or if a newer upload of the key exists."""
        try:
            self._table.update_item(
                Key={"id": UPLOAD + key},
                UpdateExpression="SET version_id = :version, sequencer = :sequencer, #state = :state, #open = :open, "
                "arrived = :now REMOVE run_id",
                ConditionExpression="attribute_not_exists(id) OR sequencer < :sequencer "
                "OR (sequencer = :sequencer AND #state = :state)",
                ExpressionAttributeNames={"#state": "state", "#open": "open"},
                ExpressionAttributeValues={
                    ":version": version_id,
                    ":sequencer": sequencer,
                    ":state": RunState.VALIDATING.value,
                    ":open": OPEN_UPLOAD,
                    ":now": clock.now(),
                },
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def finish_upload(self, key: str, sequencer: str, state: RunState, run_id: str) -> None:
        """Record an upload's outcome, unless a newer upload of the key exists. Without a run, `run_id` is empty."""
        try:
            self._table.update_item(
                Key={"id": UPLOAD + key},
                UpdateExpression="SET #state = :state, run_id = :run REMOVE #open, requests",
                ConditionExpression="sequencer = :sequencer",
                ExpressionAttributeNames={"#state": "state", "#open": "open"},
                ExpressionAttributeValues={":state": state.value, ":run": run_id, ":sequencer": sequencer},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return

    def count_request(self, item: dict[str, Any]) -> bool:
        """Count a request to validate an unfinished upload again; False if it is finished or a newer upload exists."""
        try:
            self._table.update_item(
                Key={"id": item["id"]},
                UpdateExpression="ADD requests :one",
                ConditionExpression=Attr("open").exists() & Attr("sequencer").eq(item["sequencer"]),
                ExpressionAttributeValues={":one": 1},
            )
        except self._table.meta.client.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def open_uploads(self) -> list[dict[str, Any]]:
        """Return the items of uploads with unfinished validation, oldest first."""
        return self._open(OPEN_UPLOAD)

    def upload(self, key: str) -> dict[str, Any] | None:
        """Return the upload item of a key."""
        item: dict[str, Any] | None = self._table.get_item(Key={"id": UPLOAD + key}, ConsistentRead=True).get("Item")
        return item

    # --- runs ---

    def get(self, run_id: str) -> Run | None:
        """Return a run, None for an unknown id."""
        item = self._table.get_item(Key={"id": RUN + run_id}, ConsistentRead=True).get("Item")
        return run_of_item(item) if item else None

    def create(self, run: Run, sequencer: str) -> Run:
        """Create a run, or begin the next attempt of a failed run for another upload; return the run in the table.

        Identical inputs reuse the existing run in any state, even before its end was announced. `sequencer` is the upload's:
        only the newest upload of a key begins an attempt, and only during its validation. Raises IdTakenError if a run with
        other inputs has the id, and UploadDoneError if the upload has its run already.
        """
        put = {"Item": _item_of(run), "ConditionExpression": "attribute_not_exists(id)"}
        not_done = self._upload(run, sequencer, "sequencer <> :sequencer OR #state = :state")
        try:
            transact(self._table, {"Put": put}, {"ConditionCheck": not_done})
        except ConditionFailedError as failed:
            existing = self.get(run.run_id)
            if existing is None:
                raise UploadDoneError(f"{run.trigger} was validated meanwhile") from failed
            if existing.digest != run.digest:
                raise IdTakenError(f"{run.run_id} has other inputs") from None
            if existing.state in RETRYABLE and existing.open is None and existing.trigger != run.trigger:
                return self._next_attempt(existing, run, sequencer)
            return existing
        return run

    @staticmethod
    def _upload(run: Run, sequencer: str, condition: str) -> dict[str, Any]:
        """Return a check of the item of a run's upload; `:state` in the condition is VALIDATING."""
        return {
            "Key": {"id": UPLOAD + run.key},
            "ConditionExpression": condition,
            "ExpressionAttributeNames": {"#state": "state"},
            "ExpressionAttributeValues": {":sequencer": sequencer, ":state": RunState.VALIDATING},
        }

    def _next_attempt(self, existing: Run, run: Run, sequencer: str) -> Run:
        run = structs.replace(run, attempt=existing.attempt + 1)
        unchanged = {name: part for name, part in self._is(existing, existing.state).items() if name != "Key"}
        put = {"Item": _item_of(run)} | unchanged
        newest = self._upload(run, sequencer, "sequencer = :sequencer AND #state = :state")
        try:
            transact(self._table, {"Put": put}, {"ConditionCheck": newest})
        except ConditionFailedError:
            return self.get(run.run_id) or run
        return run

    def move(self, run: Run, to: RunState, *, next_attempt: bool = False, **values: Any) -> Run:
        """Move a run to another state, set its attributes `values` and remove the attributes whose value is None.

        The write is conditional on the attempt that the caller saw and on a state that allows the move: a late event moves
        nothing. `next_attempt` raises the attempt with the move. A move that takes or frees a slot writes both items in one
        transaction. Repeating a move changes nothing. Raises StaleMoveError for a run in a later state or another attempt,
        and for a run with a verdict that is not to be published.
        """
        possible = sorted((MOVES_TO_NEXT_ATTEMPT if next_attempt else MOVES)[to])
        assert run.state in possible, f"no move from {run.state} to {to}"
        sources = {f":from{n}": state for n, state in enumerate(possible)}
        attempt = run.attempt + int(next_attempt)
        changes = {"state": to, "open": to.value, "updated": clock.now(), "attempt": attempt, **values}
        written = {name: value for name, value in changes.items() if value is not None}
        removed = changes.keys() - written.keys()
        update = {
            "Key": {"id": RUN + run.run_id},
            "UpdateExpression": "SET "
            + ", ".join(f"#{name} = :{name}" for name in written)
            + (" REMOVE " + ", ".join(f"#{name}" for name in sorted(removed)) if removed else ""),
            "ConditionExpression": f"#attempt = :seen AND #state IN ({', '.join(sources)})"
            + ("" if to == RunState.PUBLISHED else " AND attribute_not_exists(verdict)"),
            "ExpressionAttributeNames": {f"#{name}": name for name in changes},
            "ExpressionAttributeValues": {f":{name}": value for name, value in written.items()}
            | {":seen": run.attempt}
            | sources,
        }
        try:
            if to in SLOT_CHANGES:
                transact(self._table, {"Update": update}, {"Update": _slot(run, SLOT_CHANGES[to])})
                return structs.replace(run, **changes)
            return run_of_item(self._table.update_item(**update, ReturnValues="ALL_NEW")["Attributes"])
        except (self._table.meta.client.exceptions.ConditionalCheckFailedException, ConditionFailedError):
            current = self.get(run.run_id)
            if current is not None and current.state == to and current.attempt == attempt:
                return current
            raise StaleMoveError(f"{run.run_id} cannot move to {to} in attempt {attempt}: the table has {current}") from None

    def close(self, run: Run) -> None:
        """Remove a finished run from the index of open runs, after the announcement of its end."""
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
        """Return the open runs in `state`, oldest first. The index lags behind the table by up to seconds."""
        return [run_of_item(item) for item in self._open(state.value, limit)]

    def _open(self, value: str, limit: int | None = None) -> list[dict[str, Any]]:
        query: dict[str, Any] = {"IndexName": "open", "KeyConditionExpression": Key("open").eq(value)}
        if limit is not None:
            return list(self._table.query(**query, Limit=limit)["Items"])
        pages = self._table.meta.client.get_paginator("query").paginate(TableName=self._table.name, **query)
        return [item for page in pages for item in page["Items"]]

    # --- slots ---

    def acquire(self, run: Run, limit: int) -> bool:
        """Take one of `limit` slots for a run without a job; True also for a run that has a slot.

        Raises StaleMoveError for a run that can no longer start.
        """
        slot = _slot(run, "ADD")
        slot["ConditionExpression"] = "attribute_not_exists(running) OR size(running) < :limit OR contains(running, :run)"
        slot["ExpressionAttributeValues"] |= {":run": run.run_id, ":limit": limit}
        try:
            transact(self._table, {"ConditionCheck": self._is(run, *MOVES[RunState.TRAINING])}, {"Update": slot})
        except ConditionFailedError as failed:
            if failed.index == 0:
                raise StaleMoveError(f"{run.run_id} can no longer start in attempt {run.attempt}") from None
            return False
        return True

    def has_slot(self, run: Run) -> bool:
        """Whether a run has a slot."""
        item = self._table.get_item(Key={"id": CAPACITY}, ConsistentRead=True).get("Item", {})
        return run.run_id in item.get("running", ())

    def release(self, run: Run) -> None:
        """Free the slot of a run that has ended, unless the run began another attempt with that slot."""
        try:
            transact(self._table, {"ConditionCheck": self._is(run, run.state)}, {"Update": _slot(run, "DELETE")})
        except ConditionFailedError:
            return

    @staticmethod
    def _is(run: Run, *states: RunState) -> dict[str, Any]:
        """Return the condition that a run is still in its attempt and in one of `states`."""
        values = {f":state{n}": state for n, state in enumerate(sorted(states))}
        return {
            "Key": {"id": RUN + run.run_id},
            "ConditionExpression": f"attempt = :attempt AND #state IN ({', '.join(values)})",
            "ExpressionAttributeNames": {"#state": "state"},
            "ExpressionAttributeValues": {":attempt": run.attempt, **values},
        }


def _slot(run: Run, action: str) -> dict[str, Any]:
    """Return the update that `ADD`s a run's slot or `DELETE`s it."""
    return {
        "Key": {"id": CAPACITY},
        "UpdateExpression": f"{action} running :runs",
        "ExpressionAttributeValues": {":runs": {run.run_id}},
    }


def _item_of(run: Run) -> dict[str, Any]:
    """Return the table item of a new attempt."""
    item = msgspec.to_builtins(run) | {"id": RUN + run.run_id, "open": run.state.value}
    return {key: value for key, value in item.items() if value is not None}


def run_of_item(item: dict[str, Any]) -> Run:
    """Return the run of a table item."""
    numbers = {"attempt", "rows", "choices", "tries"}
    return msgspec.convert({key: int(value) if key in numbers else value for key, value in item.items()}, Run)
