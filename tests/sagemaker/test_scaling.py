"""Alarms about the emulator's metrics, Application Auto Scaling, and the way to zero copies and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from components import Serving

from local_app.sagemaker.metrics import NAMESPACE, Metrics, evaluate, query_of
from local_app.sagemaker.permissions import required_permissions
from local_app.sagemaker.scaling import _is_in

ARN = "arn:aws:sagemaker:us-east-1:000000000000"
TARGET = {
    "ServiceNamespace": "sagemaker",
    "ResourceId": "inference-component/base",
    "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount",
}
NOW = 1_000_000.0


def alarm(**changes: Any) -> dict[str, Any]:
    return {
        "AlarmName": "alarm",
        "Namespace": NAMESPACE,
        "MetricName": "Invocations",
        "Dimensions": [{"Name": "InferenceComponentName", "Value": "base"}],
        "Statistic": "Sum",
        "Period": 60,
        "EvaluationPeriods": 3,
        "Threshold": 1.0,
        "ComparisonOperator": "LessThanThreshold",
    } | changes


def metrics(minutes: list[list[float]], monkeypatch: pytest.MonkeyPatch, begin: float = 0) -> Metrics:
    """Values of the base's Invocations, by minutes before now."""
    result = Metrics()
    result.begin = begin
    for number, values in enumerate(minutes):
        monkeypatch.setattr("local_app.sagemaker.metrics.time.time", lambda number=number: NOW - 60 * number - 30)
        for value in values:
            result.add("Invocations", [{"InferenceComponentName": "base"}], value)
    return result


def state_of(described: dict[str, Any], values: Metrics) -> str:
    query = query_of(described, values)
    assert query is not None
    return evaluate(described, query, values.begin, NOW).state


