"""Our events on their way out: the entry for PutEvents, and putting it. Without Powertools: training jobs send some, too."""

from datetime import UTC, datetime
from typing import Any

import msgspec

SOURCE = "tunedrop"
ALERT = "Training Alert"


def entry(bus: str, detail_type: str, detail: Any) -> dict[str, Any]:
    """Return the entry for PutEvents of any event of ours."""
    return {
        "EventBusName": bus,
        "Source": SOURCE,
        "DetailType": detail_type,
        "Time": datetime.now(UTC),
        "Detail": msgspec.json.encode(detail).decode(),
    }


class EventNotDeliveredError(Exception):
    """EventBridge took the request and refused the event in it."""


def put(client: Any, event: dict[str, Any]) -> None:
    """Put an event on its bus. Raises EventNotDeliveredError when PutEvents answers 200 with a failed entry."""
    answer = client.put_events(Entries=[event])
    if answer["FailedEntryCount"]:
        raise EventNotDeliveredError(f"{event['DetailType']}: {answer['Entries'][0].get('ErrorMessage')}")


class AlertEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A training job names what goes wrong in it (see docs/alerts.md)."""

    run_id: str
    dataset: str
    attempt: int
    code: str
    step: int
    message: str
    evidence: dict[str, float]

    @property
    def detail(self) -> dict[str, Any]:
        """The event's detail; an attempt names each code once, in a restarted job again."""
        name = f"{self.run_id}/{self.attempt}/{ALERT}/{self.code}"
        return {"id": name, "status": "TRAINING", **msgspec.to_builtins(self)}

    def entry(self, bus: str) -> dict[str, Any]:
        """Return the entry for PutEvents."""
        return entry(bus, ALERT, self.detail)
