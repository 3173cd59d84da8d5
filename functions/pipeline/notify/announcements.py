"""How the end of a run reaches people and programs: an SNS message beside the event on the bus."""

from typing import Any

from pipeline.aws import Aws, Settings
from pipeline.notify import events
from pipeline.notify.events import RunEvent, Upload
from pipeline.notify.messages import message
from pipeline.runs.table import UPLOAD, Run, RunState
from tunedrop import event_bus


class AnnounceSettings(Settings):
    """The environment of a function that sends notifications."""

    topic_arn: str


def notify(aws: Aws, topic_arn: str, event: RunEvent, link: str | None = None) -> None:
    """Publish an event to the topic, in the form that each kind of subscriber reads (`pipeline.notify.messages`)."""
    aws.sns.publish(TopicArn=topic_arn, **message(event, link))


def announce_waiting(run: Run, settings: AnnounceSettings, aws: Aws) -> None:
    """Say that a run waits. The event also makes start_training look for room: some may have come meanwhile."""
    events.put_event(aws.events, settings.event_bus, RunEvent(detail_type=events.WAITING, run=run))


def announce_failure(run: Run, settings: AnnounceSettings, aws: Aws) -> None:
    """Give the place of a run that ended without a model back, say so and close it, unless that has been done.

    The event comes after the place is free: start_training gives it to the next run then. An upload that came meanwhile, and
    could not begin the next attempt before this one had ended, is validated now.
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


def request_validation(item: dict[str, Any], settings: AnnounceSettings, aws: Aws) -> None:
    """Have validate_dataset take up the upload of this upload item once more."""
    upload = Upload(key=item["id"].removeprefix(UPLOAD), version_id=item["version_id"], sequencer=item["sequencer"])
    event_bus.put(aws.events, event_bus.entry(settings.event_bus, events.VALIDATION_REQUESTED, upload.model_dump()))
