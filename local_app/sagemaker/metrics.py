"""The metrics of inference components and of imported models, in memory, and CloudWatch's alarms about the former.

https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html
"""

from __future__ import annotations

import math
import operator
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from local_app.common import Json

NAMESPACE = "AWS/SageMaker"
KEPT_SECONDS = 24 * 3600
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "GreaterThanOrEqualToThreshold": operator.ge,
    "GreaterThanThreshold": operator.gt,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}


STATISTICS = ("Sum", "Average", "Minimum", "Maximum", "SampleCount")
EXPRESSION = re.compile(r"(?P<function>SUM|MAX|MIN)\(\[\s*(?P<names>[a-z]\w*(\s*,\s*[a-z]\w*)*)\s*\]\)")
FUNCTIONS: dict[str, Callable[[list[float]], float]] = {"SUM": sum, "MAX": max, "MIN": min}


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
    """A service's metrics of the last day by seconds: a period of an alarm ends now, not at the last full minute, as on AWS.

    `namespace` is theirs in CloudWatch.
    """

    def __init__(self, namespace: str = NAMESPACE) -> None:
        self.namespace = namespace
        self._lock = threading.Lock()
        self._series: dict[tuple[str, frozenset[tuple[str, str]]], dict[int, Statistics]] = defaultdict(dict)
        self.begin = time.time()
        self._published = int(self.begin)  # the seconds before it are in CloudWatch

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
            for second, values in reversed(self._series.get((name, frozenset(dimensions.items())), {}).items()):
                if second <= start:
                    break
                if second <= end:
                    result.add(values)
        return result if result.count else None

    def new_minutes(self) -> list[Json]:
        """Return the metric data, in PutMetricData's form, of the full minutes since the last call."""
        start, end = self._published, int(time.time()) // 60 * 60
        self._published = max(start, end)
        found: dict[tuple[str, frozenset[tuple[str, str]], int], Statistics] = defaultdict(Statistics)
        with self._lock:
            for (name, dimensions), seconds in self._series.items():
                for second, values in reversed(seconds.items()):
                    if second < start:
                        break
                    if second < end:
                        found[name, dimensions, second // 60 * 60].add(values)
        return [
            {
                "MetricName": name,
                "Dimensions": [{"Name": key, "Value": value} for key, value in sorted(dimensions)],
                "Timestamp": minute,
                "StatisticValues": {
                    "SampleCount": values.count,
                    "Sum": values.total,
                    "Minimum": values.least,
                    "Maximum": values.most,
                },
            }
            for (name, dimensions, minute), values in found.items()
        ]


@dataclass
class Evaluation:
    """An alarm's state by its metric (OK, ALARM or INSUFFICIENT_DATA), and the newest period's value, 0 without one."""

    state: str
    reason: str
    value: float


class Query(NamedTuple):
    """What an alarm watches: its value between two moments, None without data, and the length of a period in seconds."""

    read: Callable[[float, float], float | None]
    period: int


def query_of(alarm: Json, metrics: Metrics) -> Query | None:
    """Return what an alarm watches; None for an alarm about anything but statistics of AWS/SageMaker.

    Of metric math, SUM, MAX and MIN of several metrics are known: those that have no data in a period are left out
    (https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/using-metric-math.html).
    """
    if not alarm.get("Metrics"):
        stat = {"Metric": alarm, "Stat": alarm.get("Statistic"), "Period": alarm.get("Period")}
        return Query(_reader(stat, metrics), alarm["Period"]) if _is_known(stat) else None
    stats = {query["Id"]: query["MetricStat"] for query in alarm["Metrics"] if "MetricStat" in query}
    expression = next((query["Expression"] for query in alarm["Metrics"] if "Expression" in query), "")
    match = EXPRESSION.fullmatch(expression)
    names = re.split(r"\s*,\s*", match["names"]) if match else []
    if not match or not stats or not all(map(_is_known, stats.values())) or not stats.keys() >= set(names):
        return None
    readers = [_reader(stats[name], metrics) for name in names]

    def read(start: float, end: float) -> float | None:
        values = [value for value in (reader(start, end) for reader in readers) if value is not None]
        return float(FUNCTIONS[match["function"]](values)) if values else None

    return Query(read, next(iter(stats.values()))["Period"])


def _is_known(stat: Json) -> bool:
    return stat["Metric"].get("Namespace") == NAMESPACE and stat["Stat"] in STATISTICS


def _reader(stat: Json, metrics: Metrics) -> Callable[[float, float], float | None]:
    metric = stat["Metric"]
    dimensions = {dimension["Name"]: dimension["Value"] for dimension in metric.get("Dimensions", [])}

    def read(start: float, end: float) -> float | None:
        found = metrics.statistics(metric["MetricName"], dimensions, start, end)
        return found.get(stat["Stat"]) if found else None

    return read


def evaluate(alarm: Json, query: Query, begin: float, now: float) -> Evaluation:
    """Return the state of an alarm, by its description in DescribeAlarms.

    It is ALARM when DatapointsToAlarm of its last EvaluationPeriods periods breach the threshold. TreatMissingData says what
    a period without data is (https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html). A
    period before `begin`, the emulator's start, is unknown: an alarm that it could decide keeps its state.
    """
    periods = alarm["EvaluationPeriods"]
    needed, missing = alarm.get("DatapointsToAlarm") or periods, alarm.get("TreatMissingData") or "missing"
    breaches = OPERATORS[alarm["ComparisonOperator"]]
    values: list[float | None] = []
    breaching, decided, unknown = 0, 0, 0
    for number in range(periods):
        end = now - number * query.period
        values.append(value := query.read(end - query.period, end))
        if value is not None:
            decided += 1
            breaching += breaches(value, alarm["Threshold"])
        elif end - query.period < begin:
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
