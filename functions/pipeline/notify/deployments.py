"""Announcements of deployments: an event on the bus, and an SNS message if the run's config asks for messages."""

from typing import Any

import msgspec

from pipeline.aws import Aws
from pipeline.notify import events
from pipeline.notify.messages import MOST_CHARACTERS, Message
from pipeline.runs.deployments import Deployment
from pipeline.runs.states import Run
from pipeline.settings import Settings
from tunedrop import event_bus
from tunedrop.object_keys import run_key
from tunedrop.plain import one_line

# The status in each event, and what a message's headline begins with.
STATUSES = {
    events.DEPLOYED: ("DEPLOYED", "Model deployed"),
    events.DEPLOYMENT_FAILED: ("DEPLOYMENT_FAILED", "Deployment failed"),
    events.ROLLED_BACK: ("ROLLED_BACK", "Model rolled back"),
}


def announce_deployment(deployment: Deployment, detail_type: str, settings: Settings, aws: Aws) -> None:
    """Announce what happened to a line's deployment, one of `STATUSES`. Raises EventNotDeliveredError.

    The event is about the run that was to be deployed: the deployment's `target`, else the `run` that answers now. A
    repetition has the same `id`.
    """
    run_id = deployment.target or deployment.run
    run = aws.runs.get(run_id) if run_id else None
    if run is None:
        raise LookupError(f"the run table does not have {run_id}, the run of the deployment of {deployment.line}")
    detail = deployment_detail(deployment, detail_type, run, settings.artifact_bucket)
    event_bus.put(aws.events, event_bus.entry(settings.event_bus, detail_type, detail))
    result = aws.read(settings.artifact_bucket, run_key(run.run_id, "result.json"))
    if result is None or msgspec.json.decode(result)["config"]["notify"]["sns"]:  # without the files, somebody must know
        aws.sns.publish(TopicArn=settings.topic_arn, **_message(deployment, detail_type, run, detail).publication())


def deployment_detail(deployment: Deployment, detail_type: str, run: Run, artifact_bucket: str) -> dict[str, Any]:
    """Return the detail of an event about a deployment. `serving` is the run that answers now, if one does."""
    folder = f"s3://{artifact_bucket}/{run_key(run.run_id)}"
    detail = {
        "id": f"{deployment.line}/{deployment.number}/{detail_type}",
        "line": deployment.line,
        "run_id": run.run_id,
        "dataset": run.dataset,
        "status": STATUSES[detail_type][0],
        "serving": deployment.run,
        "endpoint": deployment.endpoint,
        "component": deployment.component,
        "model_package": run.model_package,
        "answered": deployment.answered,
        "reason": deployment.reason,
        "report": folder + "report.html",
        "result": folder + "result.json",
    }
    return {name: value for name, value in detail.items() if value is not None}


def _message(deployment: Deployment, detail_type: str, run: Run, detail: dict[str, Any]) -> Message:
    status, headline = STATUSES[detail_type]
    figures = {
        "answers under": deployment.component,
        "endpoint": deployment.endpoint,
        "answers now": deployment.run or "no model",
        "tests answered as recorded": deployment.answered,
    }
    return Message(
        event_type=detail_type,
        headline=f"{headline}: {one_line(deployment.line)}",
        subject=f"run {run.run_id}",
        reasons=[one_line(deployment.reason)[:MOST_CHARACTERS]] if deployment.reason else [],
        figures={name: value for name, value in figures.items() if value is not None},
        links={name: detail[name] for name in ("report", "result")},
        attributes={
            "id": detail["id"],
            "run_id": run.run_id,
            "dataset": one_line(run.dataset),
            "status": status,
            "verdict": status,
            "line": one_line(deployment.line),
        },
        detail={**detail, "verdict": status},
    )
