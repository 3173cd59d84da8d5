"""Evaluates CloudWatch's alarms about AWS/SageMaker by the emulator's metrics, and has their scaling policies carried out.

The alarms are in the AWS emulator, which does what an alarm's other actions say when its state changes. It gets the metrics
of each full minute, for people and dashboards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from local_app.common import Json
from local_app.sagemaker.metrics import Evaluation, Metrics, Query, evaluate, query_of
from local_app.sagemaker.services import AWS_ERRORS

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 60.0
MOST_DATA = 1000  # of one PutMetricData request

# Carries a scaling policy out: its ARN, and by how much the metric is above the alarm's threshold.
Scale = Callable[[str, float], None]


class Alarms:
    """Looks at the alarms every `interval` seconds, from `start` to `close`. `measure` is called before each look. The
    metrics `others` have no alarms here, and get to CloudWatch as well.

    "For Auto Scaling actions, the alarm continues to invoke the action once per minute that the alarm remains in the new
    state" (https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarm-actions.html).
    """

    def __init__(
        self,
        cloudwatch: Callable[[], Any],
        metrics: Metrics,
        measure: Callable[[], None],
        scale: Scale,
        interval: float,
        others: Sequence[Metrics] = (),
    ) -> None:
        self._cloudwatch, self._metrics, self._others, self._measure = cloudwatch, metrics, others, measure
        self._scale, self._interval = scale, interval
        self._scaled: dict[str, float] = {}  # when an alarm's policies were carried out last, by its ARN
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="alarms", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(5)

    def _loop(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                self._measure()
                self._publish()
                for alarm in self._described():
                    if query := query_of(alarm, self._metrics):
                        self._look_at(alarm, query)
            except AWS_ERRORS as error:  # the AWS emulator starts later, or ends earlier
                logger.debug("the alarms cannot be read: %s", error)
            except Exception:  # the other alarms must go on
                logger.exception("alarms")

    def _publish(self) -> None:
        for metrics in (self._metrics, *self._others):
            data = metrics.new_minutes()
            for first in range(0, len(data), MOST_DATA):
                batch = data[first : first + MOST_DATA]
                self._cloudwatch().put_metric_data(Namespace=metrics.namespace, MetricData=batch)

    def _described(self) -> Iterator[Json]:
        for page in self._cloudwatch().get_paginator("describe_alarms").paginate(AlarmTypes=["MetricAlarm"]):
            yield from page["MetricAlarms"]

    def _look_at(self, alarm: Json, query: Query) -> None:
        found = evaluate(alarm, query, self._metrics.begin, time.time())
        if found.state != alarm["StateValue"]:
            logger.info("alarm %s: %s (%s)", alarm["AlarmName"], found.state, found.reason)
            self._cloudwatch().set_alarm_state(
                AlarmName=alarm["AlarmName"], StateValue=found.state, StateReason=found.reason
            )
        if found.state != "ALARM":
            self._scaled.pop(alarm["AlarmArn"], None)
        elif alarm.get("ActionsEnabled", True):
            self._act(alarm, found)

    def _act(self, alarm: Json, found: Evaluation) -> None:
        now = time.monotonic()
        if now - self._scaled.get(alarm["AlarmArn"], -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        self._scaled[alarm["AlarmArn"]] = now
        for action in alarm.get("AlarmActions", []):
            if ":scalingPolicy:" in action:
                self._scale(action, found.value - alarm["Threshold"])
