"""Events in, as Powertools Parser models of what AWS sends; events out, each knowing its own wire form."""

from typing import Any

import msgspec
from aws_lambda_powertools.utilities.parser.models import EventBridgeModel, S3EventNotificationEventBridgeModel
from pydantic import BaseModel, ConfigDict, Field

from tunedrop.bus import entry, put
from tunedrop.runs import Run

SEQUENCER_LENGTH = 64
# How SageMaker says that there is no machine to be had: at once as an error's code, or late as a failed job's reason
# (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html#API_CreateTrainingJob_Errors).
NO_CAPACITY = ("ResourceLimitExceeded", "CapacityError", "InsufficientCapacityError")
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


class JobDetail(BaseModel):
    """The part we read of the detail of a "SageMaker Training Job State Change", which is DescribeTrainingJob's answer."""

    model_config = ConfigDict(extra="ignore")

    class _Transition(BaseModel):
        Status: str
        StatusMessage: str = ""

    class _Artifacts(BaseModel):
        S3ModelArtifacts: str

    class _Resources(BaseModel):
        InstanceType: str | None = None
        SelectedInstanceType: str | None = None

    TrainingJobName: str
    TrainingJobStatus: str
    SecondaryStatus: str = ""
    FailureReason: str = ""
    ModelArtifacts: _Artifacts | None = None
    ResourceConfig: _Resources = _Resources()
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

    @property
    def at_limit(self) -> bool:
        """Whether SageMaker stopped the job at its time limit."""
        return self.SecondaryStatus in {"MaxRuntimeExceeded", "MaxWaitTimeExceeded"}

    @property
    def no_capacity(self) -> str | None:
        """Why the job found no machine; None if it found one."""
        if self.TrainingJobStatus == "Failed" and self.FailureReason.startswith(NO_CAPACITY):
            return self.FailureReason[:1024]
        if self.TrainingJobStatus == "Stopped" and self.at_limit and not self.started:
            return "no instance came within the waiting time"
        return None

    @property
    def instance_type(self) -> str | None:
        """The instance type that the job ran on; of several on demand, the one that SageMaker selected."""
        return self.ResourceConfig.SelectedInstanceType or self.ResourceConfig.InstanceType


class JobStateChange(EventBridgeModel):
    """A "SageMaker Training Job State Change" event."""

    detail: JobDetail


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


def put_event(client: Any, bus: str, event: RunEvent) -> None:
    """Put an event about a run on the bus. Raises EventNotDeliveredError."""
    put(client, event.entry(bus))
