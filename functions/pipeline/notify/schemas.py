"""The form of each of our events: what its `detail` has, as types, and `docs/events.md`, which has them as JSON Schemas.

python -m pipeline.notify.schemas > docs/events.md
"""

import json
import sys
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pipeline.notify import events
from pipeline.publish.comparison import Comparison
from pipeline.runs.states import RunState
from tunedrop.event_bus import ALERT, SOURCE

Id = Annotated[str, Meta(description="Equal in repetitions of one event: use it to drop duplicates.")]
Uri = Annotated[str, Meta(pattern="^s3://")]
RunId = Annotated[str, Meta(pattern="^[a-zA-Z0-9-]{1,63}$")]


class RunDetail(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What each event about a run has. `status` is the run's state, `reason` why it is in it."""

    id: Id
    run_id: RunId
    dataset: str
    line: str | None
    status: RunState
    attempt: int
    reason: str | UnsetType = UNSET


class DatasetValidated(RunDetail):
    """A dataset is valid, and its run may start."""

    receipt: Uri


class DatasetRejected(RunDetail):
    """A dataset is not valid: the receipt names each problem with its line."""

    receipt: Uri


class TrainingStarted(RunDetail):
    """A training job exists."""

    training_job: str
    instance_type: str | None


class TrainingWaiting(RunDetail):
    """A run waits for a slot, a quota or an instance; `reason` says for which."""


class TrainingFailed(RunDetail):
    """A run ended without a model: its training or its tests failed, or it was stopped. `status` tells which."""

    receipt: Uri


class InferenceTestsStarted(RunDetail):
    """A test job exists."""

    test_job: str


class ResultsPublished(RunDetail):
    """A run has its verdict, its report and its model package. docs/evaluation.md explains the figures.

    `by_tag` and `by_reward` have at most 50 comparisons, `reasons` at most 20 sentences; `result` has all of them.
    """

    report: Uri
    result: Uri
    model: Uri
    model_package: str
    verdict: Annotated[str, Meta(pattern="^(APPROVED|PENDING|REJECTED)$")]
    reasons: list[str]
    comparison: Comparison
    ended: Comparison | None
    by_tag: dict[str, Comparison]
    by_reward: dict[str, Comparison]
    passed: dict[str, int]
    cut: dict[str, int]
    cost: dict[str, Any]
    start: dict[str, str] | None
    champion: dict[str, Any] | None
    tries: int
    confidence: float


class TrainingAlert(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A training job noticed a problem (docs/alerts.md). `evidence` has the figures that caused the alert."""

    id: Id
    run_id: RunId
    dataset: str
    status: str
    attempt: int
    code: str
    step: int
    message: str
    evidence: dict[str, Any]


class ChampionChanged(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line has another champion. Without `run_id`, it has no champion any more, and the base model is in use."""

    id: Id
    line: str
    version: int
    run_id: RunId | UnsetType = UNSET
    model_package: str | UnsetType | None = UNSET
    report: Uri | UnsetType = UNSET
    result: Uri | UnsetType = UNSET


class DeploymentDetail(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What each event about a line's deployment has. `run_id` was to be deployed, `serving` answers now, if a model does."""

    id: Id
    line: str
    run_id: RunId
    dataset: str
    status: str
    report: Uri
    result: Uri
    serving: RunId | UnsetType = UNSET
    endpoint: str | UnsetType = UNSET
    component: str | UnsetType = UNSET
    model_package: str | UnsetType = UNSET
    answered: Any = UNSET
    reason: str | UnsetType = UNSET


class ModelDeployed(DeploymentDetail):
    """Another model answers under a line's name."""


class DeploymentFailed(DeploymentDetail):
    """A model could not be deployed; the former one answers."""


class ModelRolledBack(DeploymentDetail):
    """A model that answered was taken back; the former one answers."""


class StopRequested(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request of yours: cancel a run and stop its job."""

    run_id: RunId


class UndeployRequested(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request of yours: take a line's model down."""

    line: str


# By `detail-type`.
SENT: dict[str, Any] = {
    events.VALIDATED: DatasetValidated,
    events.REJECTED: DatasetRejected,
    events.WAITING: TrainingWaiting,
    events.STARTED: TrainingStarted,
    ALERT: TrainingAlert,
    events.FAILED: TrainingFailed,
    events.TESTS_STARTED: InferenceTestsStarted,
    events.PUBLISHED: ResultsPublished,
    events.CHAMPION_CHANGED: ChampionChanged,
    events.DEPLOYED: ModelDeployed,
    events.DEPLOYMENT_FAILED: DeploymentFailed,
    events.ROLLED_BACK: ModelRolledBack,
}
TAKEN: dict[str, Any] = {events.STOP_REQUESTED: StopRequested, events.UNDEPLOY_REQUESTED: UndeployRequested}
INTRODUCTION = f"""# Events

Tunedrop sends its events to the stack's own EventBridge bus (the output `EventBusName`), with the source `{SOURCE}`. An
event may be delivered more than once, and events may arrive in another order than they were sent.

This page has the JSON Schema (2020-12) of each event's `detail`, by `detail-type`. Later versions may add fields. The page
is written by `.venv/bin/python -m pipeline.notify.schemas > docs/events.md`. `tests/integration/test_event_schemas.py`
holds it, and the events of a run's life, against the types in `functions/pipeline/notify/schemas.py`.
[events/rules/](../events/rules/) has rules to copy.
"""


def document() -> str:
    """Return `docs/events.md`."""
    parts = [INTRODUCTION, "## Events that Tunedrop sends\n", *map(_section, SENT, SENT.values())]
    return "\n".join([*parts, "## Events that Tunedrop takes\n", *map(_section, TAKEN, TAKEN.values())]).rstrip() + "\n"


def _section(name: str, detail: Any) -> str:
    return f"### {name}\n\n{described(detail)}"


def described(type_: Any) -> str:
    """Return a type's docstring and JSON Schema in Markdown. The types refuse unknown fields, a reader should not."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | msgspec.json.schema(type_)
    for definition in schema["$defs"].values():
        if "properties" in definition:
            definition.pop("additionalProperties", None)
    text = " ".join(type_.__doc__.split())
    return f"{text}\n\n```json\n{json.dumps(schema, indent=1)}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(document())
