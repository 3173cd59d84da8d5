"""Events in, as Powertools Parser models of what AWS sends; events out, each knowing its own wire form."""

from typing import Any

import msgspec
from aws_lambda_powertools.utilities.parser.models import EventBridgeModel, S3EventNotificationEventBridgeModel
from pydantic import BaseModel, ConfigDict, Field

from pipeline.runs.table import Run, RunState
from tunedrop.event_bus import entry, put
from tunedrop.object_keys import run_key

SEQUENCER_LENGTH = 64
# Detail types of our events.
VALIDATED = "Dataset Validated"
REJECTED = "Dataset Rejected"
STARTED = "Training Started"
WAITING = "Training Waiting"
FAILED = "Training Failed"
TESTS_STARTED = "Inference Tests Started"
PUBLISHED = "Results Published"
# Detail types of what people and `reconcile` ask for.
STOP_REQUESTED = "Stop Requested"
VALIDATION_REQUESTED = "Validation Requested"


class Upload(BaseModel):
    """An object that was put into the data bucket.

    S3 sequencers of one key are compared as text after padding the shorter one on the right with zeros
    (https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html): here all are padded.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    version_id: str
    sequencer: str

    @classmethod
    def from_event(cls, event: S3EventNotificationEventBridgeModel) -> "Upload":
        """Read an S3 "Object Created" event. Its key is plain text: EventBridge, unlike S3's own, does not encode it."""
        s3_object = event.detail.object
        return cls(
            key=s3_object.key,
            version_id=s3_object.version_id or "null",
            sequencer=(s3_object.sequencer or "").ljust(SEQUENCER_LENGTH, "0"),
        )


class JobReference(BaseModel):
    """The part that our functions read of the detail of a "SageMaker Training Job RunState Change": which job."""

    TrainingJobName: str


class JobStateChange(BaseModel):
    """A "SageMaker Training Job RunState Change" event: it names a job, and DescribeTrainingJob says how the job is.

    The other fields of the detail may be absent, null or empty; AWS's own sample has no status transitions
    (https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html).
    """

    detail: JobReference


class RunReference(BaseModel):
    """The part of our own events' detail that our functions read."""

    run_id: str = Field(pattern=r"^[a-zA-Z0-9-]{1,63}$")


class DatasetValidated(EventBridgeModel):
    """Our "Dataset Validated" event."""

    detail: RunReference


class StopRequested(EventBridgeModel):
    """Somebody wants a run stopped; an event from before the run arrived means an earlier attempt."""

    detail: RunReference


class ValidationRequested(EventBridgeModel):
    """`reconcile` wants an upload validated that nobody finished."""

    detail: Upload


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
            "id": f"{self.run.run_id}/{self.run.attempt}/{self.detail_type}/{self.run.state}",
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
        return entry(bus, self.detail_type, self.detail)


def validated(run: Run, artifact_bucket: str) -> RunEvent:
    """Return the event that has a validated run started; a run that is further on is as it was then."""
    run = msgspec.structs.replace(run, state=RunState.VALIDATED, reason=None)
    return RunEvent(detail_type=VALIDATED, run=run, links=receipt_link(run, artifact_bucket))


def receipt_link(run: Run, artifact_bucket: str) -> dict[str, str]:
    """Return the link to a run's receipt."""
    return {"receipt": f"s3://{artifact_bucket}/{run_key(run.run_id, 'validation.json')}"}


def put_event(client: Any, bus: str, event: RunEvent) -> None:
    """Put an event about a run on the bus. Raises EventNotDeliveredError."""
    put(client, event.entry(bus))
