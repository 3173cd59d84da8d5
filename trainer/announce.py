"""Announces the alerts of a training job on the stack's event bus, if the job's network and role allow it."""

import functools
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
    """Return the function that announces an alert. It does nothing without a bus, or in a job outside the pipeline."""
    bus, folder = os.environ.get("EVENT_BUS"), folders.channel("training")
    run = folder / "run.json" if folder else None
    if not bus or run is None or not run.is_file():
        return lambda _: None
    return functools.partial(announce, bus, json.loads(run.read_bytes()))


def announce(bus: str, run: dict[str, str], alert: Alert) -> None:
    """Put a `Training Alert` of the run (`{"run_id", "dataset"}`) on a bus. A failure is logged and does not end the job."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    event = AlertEvent(
        run_id=run["run_id"],
        dataset=run["dataset"],
        attempt=int(os.environ["TRAINING_JOB_NAME"].rpartition("-")[2]),
        **{name: alert[name] for name in ("code", "step", "message", "evidence")},
    )
    # A job with network isolation has neither network nor credentials. Its training must not wait for them.
    few_tries = Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 2})
    try:
        put(boto3.client("events", region_name=os.environ.get("AWS_REGION"), config=few_tries), event.entry(bus))
    except (BotoCoreError, ClientError, EventNotDeliveredError) as error:
        log.info("the alert was not announced: %s", error)
