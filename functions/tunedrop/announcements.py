"""How the end of a run reaches people and programs: an SNS message beside the event on the bus."""

import msgspec

from tunedrop import events, layout
from tunedrop.aws import Aws, Settings
from tunedrop.events import RunEvent
from tunedrop.runs import Run


class AnnounceSettings(Settings):
    """The environment of a function that sends notifications."""

    topic_arn: str


def notify(aws: Aws, topic_arn: str, event: RunEvent) -> None:
    """Publish an event as a message that a person can read, with the event's detail as its JSON body below the text.

    A subject is ASCII without line breaks and under 100 characters (SNS's limit), so non-ASCII names lose some letters.
    """
    detail = event.detail
    outcome = f"{event.detail_type}: {event.extra['verdict']}" if "verdict" in event.extra else event.detail_type
    dataset = event.run.dataset.encode("ascii", "replace").decode()
    lines = [f"{outcome}: {event.run.dataset} (run {event.run.run_id}, attempt {event.run.attempt})"]
    lines += [event.run.reason] if event.run.reason else []
    lines += [f"{name}: {uri}" for name, uri in event.links.items()]
    aws.sns.publish(
        TopicArn=topic_arn,
        Subject=f"{outcome}: {dataset}"[:99].translate(dict.fromkeys(range(32), " ")),
        Message="\n".join(lines) + "\n\n" + msgspec.json.encode(detail).decode(),
        MessageAttributes={
            name: {"DataType": "String", "StringValue": str(detail[name])}
            for name in ("id", "run_id", "status", "verdict")
            if name in detail
        },
    )


def announce_failure(run: Run, settings: AnnounceSettings, aws: Aws) -> None:
    """Say that a run ended without a model, give its place back and close it."""
    aws.runs.release(run)
    links = {"receipt": f"s3://{settings.artifact_bucket}/{layout.run_key(run.run_id, 'validation.json')}"}
    event = RunEvent(detail_type=events.FAILED, run=run, links=links)
    events.put_event(aws.events, settings.event_bus, event)
    notify(aws, settings.topic_arn, event)
    aws.runs.close(run)
