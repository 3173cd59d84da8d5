"""What `tunedrop endpoints` says of each line that is served: state, model, machines, requests and cost."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

import msgspec

from local_app.stack import StackError
from pipeline.aws import describe_if_any, read_object
from pipeline.jobs.price import hosting_prices, on_demand_prices
from pipeline.notify import events
from pipeline.runs import deployments
from pipeline.runs.deployments import Stage
from tunedrop import event_bus, object_keys
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.lines import all_lines

DAY = timedelta(days=1)


class Price(NamedTuple):
    """USD an hour of an instance. `kind` is `hosting`, or `training` where the launch plan has no price of endpoints."""

    usd: float
    kind: str


def summaries(deployment: Deployment) -> list[dict[str, Any]]:
    """Return what the stack serves, one entry for each line, by name. None means unknown."""
    sagemaker, cloudwatch = (deployment.connect("client", service) for service in ("sagemaker", "cloudwatch"))
    endpoint = cache(lambda name: _described(sagemaker.describe_endpoint, EndpointName=name))
    component = cache(lambda name: _described(sagemaker.describe_inference_component, InferenceComponentName=name))
    price = _prices(deployment)
    lines = all_lines(deployment)
    found = []
    for item in sorted(deployment.deployments.all(), key=lambda item: item.line):
        described = endpoint(item.endpoint) if item.endpoint else {}
        variant: dict[str, Any] = next(iter(described.get("ProductionVariants", [])), {})
        copies = None if item.on_bedrock else _copies(item, component)
        hourly = price(item.instance_type)
        packages = lines[item.line].packages if item.line in lines else {}
        found.append(
            {
                "line": item.line,
                "state": state(item, copies),
                "run": item.run,
                "package_version": next((int(version) for version, run in packages.items() if run == item.run), None),
                "next": item.target if item.stage not in {Stage.IDLE, Stage.REMOVING} else None,
                "endpoint": item.endpoint,
                "component": item.component,
                "model": item.model,
                "instance_type": item.instance_type,
                "instances": variant.get("CurrentInstanceCount"),
                "copies": copies,
                "requests_24h": requests(cloudwatch, item) if item.component else None,
                "busy_usd_per_hour": hourly and hourly.usd,
                "idle_usd_per_hour": None if item.on_bedrock else 0.0,
                "price": hourly and hourly.kind,
                "at_most_usd": _at_most(described, variant, hourly),
                "deployed": item.deployed,
                "answered": item.answered,
                "reason": item.reason,
                "refused": item.refused,
            }
        )
    return found


def _described(describe: Callable[..., dict[str, Any]], **name: str) -> dict[str, Any]:
    """Return what a Describe call answers; empty for something that does not exist."""
    return describe_if_any(describe, **name) or {}


def _copies(item: deployments.Deployment, component: Callable[[str], dict[str, Any]]) -> int | None:
    """Return how many copies of a line's model run. An adapter has the copies of its base component."""
    own = component(item.component) if item.component else {}
    base = own.get("Specification", {}).get("BaseInferenceComponentName")
    copies: int | None = (component(base) if base else own).get("RuntimeConfig", {}).get("CurrentCopyCount")
    return copies


def state(item: deployments.Deployment, copies: int | None) -> str:
    """Return the state of a line's deployment for people."""
    if item.stage != Stage.IDLE:
        return item.stage.lower()
    if item.run is None:
        return "refused" if item.reason in item.refused.values() else "not served"
    return "deployed" if copies is None else "answers" if copies else "asleep"


def requests(cloudwatch: Any, item: deployments.Deployment) -> int | None:
    """Return the requests to a line's component or model in the last 24 hours; None if CloudWatch has no data.

    https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html
    https://docs.aws.amazon.com/bedrock/latest/userguide/monitoring.html
    """
    namespace, dimension = ("AWS/Bedrock", "ModelId") if item.on_bedrock else ("AWS/SageMaker", "InferenceComponentName")
    now = datetime.now(UTC)
    points = cloudwatch.get_metric_statistics(
        Namespace=namespace,
        MetricName="Invocations",
        Dimensions=[{"Name": dimension, "Value": item.component}],
        StartTime=now - DAY,
        EndTime=now,
        Period=3600,
        Statistics=["Sum"],
    )["Datapoints"]
    return int(sum(point["Sum"] for point in points)) if points else None


def _prices(deployment: Deployment) -> Callable[[str | None], Price | None]:
    """Return a function that returns the price of an instance type by the current launch plan."""
    bucket = deployment.outputs.artifact_bucket
    current = msgspec.json.decode(read_object(deployment.s3, bucket, object_keys.CURRENT_PLAN) or b"{}")
    key = f"{object_keys.LAUNCH_PLANS}{current.get('digest')}.json"
    plan = msgspec.json.decode(read_object(deployment.s3, bucket, key) or b"{}")
    known = [("hosting", hosting_prices(plan)), ("training", on_demand_prices(plan))]
    return lambda name: next((Price(prices[name], kind) for kind, prices in known if name and name in prices), None)


def _at_most(endpoint: dict[str, Any], variant: dict[str, Any], price: Price | None) -> float | None:
    """Return the most that an endpoint can have cost until now: all its instances since its creation, without a pause."""
    most = variant.get("ManagedInstanceScaling", {}).get("MaxInstanceCount")
    if price is None or not most:
        return None
    hours: float = (datetime.now(UTC) - endpoint["CreationTime"]).total_seconds() / 3600
    return round(hours * int(most) * price.usd, 2)


def undeploy(deployment: Deployment, line: str, timeout: float = 120) -> deployments.Deployment:
    """Take down what answers under a line's name; return the deployment when this has begun.

    Raises StackError if nothing is deployed, and if nothing has happened after `timeout` seconds.
    """
    before = deployment.deployments.get(line)
    if before.run is None and before.stage in {Stage.IDLE, Stage.REMOVING}:
        raise StackError(f"The line '{line}' is not served: there is nothing to take down. See `tunedrop endpoints`.")
    request = event_bus.entry(deployment.outputs.event_bus_name, events.UNDEPLOY_REQUESTED, {"line": line})
    event_bus.put(deployment.connect("client", "events"), request)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        item = deployment.deployments.get(line)
        if item.stage == Stage.REMOVING or item.removed != before.removed:
            return item
        time.sleep(0.3)
    raise StackError(f"The line '{line}' is still served after {timeout:.0f} s. Read the log of the function deploy_model.")
