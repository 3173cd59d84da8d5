"""Hooks into MiniStack for what its S3 acknowledges: objects on the disk, and events that are sent. See `hooks`."""

import contextvars
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from local_app.aws import durable
from local_app.common import Json

logger = logging.getLogger("pipeline.aws")

_Memory = tuple[Json | None, list[Json] | None]

# S3's events of the request in progress; None outside of a request.
_events: contextvars.ContextVar[list[Callable[[], None]] | None] = contextvars.ContextVar("events", default=None)


def hook_s3_events() -> None:
    """Send S3's events after the object is written and before the request is answered, with the object's version.

    MiniStack sends the events later, from a thread that dies with the process, and names the version only in bucket
    notifications.
    """
    from ministack.services import eventbridge, s3

    version: contextvars.ContextVar[str | None] = contextvars.ContextVar("version", default=None)
    dispatch = eventbridge._dispatch_event

    def fire(bucket: str, key: str, event_name: str, *args: Any, version_id: str | None = None, **kwargs: Any) -> None:
        sequencer = s3._next_event_sequencer(event_name)

        def send() -> None:
            version.set(version_id)
            s3._fire_s3_event(bucket, key, event_name, *args, version_id=version_id, sequencer=sequencer, **kwargs)

        events = _events.get()
        if events is None:
            send()
        else:
            events.append(send)

    def dispatch_with_version(event: Json, view: Any = None) -> None:
        if event["Source"] == "aws.s3" and (version_id := version.get()):
            detail = json.loads(event["Detail"])
            detail["object"]["version-id"] = version_id
            event = {**event, "Detail": json.dumps(detail)}
        dispatch(event, view)

    s3._fire_s3_event_async = fire
    eventbridge._dispatch_event = dispatch_with_version


def hook_writes() -> None:
    """Acknowledge only what is on the disk: write S3's files durably, and answer with an error when the disk refuses one.

    MiniStack leaves its files to the kernel; when it cannot write one, it logs that and answers as if nothing had happened.
    EventBridge and Lambda acknowledge invocations, whose files `local_app.aws.invocations` writes.
    """
    from ministack.services import eventbridge, lambda_svc, s3

    class Refusals(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("Failed to "):
                durable.refuse(record.getMessage())

    def atomic_write(path: str, data: Any, *, text: bool = False) -> None:
        durable.write(Path(path), data.encode() if text else data)

    s3._atomic_write = atomic_write
    s3.logger.addHandler(Refusals())
    for service in (s3, eventbridge, lambda_svc):
        _hook_answer(service, s3)


def _hook_answer(service: Any, s3: Any) -> None:
    """Answer 500 to a request of which the disk refused a file, and undo what S3 keeps of it in memory."""
    handle = service.handle_request

    async def handle_request(method: str, path: str, headers: Any, *args: Any, **kwargs: Any) -> Any:
        bucket, key = s3._parse_bucket_key(path, headers) if service is s3 else ("", "")
        before = _memory_of(s3, bucket, key)
        with durable.request() as refused:
            events: list[Callable[[], None]] = []
            token = _events.set(events)
            try:
                answer = await handle(method, path, headers, *args, **kwargs)
            finally:
                _events.reset(token)
            if refused:
                _undo(s3, bucket, key, before)
            for send in [] if refused else events:
                send()
        if not refused:
            return answer
        message = f"The local application cannot write to its disk: {refused[0]}. Free some space and try again."
        logger.error("%s %s: %s", method, path, message)
        if service is s3:
            return s3._error("InternalError", message, 500)
        return (
            500,
            {"Content-Type": "application/json"},
            json.dumps({"__type": "InternalFailure", "message": message}).encode(),
        )

    service.handle_request = handle_request


def _memory_of(s3: Any, bucket: str, key: str) -> _Memory:
    """Return copies of what S3 keeps in memory of a key: its object's record, and the records of its versions."""
    record = (s3._buckets.get(bucket) or {"objects": {}})["objects"].get(key)
    versions = s3._object_versions.get((bucket, key))
    return record and dict(record), versions and [dict(version) for version in versions]


def _undo(s3: Any, bucket: str, key: str, before: _Memory) -> None:
    """Restore a key after a refused write, in memory and on the disk, which needs no space for this.

    A replaced version was written to a file of its own before the object's file was replaced.
    """
    if not key or bucket not in s3._buckets:
        return
    record, versions = before
    file = Path(s3._object_disk_path(bucket, key))
    objects = s3._buckets[bucket]["objects"]
    if record is None:
        objects.pop(key, None)
        file.unlink(missing_ok=True)
    else:
        objects[key] = record
        kept = Path(s3._version_disk_path(bucket, key, record.get("version_id") or "null"))
        if kept.exists():
            kept.replace(file)
    if versions is None:
        s3._object_versions.pop((bucket, key), None)
    else:
        s3._object_versions[bucket, key] = versions
