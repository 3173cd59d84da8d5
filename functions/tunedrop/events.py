"""Events in, as Powertools Parser models of what AWS sends; events out, each knowing its own wire form."""

from datetime import UTC, datetime
from typing import Any

import msgspec
from aws_lambda_powertools.utilities.parser.models import EventBridgeModel, S3EventNotificationEventBridgeModel
from pydantic import BaseModel, ConfigDict, Field

from tunedrop.runs import Run

SOURCE = "tunedrop"
# Detail types of our events.
VALIDATED = "Dataset Validated"
REJECTED = "Dataset Rejected"
STARTED = "Training Started"
WAITING = "Training Waiting"
FAILED = "Training Failed"
TESTS_STARTED = "Inference Tests Started"
PUBLISHED = "Results Published"


class Upload(msgspec.Struct, frozen=True):
    """An object that was put into the data bucket."""

    key: str
    version_id: str
    sequencer: str

    @classmethod
    def from_event(cls, event: S3EventNotificationEventBridgeModel) -> "Upload":
        """Read an S3 "Object Created" event. Its key is plain text: EventBridge, unlike S3's own, does not encode it."""
        s3_object = event.detail.object
        return cls(s3_object.key, s3_object.version_id or "null", s3_object.sequencer or "")


class JobDetail(BaseModel):
    """The part we read of the detail of a "SageMaker Training Job State Change", which is DescribeTrainingJob's answer."""

    model_config = ConfigDict(extra="ignore")

    class _Transition(BaseModel):
        Status: str
        StatusMessage: str = ""

    class _Artifacts(BaseModel):
        S3ModelArtifacts: str

    TrainingJobName: str
    TrainingJobStatus: str
    SecondaryStatus: str = ""
    FailureReason: str = ""
    ModelArtifacts: _Artifacts | None = None
    SecondaryStatusTransitions: list[_Transition] = []
    BillableTimeInSeconds: int | None = None
    TrainingTimeInSeconds: int | None = None

    @property
    def artifacts(self) -> str | None:
        """The S3 URI of what the job left in /opt/ml/model."""
        return self.ModelArtifacts.S3ModelArtifacts if self.ModelArtifacts else None

    @property
    def started(self) -> bool:
        """Whether the job ever had an instance that ran its container."""
        return any(transition.Status == "Training" for transition in self.SecondaryStatusTransitions)

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.TrainingJobStatus in {"Completed", "Failed", "Stopped"}


class JobStateChange(EventBridgeModel):
    """A "SageMaker Training Job State Change" event."""

    detail: JobDetail


class RunReference(BaseModel):
    """The part of our own events' detail that our functions read."""

    run_id: str = Field(pattern=r"^[a-zA-Z0-9-]{1,63}$")


class DatasetValidated(EventBridgeModel):
    """Our "Dataset Validated" event."""

    detail: RunReference


class RunEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One of our events about a run. `links` are S3 URIs of what a reader would open next."""

    detail_type: str
    run: Run
    links: dict[str, str] = {}
    extra: dict[str, Any] = {}

    @property
    def detail(self) -> dict[str, Any]:
        """The event's detail. Deliveries of one happening carry one `id`, so that a reader can tell a duplicate."""
        return {
            "id": f"{self.run.run_id}/{self.run.attempt}/{self.detail_type}",
            "run_id": self.run.run_id,
            "dataset": self.run.dataset,
            "status": self.run.state.value,
            "attempt": self.run.attempt,
            **({"reason": self.run.reason} if self.run.reason else {}),
            **self.links,
            **self.extra,
        }

    def entry(self, bus: str) -> dict[str, Any]:
        """Return the entry for PutEvents."""
        return {
            "EventBusName": bus,
            "Source": SOURCE,
            "DetailType": self.detail_type,
            "Time": datetime.now(UTC),
            "Detail": msgspec.json.encode(self.detail).decode(),
        }


class EventNotDeliveredError(Exception):
    """EventBridge took the request and refused the event in it."""


def put_event(client: Any, bus: str, event: RunEvent) -> None:
    """Put an event on the bus. Raises EventNotDeliveredError when PutEvents answers 200 with a failed entry."""
    answer = client.put_events(Entries=[event.entry(bus)])
    if answer["FailedEntryCount"]:
        raise EventNotDeliveredError(f"{event.detail_type}: {answer['Entries'][0].get('ErrorMessage')}")
