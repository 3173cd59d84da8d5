"""Tells the stack's event bus what goes wrong in a training job, where its network and its role let it."""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from trainer import folders
from tunedrop.event_bus import AlertEvent, EventNotDeliveredError, put

log = logging.getLogger("trainer")

Alert = dict[str, Any]


def announcer() -> Callable[[Alert], None]:
    """Return what announces an alert; nothing is announced without a bus, or by a job that the pipeline did not start."""
    bus, folder = os.environ.get("EVENT_BUS"), folders.channel("training")
    run = folder / "run.json" if folder else None
    if not bus or run is None or not run.is_file():
        return lambda _: None
    about = json.loads(run.read_bytes())
    attempt = int(os.environ["TRAINING_JOB_NAME"].rpartition("-")[2])

    def announce(alert: Alert) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        told = {name: alert[name] for name in ("code", "step", "message", "evidence")}
        event = AlertEvent(run_id=about["run_id"], dataset=about["dataset"], attempt=attempt, **told)
        # An isolated job has neither network nor credentials. The training goes on without being heard.
        soon = Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 2})
        try:
            put(boto3.client("events", region_name=os.environ.get("AWS_REGION"), config=soon), event.entry(bus))
        except (BotoCoreError, ClientError, EventNotDeliveredError) as error:
            log.info("the alert was not announced: %s", error)

    return announce
