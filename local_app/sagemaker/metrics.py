"""The metrics of inference components, in memory, and CloudWatch's alarms about them.

https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html
"""

from __future__ import annotations

import math
import operator
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from local_app.common import Json

NAMESPACE = "AWS/SageMaker"
KEPT_SECONDS = 24 * 3600
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "GreaterThanOrEqualToThreshold": operator.ge,
    "GreaterThanThreshold": operator.gt,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}


@dataclass
class Statistics:
    """The values of one metric in a period."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, other: Statistics) -> None:
        """Take the values of another period in."""
        self.count += other.count
        self.total += other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    def get(self, statistic: str) -> float:
        """Return one of CloudWatch's statistics."""
        average = self.total / self.count
        return {
            "Sum": self.total,
            "Average": average,
            "Minimum": self.least,
            "Maximum": self.most,
            "SampleCount": float(self.count),
        }[statistic]


class Metrics:
    """The metrics of the last day by seconds: a period of an alarm ends now, not at the last full minute, as on AWS."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, frozenset[tuple[str, str]]], dict[int, Statistics]] = defaultdict(dict)
        self.begin = time.time()

    def add(self, name: str, dimensions: Iterable[Mapping[str, str]], value: float) -> None:
        """Record a value now, under each of several sets of dimensions."""
        now = int(time.time())
        with self._lock:
            for each in dimensions:
                seconds = self._series[name, frozenset(each.items())]
                seconds.setdefault(now, Statistics()).add(Statistics(1, value, value, value))
                while (first := next(iter(seconds))) < now - KEPT_SECONDS:
                    del seconds[first]

    def statistics(self, name: str, dimensions: Mapping[str, str], start: float, end: float) -> Statistics | None:
        """Return the values from `start` (excluded) to `end`, in seconds since 1970; None without any."""
        result = Statistics()
        with self._lock:
            for second, values in self._series.get((name, frozenset(dimensions.items())), {}).items():
                if start < second <= end:
                    result.add(values)
        return result if result.count else None


@dataclass
class Evaluation:
    """An alarm's state by its metric (OK, ALARM or INSUFFICIENT_DATA), and the newest period's value, 0 without one."""

    state: str
    reason: str
    value: float


def evaluate(alarm: Json, metrics: Metrics, now: float) -> Evaluation:
    """Return the state of an alarm about one metric, by its description in DescribeAlarms.

    It is ALARM when DatapointsToAlarm of its last EvaluationPeriods periods breach the threshold. TreatMissingData says
    what a period without data is
    (https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html). A period before the
    emulator's start is unknown: an alarm that it could decide keeps its state.
    """
    periods, period = alarm["EvaluationPeriods"], alarm["Period"]
    needed, missing = alarm.get("DatapointsToAlarm") or periods, alarm.get("TreatMissingData") or "missing"
    dimensions = {dimension["Name"]: dimension["Value"] for dimension in alarm.get("Dimensions", [])}
    breaches = OPERATORS[alarm["ComparisonOperator"]]
    values: list[float | None] = []
    breaching, decided, unknown = 0, 0, 0
    for number in range(periods):
        end = now - number * period
        found = metrics.statistics(alarm["MetricName"], dimensions, end - period, end)
        values.append(value := found.get(alarm["Statistic"]) if found else None)
        if value is not None:
            decided += 1
            breaching += breaches(value, alarm["Threshold"])
        elif end - period < metrics.begin:
            unknown += 1
        elif missing in ("breaching", "notBreaching"):
            decided += 1
            breaching += missing == "breaching"
    if breaching >= needed:
        state = "ALARM"
    elif unknown and breaching + unknown >= needed:
        state = alarm["StateValue"]
    elif decided:
        state = "OK"
    else:
        state = alarm["StateValue"] if missing == "ignore" else "INSUFFICIENT_DATA"
    shown = [None if value is None else round(value, 3) for value in values]
    reason = f"{breaching} of the last {periods} periods breach the threshold {alarm['Threshold']}; newest first: {shown}"
    return Evaluation(state, reason[:1023], values[0] or 0.0)