@pytest.mark.parametrize(
    ("minutes", "changes", "state"),
    [
        ([[1], [1], [1]], {}, "OK"),
        ([[], [], []], {"TreatMissingData": "breaching"}, "ALARM"),
        ([[], [1], []], {"TreatMissingData": "breaching"}, "OK"),
        ([[], [], []], {"TreatMissingData": "notBreaching"}, "OK"),
        ([[], [], []], {"TreatMissingData": "missing"}, "INSUFFICIENT_DATA"),
        ([[], [], []], {}, "INSUFFICIENT_DATA"),
        ([[], [], []], {"TreatMissingData": "ignore", "StateValue": "ALARM"}, "ALARM"),
        ([[0], [0], [0]], {}, "ALARM"),
        ([[0], [0], [5]], {"DatapointsToAlarm": 2}, "ALARM"),
        ([[0], [5], [5]], {"DatapointsToAlarm": 2}, "OK"),
        ([[0, 4], [0], [0]], {"ComparisonOperator": "GreaterThanOrEqualToThreshold", "EvaluationPeriods": 1}, "ALARM"),
        ([[0, 1, 2]], {"Statistic": "Average", "EvaluationPeriods": 1, "ComparisonOperator": "GreaterThanThreshold"}, "OK"),
        (
            [[0, 1, 2]],
            {"Statistic": "Maximum", "EvaluationPeriods": 1, "ComparisonOperator": "GreaterThanThreshold"},
            "ALARM",
        ),
        ([[0, 1, 2]], {"Statistic": "Minimum", "EvaluationPeriods": 1}, "ALARM"),
        ([[0, 1, 2]], {"Statistic": "SampleCount", "EvaluationPeriods": 1, "Threshold": 3.0}, "OK"),
        ([[], [0], [0]], {"Period": 120, "EvaluationPeriods": 1}, "ALARM"),
        ([[9], [9], [9]], {"Dimensions": [], "TreatMissingData": "breaching"}, "ALARM"),  # another metric
    ],
)
def test_an_alarms_state_follows_from_its_metric(
    minutes: list[list[float]], changes: dict[str, Any], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html"""
    assert state_of(alarm(**{"StateValue": "OK"} | changes), metrics(minutes, monkeypatch)) == state


def math(expression: str, **changes: Any) -> dict[str, Any]:
    """An alarm on an expression of the base's requests and of its open requests."""
    named = {"requests": ("Invocations", "Sum"), "open": ("ConcurrentRequestsPerCopy", "Maximum")}
    queries: list[dict[str, Any]] = [
        {"Id": name, "MetricStat": {"Metric": alarm(MetricName=metric), "Period": 60, "Stat": stat}, "ReturnData": False}
        for name, (metric, stat) in named.items()
    ]
    described = {k: v for k, v in alarm(StateValue="OK").items() if k not in ("Namespace", "MetricName", "Statistic")}
    return described | {"Metrics": [*queries, {"Id": "use", "Expression": expression}]} | changes


@pytest.mark.parametrize(
    ("minutes", "open_requests", "state"),
    [
        ([[], [], []], None, "OK"),  # asleep: no value, and not breaching
        ([[], [], []], 0, "ALARM"),
        ([[], [], []], 1, "OK"),
        ([[], [1], []], 0, "OK"),
    ],
)
def test_an_alarm_on_the_use_of_a_component(
    minutes: list[list[float]], open_requests: float | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/using-metric-math.html"""
    values = metrics(minutes, monkeypatch)
    for number in range(3):
        monkeypatch.setattr("local_app.sagemaker.metrics.time.time", lambda number=number: NOW - 60 * number - 5)
        if open_requests is not None:
            values.add("ConcurrentRequestsPerCopy", [{"InferenceComponentName": "base"}], open_requests)
    idle = math("SUM([requests, open])", TreatMissingData="notBreaching", Threshold=0.0)
    assert state_of(idle | {"ComparisonOperator": "LessThanOrEqualToThreshold"}, values) == state


@pytest.mark.parametrize(
    "described", [math("requests/open"), math("SUM([requests,other])"), alarm(Namespace="AWS/Lambda"), alarm(Statistic=None)]
)
def test_other_alarms_are_left_alone(described: dict[str, Any]) -> None:
    assert query_of(described, Metrics()) is None


@pytest.mark.parametrize(("minutes", "state"), [([[], [], []], "INSUFFICIENT_DATA"), ([[2], [], []], "OK")])
def test_what_was_before_the_emulators_start_is_unknown(
    minutes: list[list[float]], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = alarm(StateValue="INSUFFICIENT_DATA", TreatMissingData="breaching")
    assert state_of(idle, metrics(minutes, monkeypatch, begin=NOW - 90)) == state


@pytest.mark.parametrize(
    ("above", "lower", "upper", "expected"),
    [
        (0, 0, 10, True),
        (10, 0, 10, False),
        (9.9, 0, None, True),
        (-1, 0, None, False),
        (0, -10, 0, True),
        (-10, -10, 0, False),
        (-5, None, 0, True),
        (1, None, 0, False),
    ],
)
def test_the_breach_selects_the_step(above: float, lower: float | None, upper: float | None, expected: bool) -> None:
    """https://docs.aws.amazon.com/autoscaling/application/APIReference/API_StepAdjustment.html"""
    bounds = {"MetricIntervalLowerBound": lower, "MetricIntervalUpperBound": upper}
    assert _is_in(above, {name: value for name, value in bounds.items() if value is not None}) == expected


def test_open_requests_are_measured_from_the_first_whole_minute_on(
    hosted: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ConcurrentRequestsPerCopy: https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html"""
    serving = hosted(alarm_interval=0.05)
    serving.base()

    def most() -> float | None:
        name, dimensions = "ConcurrentRequestsPerCopy", {"InferenceComponentName": "base"}
        found = serving.local.metrics.statistics(name, dimensions, 0, time.time() + 1)
        return found.most if found else None

    time.sleep(0.3)
    assert most() is None
    monkeypatch.setattr("local_app.sagemaker.deployments.FIRST_MINUTE", 0)
    serving.local.until(lambda: most() == 0)
    serving.ask("base", sleep=0.5)
    assert most() == 1


def policy(serving: Serving, name: str, adjustment: int, kind: str = "ExactCapacity", **bounds: float) -> str:
    step = {"ScalingAdjustment": adjustment} | {f"MetricInterval{key}Bound": value for key, value in bounds.items()}
    config = {"AdjustmentType": kind, "StepAdjustments": [step], "Cooldown": 0}
    return serving.scaling.put_scaling_policy(
        PolicyName=name, PolicyType="StepScaling", StepScalingPolicyConfiguration=config, **TARGET
    )["PolicyARN"]


def test_targets_and_policies_are_kept_and_deleted_together(hosted: Callable[..., Serving], endpoint: str) -> None:
    """https://docs.aws.amazon.com/autoscaling/application/APIReference/API_DeregisterScalableTarget.html"""
    serving = hosted()
    serving.base(copies=0)
    scaling = serving.scaling
    with pytest.raises(scaling.exceptions.ObjectNotFoundException, match="No scalable target"):
        policy(serving, "wake", 1, Lower=0)
    with pytest.raises(ClientError, match="MinCapacity and MaxCapacity are required"):
        scaling.register_scalable_target(MinCapacity=0, **TARGET)
    with pytest.raises(ClientError, match="cannot be less than minimum"):
        scaling.register_scalable_target(MinCapacity=2, MaxCapacity=1, **TARGET)
    first = scaling.register_scalable_target(MinCapacity=0, MaxCapacity=1, **TARGET)["ScalableTargetARN"]
    again = scaling.register_scalable_target(MaxCapacity=2, **TARGET)["ScalableTargetARN"]
    assert first == again
    [target] = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"], target["ResourceId"]) == (0, 2, TARGET["ResourceId"])
    arn = policy(serving, "wake", 1, Lower=0)
    assert arn == policy(serving, "wake", 2, Lower=0)
    assert arn.startswith("arn:aws:autoscaling:us-east-1:000000000000:scalingPolicy:")
    assert arn.endswith(":resource/sagemaker/inference-component/base:policyName/wake")
    cloudwatch = boto3.client("cloudwatch", endpoint_url=endpoint)
    names = {"AlarmName", "Namespace", "MetricName", "Dimensions", "Statistic", "Period", "EvaluationPeriods"}
    wanted = {k: v for k, v in alarm(AlarmName="kept").items() if k in {*names, "Threshold", "ComparisonOperator"}}
    cloudwatch.put_metric_alarm(**wanted, AlarmActions=[arn])
    [described] = scaling.describe_scaling_policies(ServiceNamespace="sagemaker", PolicyNames=["wake"])["ScalingPolicies"]
    assert [each["AlarmName"] for each in described["Alarms"]] == ["kept"]
    assert described["StepScalingPolicyConfiguration"]["StepAdjustments"][0]["ScalingAdjustment"] == 2
    scaling.deregister_scalable_target(**TARGET)
    assert scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"] == []
    with pytest.raises(scaling.exceptions.ObjectNotFoundException):
        scaling.deregister_scalable_target(**TARGET)
    cloudwatch.delete_alarms(AlarmNames=["kept"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ResourceId": "inference-component/none"}, "Could not find inference component"),
        ({"ResourceId": "endpoint/ep/variant/AllTraffic"}, "not endpoint/ep"),
        ({"ServiceNamespace": "ecs"}, "in the namespace sagemaker"),
    ],
)
def test_other_targets_are_refused(shared: Serving, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        shared.scaling.register_scalable_target(MinCapacity=0, MaxCapacity=1, **TARGET | changes)


def test_registering_brings_the_copies_within_the_limits(hosted: Callable[..., Serving]) -> None:
    """RegisterScalableTarget: "it changes the resource's current capacity to a value that is inside of this range".

    https://docs.aws.amazon.com/autoscaling/application/APIReference/API_RegisterScalableTarget.html
    """
    serving = hosted()
    serving.base(copies=0)
    serving.scaling.register_scalable_target(MinCapacity=1, MaxCapacity=2, **TARGET)
    assert serving.settled("base")["RuntimeConfig"]["DesiredCopyCount"] == 1


def test_an_idle_component_sleeps_and_the_first_request_wakes_it(hosted: Callable[..., Serving], endpoint: str) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-zero-instances.html"""
    serving = hosted(alarm_interval=0.1)
    serving.local.metrics.begin = 0
    serving.base()
    serving.adapter("line", "one")
    serving.ask("line")
    cloudwatch = boto3.client("cloudwatch", endpoint_url=endpoint)
    serving.scaling.register_scalable_target(MinCapacity=0, MaxCapacity=1, **TARGET)
    common = {"Namespace": NAMESPACE, "Dimensions": alarm()["Dimensions"], "Statistic": "Sum", "EvaluationPeriods": 1}
    cloudwatch.put_metric_alarm(
        AlarmName="base-idle",
        MetricName="Invocations",
        Period=2,
        Threshold=1,
        ComparisonOperator="LessThanThreshold",
        TreatMissingData="breaching",
        AlarmActions=[policy(serving, "sleep", 0, Upper=0)],
        **common,
    )
    cloudwatch.put_metric_alarm(
        AlarmName="base-wake",
        MetricName="NoCapacityInvocationFailures",
        Period=2,
        Threshold=1,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
        TreatMissingData="notBreaching",
        AlarmActions=[policy(serving, "wake", 5, "ChangeInCapacity", Lower=0)],  # more than MaxCapacity allows
        **common,
    )

    def state(name: str) -> str:
        return cloudwatch.describe_alarms(AlarmNames=[name])["MetricAlarms"][0]["StateValue"]

    serving.local.until(lambda: serving.describe("base")["RuntimeConfig"] == {"DesiredCopyCount": 0, "CurrentCopyCount": 0})
    assert (state("base-idle"), serving.describe("line")["InferenceComponentStatus"]) == ("ALARM", "InService")
    with pytest.raises(ClientError, match="has no capacity"):
        serving.ask("line")

    def answered() -> bool:
        try:
            return bool(serving.ask("line")["version"] == "one")
        except ClientError:
            return False

    serving.local.until(answered)
    assert serving.describe("base")["RuntimeConfig"]["DesiredCopyCount"] == 1
    serving.local.until(lambda: answered() and (state("base-idle"), state("base-wake")) == ("OK", "OK"))
    cloudwatch.delete_alarms(AlarmNames=["base-idle", "base-wake"])


def test_the_alarm_of_a_refused_change_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "For Auto Scaling actions, the alarm continues to invoke the action once per minute that the alarm remains in the new
    state." https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarm-actions.html
    """
    from local_app.sagemaker import alarms

    class CloudWatch:
        def set_alarm_state(self, **_: Any) -> None:
            pass

    done: list[str] = []
    values = metrics([[]], monkeypatch)
    watch = alarms.Alarms(CloudWatch, values, lambda: None, lambda arn, _: done.append(arn), 1)
    clock = [1000.0]
    monkeypatch.setattr("local_app.sagemaker.alarms.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("local_app.sagemaker.alarms.time.time", lambda: NOW)
    arn = "arn:aws:autoscaling:us-east-1:1:scalingPolicy:1:resource/sagemaker/inference-component/base:policyName/sleep"
    ringing = alarm(AlarmArn="a", StateValue="ALARM", TreatMissingData="breaching", AlarmActions=[arn, "arn:aws:sns:x"])
    query = query_of(ringing, values)
    assert query is not None
    for moment, times in ((1000.0, 1), (1030.0, 1), (1061.0, 2), (1090.0, 2), (1122.0, 3)):
        clock[0] = moment
        watch._look_at(ringing, query)
        assert len(done) == times
    watch._look_at(ringing | {"ActionsEnabled": False}, query)
    assert set(done) == {arn}


def test_what_scaling_needs_of_iam() -> None:
    """https://docs.aws.amazon.com/service-authorization/latest/reference/list_awsapplicationautoscaling.html"""
    target, role = required_permissions("RegisterScalableTarget", TARGET, ARN)
    assert target.resource.startswith("arn:aws:application-autoscaling:us-east-1:000000000000:scalable-target/")
    assert target.context["application-autoscaling:service-namespace"] == "sagemaker"
    assert role.action == "iam:CreateServiceLinkedRole"
    assert required_permissions("DescribeScalableTargets", {}, ARN)[0].resource == "*"
