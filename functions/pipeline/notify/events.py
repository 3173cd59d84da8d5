"""Events in, as models of what AWS and the bus deliver; events out, each with its own wire form."""

from typing import Annotated, Any, Literal

import msgspec
from aws_lambda_powertools.utilities.parser.models import EventBridgeModel, S3EventNotificationEventBridgeModel
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.runs.states import Run, RunState
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
CHAMPION_CHANGED = "Champion Changed"
DEPLOYED = "Model Deployed"
DEPLOYMENT_FAILED = "Deployment Failed"
ROLLED_BACK = "Model Rolled Back"
# Detail types of requests, from people and from `reconcile`.
STOP_REQUESTED = "Stop Requested"
VALIDATION_REQUESTED = "Validation Requested"
UNDEPLOY_REQUESTED = "Undeploy Requested"


class Upload(BaseModel):
    """A version of an object in the data bucket.

    The order of a key's uploads is the text order of their S3 sequencers, the shorter one padded on the right with zeros
    (https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html). All sequencers are padded
    here. One that is not hexadecimal is no sequencer of S3: ValidationError.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    version_id: str
    sequencer: str = Field(pattern=rf"^[0-9A-F]{{{SEQUENCER_LENGTH}}}$")

    @classmethod
    def from_event(cls, event: S3EventNotificationEventBridgeModel) -> "Upload":
        """Read an S3 "Object Created" event. EventBridge does not URL-encode the key, unlike S3's own notifications.

        Only S3 sends this event: PutEvents refuses the sources of AWS's services.
        """
        s3_object = event.detail.object
        return cls(
            key=s3_object.key,
            version_id=s3_object.version_id or "null",
            sequencer=s3_object.sequencer.upper().ljust(SEQUENCER_LENGTH, "0") if s3_object.sequencer else "",
        )


class JobReference(BaseModel):
    """The field that the functions read of a "SageMaker Training Job State Change": the job's name."""

    TrainingJobName: str


class JobStateChange(BaseModel):
    """A "SageMaker Training Job State Change" event: it names a job, and DescribeTrainingJob has the job's state.

    The other fields of the detail may be absent, null or empty: AWS's own sample has no status transitions
    (https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html).
    """

    detail: JobReference


class PackageReference(BaseModel):
    """The field that publish_results reads of a "SageMaker Model Package State Change": the package's ARN."""

    ModelPackageArn: str


class PackageStateChange(EventBridgeModel):
    """A "SageMaker Model Package State Change" event: it names a package, and the registry has the package's state."""

    detail_type: Literal["SageMaker Model Package State Change"] = Field(alias="detail-type")
    detail: PackageReference


class TestJobEnded(JobStateChange):
    """The end of a test job."""

    detail_type: Literal["SageMaker Training Job State Change"] = Field(alias="detail-type")


# What publish_results takes, by `detail-type`.
PUBLISH_RESULTS_EVENT: TypeAdapter[TestJobEnded | PackageStateChange] = TypeAdapter(
    Annotated[TestJobEnded | PackageStateChange, Field(discriminator="detail_type")],
    config=ConfigDict(defer_build=True),  # only publish_results uses it
)


class RunReference(BaseModel):
    """The field that the functions read of our own events: the run's id."""

    run_id: str = Field(pattern=r"^[a-zA-Z0-9-]{1,63}$")


class DatasetValidated(EventBridgeModel):
    """Our "Dataset Validated" event."""

    detail_type: Literal["Dataset Validated"] = Field(alias="detail-type")
    detail: RunReference


class StopRequested(EventBridgeModel):
    """A request to stop a run. A request from before the run's arrival means an earlier attempt."""

    detail_type: Literal["Stop Requested"] = Field(alias="detail-type")
    detail: RunReference


