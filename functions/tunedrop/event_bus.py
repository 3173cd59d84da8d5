"""Sends the application's events to EventBridge. Training jobs import this module too, without Powertools."""

from datetime import UTC, datetime
from typing import Any

import msgspec

SOURCE = "tunedrop"
ALERT = "Training Alert"


def entry(bus: str, detail_type: str, detail: Any) -> dict[str, Any]:
    """Return the PutEvents entry of an event; `detail` is any value that msgspec can encode as JSON."""
    return {
        "EventBusName": bus,
        "Source": SOURCE,
        "DetailType": detail_type,
        "Time": datetime.now(UTC),
        "Detail": msgspec.json.encode(detail).decode(),
    }


class EventNotDeliveredError(Exception):
    """EventBridge accepted the request but rejected its event."""


def put(client: Any, event: dict[str, Any]) -> None:
    """Put an event on its bus. Raises EventNotDeliveredError if PutEvents succeeds but reports a failed entry."""
    answer = client.put_events(Entries=[event])
    if answer["FailedEntryCount"]:
        raise EventNotDeliveredError(f"{event['DetailType']}: {answer['Entries'][0].get('ErrorMessage')}")


class AlertEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An alert of a training job (docs/alerts.md). `evidence` has the figures and curves that caused the alert, by name."""

    run_id: str
    dataset: str
    attempt: int
    code: str
    step: int
    message: str
    evidence: dict[str, float | list[float]]

    @property
    def detail(self) -> dict[str, Any]:
        """The event's detail. A code has one `id` per attempt: a restarted job may send the same `id` again."""
        name = f"{self.run_id}/{self.attempt}/{ALERT}/{self.code}"
        return {"id": name, "status": "TRAINING", **msgspec.to_builtins(self)}

    def entry(self, bus: str) -> dict[str, Any]:
        """Return the PutEvents entry."""
        return entry(bus, ALERT, self.detail)
