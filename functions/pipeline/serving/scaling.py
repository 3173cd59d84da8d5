"""When the copies of a component sleep and wake, and the alarms that take an update back.

Both policies are steps on an alarm: target tracking cannot leave zero copies, and its own alarm for less load waits 15
minutes, whatever the stack says (https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-zero-instances.html).
"""

from datetime import datetime
from typing import Any

from pipeline.aws import Aws
from pipeline.serving.served import VARIANT
from pipeline.settings import DeploySettings

NAMESPACE = "AWS/SageMaker"
SERVICE, DIMENSION = "sagemaker", "sagemaker:inference-component:DesiredCopyCount"
PERIOD = 60
# Alarms of an update: so many failed requests in a minute, and so long an answer in each of three minutes.
MOST_ERRORS = 3
SLOW_SECONDS = 30


def alarms(component: str) -> list[str]:
    """Return the names of the alarms that take an update of a component back.

    No alarm of the stack has such a name, whatever the line's name is: `<stack>-deploy-model-errors` is one.
    """
    return [f"{component}-failed-requests", f"{component}-slow-answers"]


def watch(component: str, settings: DeploySettings, aws: Aws) -> None:
    """Create or update the alarms on a component's failed and slow requests."""
    errors, latency = alarms(component)
    actions = [settings.alarm_topic_arn]
    aws.cloudwatch.put_metric_alarm(
        **_sum(errors, component, "Invocation5XXErrors", MOST_ERRORS, actions),
    )
    aws.cloudwatch.put_metric_alarm(
        AlarmName=latency,
        AlarmActions=actions,
        **_metric("ModelLatency", InferenceComponentName=component),
        Period=PERIOD,
        Statistic="Average",
        EvaluationPeriods=3,
        Threshold=SLOW_SECONDS * 1e6,  # the metric is in microseconds
        ComparisonOperator="GreaterThanThreshold",
        TreatMissingData="notBreaching",
    )


def ringing(component: str, since: datetime, aws: Aws) -> str | None:
    """Return why an alarm of a component has begun to ring, None if none has."""
    found = aws.cloudwatch.describe_alarms(AlarmNames=alarms(component), StateValue="ALARM")["MetricAlarms"]
    rung = (each for each in found if each.get("StateTransitionedTimestamp", each["StateUpdatedTimestamp"]) >= since)
    return next((f"the alarm {each['AlarmName']} rings: {each['StateReason']}" for each in rung), None)


def scale(component: str, settings: DeploySettings, aws: Aws, *, endpoint: str | None = None) -> None:
    """Let a component with copies go to zero when nobody asks, and come back for a question.

    With an `endpoint`, every request there counts: those to the adapters on a base component. The gauge of open requests has
    a value while a copy runs, so that an idle minute counts, and none without copies: the alarm is quiet then.
    """
    requests = {"EndpointName": endpoint, "VariantName": VARIANT} if endpoint else {"InferenceComponentName": component}
    aws.autoscaling.register_scalable_target(
        **_target(component), MinCapacity=0, MaxCapacity=settings.endpoint_max_instances
    )
    queries = [
        _query("requests", "Sum", _metric("Invocations", **requests)),
        _query("open", "Maximum", _metric("ConcurrentRequestsPerCopy", InferenceComponentName=component)),
        {"Id": "use", "Expression": "SUM([requests,open])", "ReturnData": True},
    ]
    aws.cloudwatch.put_metric_alarm(
        AlarmName=f"{component}-idle",
        AlarmActions=[_policy(component, "idle", 0, aws)],
        Metrics=queries,
        EvaluationPeriods=settings.endpoint_idle_minutes,
        Threshold=0,
        ComparisonOperator="LessThanOrEqualToThreshold",
        TreatMissingData="notBreaching",
    )
    wake_by(component, component, aws)


def wake_by(component: str, computes: str, aws: Aws) -> None:
    """Let a question to a component wake the component whose copies answer it.

    A request without a copy fails, and counts as NoCapacityInvocationFailures. No document says whether a request to an
    adapter counts for the adapter or for its base component: each has an alarm.
    """
    policy = _policy(computes, "wake", 1, aws)
    aws.cloudwatch.put_metric_alarm(**_sum(f"{component}-wake", component, "NoCapacityInvocationFailures", 1, [policy]))


def forget(component: str, aws: Aws) -> None:
    """Delete a component's alarms, policies and scalable target."""
    aws.cloudwatch.delete_alarms(AlarmNames=[*alarms(component), f"{component}-idle", f"{component}-wake"])
    try:
        aws.autoscaling.deregister_scalable_target(**_target(component))
    except aws.autoscaling.exceptions.ObjectNotFoundException:
        return  # an adapter component has no target


def _target(component: str) -> dict[str, str]:
    return {"ServiceNamespace": SERVICE, "ResourceId": f"inference-component/{component}", "ScalableDimension": DIMENSION}


def _policy(component: str, name: str, copies: int, aws: Aws) -> str:
    """Create or update a policy that gives a component so many copies; return its ARN."""
    bound = "MetricIntervalLowerBound" if copies else "MetricIntervalUpperBound"
    answer = aws.autoscaling.put_scaling_policy(
        **_target(component),
        PolicyName=f"{component}-{name}",
        PolicyType="StepScaling",
        StepScalingPolicyConfiguration={
            "AdjustmentType": "ExactCapacity",
            "MetricAggregationType": "Maximum",
            "Cooldown": 60,
            "StepAdjustments": [{bound: 0, "ScalingAdjustment": copies}],
        },
    )
    return str(answer["PolicyARN"])


def _sum(alarm: str, component: str, metric: str, threshold: int, actions: list[str]) -> dict[str, Any]:
    """Return the PutMetricAlarm request of an alarm on a count in a minute."""
    return {
        "AlarmName": alarm,
        "AlarmActions": actions,
        **_metric(metric, InferenceComponentName=component),
        "Period": PERIOD,
        "Statistic": "Sum",
        "EvaluationPeriods": 1,
        "Threshold": threshold,
        "ComparisonOperator": "GreaterThanOrEqualToThreshold",
        "TreatMissingData": "notBreaching",
    }


def _metric(name: str, **dimensions: str) -> dict[str, Any]:
    return {
        "Namespace": NAMESPACE,
        "MetricName": name,
        "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions.items()],
    }


def _query(name: str, statistic: str, metric: dict[str, Any]) -> dict[str, Any]:
    return {"Id": name, "MetricStat": {"Metric": metric, "Period": PERIOD, "Stat": statistic}, "ReturnData": False}