class SlotMayBeFree(BaseModel):
    """An event after which a waiting run may find a slot or an instance: a job or a run ended, or a run began to wait."""

    detail_type: Literal[
        "Training Waiting", "Training Failed", "Results Published", "SageMaker Training Job State Change"
    ] = Field(alias="detail-type")


# What start_training takes, by `detail-type`.
START_TRAINING_EVENT: TypeAdapter[DatasetValidated | StopRequested | SlotMayBeFree] = TypeAdapter(
    Annotated[DatasetValidated | StopRequested | SlotMayBeFree, Field(discriminator="detail_type")],
    config=ConfigDict(defer_build=True),  # only start_training uses it
)


class LineReference(BaseModel):
    """The field that deploy_model reads of our events about a line: the line's name."""

    line: str = Field(min_length=1)


class ChampionChanged(EventBridgeModel):
    """Our "Champion Changed" event. It names a line, and the line's item has the champion."""

    detail_type: Literal["Champion Changed"] = Field(alias="detail-type")
    detail: LineReference


class UndeployRequested(EventBridgeModel):
    """A request to take a line's model down. A request from before a deployment means an earlier one."""

    detail_type: Literal["Undeploy Requested"] = Field(alias="detail-type")
    detail: LineReference


class EndpointReference(BaseModel):
    """The field that deploy_model reads of a "SageMaker Endpoint State Change": the endpoint's name."""

    EndpointName: str


class EndpointStateChange(BaseModel):
    """A "SageMaker Endpoint State Change" event: it names an endpoint, and DescribeEndpoint has the endpoint's state.

    AWS's own sample has no time of EventBridge's form
    (https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html#eventbridge-endpoint).
    """

    detail_type: Literal["SageMaker Endpoint State Change"] = Field(alias="detail-type")
    detail: EndpointReference


class Scheduled(BaseModel):
    """The event of a schedule."""

    detail_type: Literal["Scheduled Event"] = Field(alias="detail-type")


# What deploy_model takes, by `detail-type`.
DEPLOY_MODEL_EVENT: TypeAdapter[ChampionChanged | UndeployRequested | EndpointStateChange | Scheduled] = TypeAdapter(
    Annotated[ChampionChanged | UndeployRequested | EndpointStateChange | Scheduled, Field(discriminator="detail_type")],
    config=ConfigDict(defer_build=True),  # only deploy_model uses it
)


class ObjectReference(BaseModel):
    """The field that validate_dataset reads of a request: the object's key."""

    key: str


class ValidationRequested(EventBridgeModel):
    """A request by `reconcile` to validate an upload again.

    It names a key only. The run table has the upload's version and sequencer, from S3's own event: no request can pass an
    older version, or an upload that S3 never confirmed, for the newest one.
    """

    detail: ObjectReference


class RunEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One of our events about a run. `links` are S3 URIs of a reader's next documents."""

    detail_type: str
    run: Run
    links: dict[str, str] = {}
    extra: dict[str, Any] = {}

    @property
    def detail(self) -> dict[str, Any]:
        """The event's detail. Repeated events of one occurrence carry one `id`: readers use it to drop duplicates."""
        return {
            "id": f"{self.run.run_id}/{self.run.attempt}/{self.detail_type}/{self.run.state}",
            "run_id": self.run.run_id,
            "dataset": self.run.dataset,
            "line": self.run.line,
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
    """Return the event that starts a validated run. A later state of the run does not change the event."""
    run = msgspec.structs.replace(run, state=RunState.VALIDATED, reason=None)
    return RunEvent(detail_type=VALIDATED, run=run, links=receipt_link(run, artifact_bucket))


def receipt_link(run: Run, artifact_bucket: str) -> dict[str, str]:
    """Return the link to a run's receipt."""
    return {"receipt": f"s3://{artifact_bucket}/{run_key(run.run_id, 'validation.json')}"}


def put_event(client: Any, bus: str, event: RunEvent) -> None:
    """Put an event about a run on the bus. Raises EventNotDeliveredError."""
    put(client, event.entry(bus))
