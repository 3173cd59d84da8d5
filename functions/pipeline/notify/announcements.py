"""Announcements of a run's end and of its waiting: an event on the bus, and an SNS message for a run's end."""

from typing import Any

from pipeline.aws import Aws
from pipeline.notify import events
from pipeline.notify.events import RunEvent
from pipeline.notify.messages import message
from pipeline.runs.states import Run, RunState
from pipeline.runs.table import UPLOAD
from pipeline.settings import Settings
from tunedrop import event_bus


def notify(aws: Aws, topic_arn: str, event: RunEvent, link: str | None = None, pages: dict[str, str] | None = None) -> None:
    """Publish an event to the topic, in a form for each kind of subscriber (`pipeline.notify.messages`)."""
    aws.sns.publish(TopicArn=topic_arn, **message(event, link, pages))


def announce_waiting(run: Run, settings: Settings, aws: Aws) -> None:
    """Announce that a run waits. The event also makes start_training try the waiting runs: a slot may have become free."""
    events.put_event(aws.events, settings.event_bus, RunEvent(detail_type=events.WAITING, run=run))


def announce_failure(run: Run, settings: Settings, aws: Aws) -> None:
    """Free the slot, announce the failure, close the run. Idempotent.

    The event follows the freed slot: start_training gives the slot to the next run. A newer upload of the same key could not
    begin its attempt before this end: its validation is requested now.
    """
    if run.open is not None:
        aws.runs.release(run)
        links = events.receipt_link(run, settings.artifact_bucket)
        event = RunEvent(detail_type=events.FAILED, run=run, links=links)
        events.put_event(aws.events, settings.event_bus, event)
        notify(aws, settings.topic_arn, event)
        aws.runs.close(run)
    upload = aws.runs.upload(run.key)
    if upload is not None and upload["state"] == RunState.VALIDATING and f"{run.key}@{upload['sequencer']}" != run.trigger:
        request_validation(upload, settings, aws)


def request_validation(item: dict[str, Any], settings: Settings, aws: Aws) -> None:
    """Ask validate_dataset, by an event, to validate the upload of an upload item again."""
    detail = {"key": item["id"].removeprefix(UPLOAD)}
    event_bus.put(aws.events, event_bus.entry(settings.event_bus, events.VALIDATION_REQUESTED, detail))
