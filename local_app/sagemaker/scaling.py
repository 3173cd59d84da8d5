"""Application Auto Scaling for the copies of inference components: scalable targets and step scaling policies.

https://docs.aws.amazon.com/autoscaling/application/userguide/application-auto-scaling-step-scaling-policies.html
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
import uuid
from typing import Any

from local_app.common import Json
from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.component_requests import is_adapter
from local_app.sagemaker.components import InferenceComponents
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store

logger = logging.getLogger(__name__)

OPERATIONS = (
    *("RegisterScalableTarget", "DescribeScalableTargets", "DeregisterScalableTarget"),
    *("PutScalingPolicy", "DescribeScalingPolicies", "DeleteScalingPolicy"),
)
DIMENSION = "sagemaker:inference-component:DesiredCopyCount"
RESOURCE = "inference-component/"
ROLE = (
    "role/aws-service-role/sagemaker.application-autoscaling.amazonaws.com/"
    "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"
)
COOLDOWN_SECONDS = 300  # of a StepScalingPolicyConfiguration without Cooldown


class Scaling:
    """The scalable targets and scaling policies of one account and region."""

    def __init__(self, store: Store, services: Services, components: InferenceComponents, arn_prefix: str) -> None:
        self._store, self._services, self._components = store, services, components
        _, _, _, self._region, self._account = arn_prefix.split(":")
        self._last: dict[tuple[str, bool], float] = {}  # the last change of a target, by its direction (out: True)

    # ----------------------------------------------------------------------------------------------------- targets

    def register_scalable_target(self, request: Json) -> Json:
        """Register a component's number of copies, or change its limits. Copies outside the limits change at once."""
        name = self._name(request)
        component = self._components.get(name)
        if is_adapter(component):
            raise ServiceError("ValidationException", f"Adapter {name} has the copies of its base: register the base.")
        with self._store.transaction():
            target = self._store.get("scalable-target", name) or self._new_target(request)
            target |= {member: request[member] for member in ("MinCapacity", "MaxCapacity") if member in request}
            if not {"MinCapacity", "MaxCapacity"} <= target.keys():
                raise ServiceError(
                    "ValidationException", "MinCapacity and MaxCapacity are required for a new scalable target."
                )
            if target["MinCapacity"] > target["MaxCapacity"]:
                raise ServiceError("ValidationException", "Maximum capacity cannot be less than minimum capacity")
            self._store.put("scalable-target", name, target)
        self._set_copies(name, bounded(component["DesiredCopyCount"], target))
        return {"ScalableTargetARN": target["ScalableTargetARN"]}

    def describe_scalable_targets(self, request: Json) -> Json:
        """Return the targets, or those of some resources."""
        wanted = request.get("ResourceIds")
        targets = [target for target in self._store.all("scalable-target") if not wanted or target["ResourceId"] in wanted]
        return {"ScalableTargets": targets if self._concerns(request) else []}

    def deregister_scalable_target(self, request: Json) -> Json:
        """Remove a target. "Deregistering a scalable target deletes the scaling policies ... associated with it"."""
        name = self._target(request)["ResourceId"].removeprefix(RESOURCE)
        with self._store.transaction():
            self._store.delete("scalable-target", name)
            for policy in self._policies():
                if policy["ResourceId"] == RESOURCE + name:
                    self._store.delete("scaling-policy", policy["PolicyARN"])
        return {}

    # ---------------------------------------------------------------------------------------------------- policies

    def put_scaling_policy(self, request: Json) -> Json:
        """Create or change a step scaling policy of a registered target."""
        _check_policy(request)
        with self._store.transaction():
            name = self._target(request)["ResourceId"]
            policy = next((each for each in self._policies() if _same_policy(each, request)), None)
            arn = (
                f"arn:aws:autoscaling:{self._region}:{self._account}:scalingPolicy:{uuid.uuid4()}:"
                f"resource/sagemaker/{name}:policyName/{request['PolicyName']}"
            )
            new: Json = {"PolicyARN": arn, "CreationTime": time.time(), "PolicyType": "StepScaling"}
            policy = new | (policy or {}) | request
            self._store.put("scaling-policy", policy["PolicyARN"], policy)
        return {"PolicyARN": policy["PolicyARN"], "Alarms": self._alarms(policy["PolicyARN"])}

    def describe_scaling_policies(self, request: Json) -> Json:
        """Return the policies, or those of a resource or by their names, with their alarms."""
        names, resource = request.get("PolicyNames"), request.get("ResourceId")
        found = [
            policy
            for policy in self._policies()
            if self._concerns(request)
            and (not names or policy["PolicyName"] in names)
            and resource in (None, policy["ResourceId"])
        ]
        return {"ScalingPolicies": [policy | {"Alarms": self._alarms(policy["PolicyARN"])} for policy in found]}

    def delete_scaling_policy(self, request: Json) -> Json:
        """Delete a policy. Its alarms stay."""
        with self._store.transaction():
            policy = next((each for each in self._policies() if _same_policy(each, request)), None)
            if policy is None:
                raise ServiceError("ObjectNotFoundException", f"No scaling policy found: {request['PolicyName']}")
            self._store.delete("scaling-policy", policy["PolicyARN"])
        return {}

    # ---------------------------------------------------------------------------------------------------- carrying out

    def carry_out(self, arn: str, above: float) -> None:
        """Carry a policy out. `above` is by how much the metric is above the alarm's threshold: it selects the step."""
        policy = self._store.get("scaling-policy", arn)
        if policy is None:
            logger.warning("An alarm names a scaling policy that does not exist: %s", arn)
            return
        name = policy["ResourceId"].removeprefix(RESOURCE)
        config, target = policy["StepScalingPolicyConfiguration"], self._store.get("scalable-target", name)
        component = self._store.get("component", name)
        step = next((step for step in config["StepAdjustments"] if _is_in(above, step)), None)
        if target is None or component is None or step is None:
            logger.warning("The policy %s has no target, no component, or no step for %g", policy["PolicyName"], above)
            return
        present, change = component["DesiredCopyCount"], step["ScalingAdjustment"]
        wanted = bounded(change if config["AdjustmentType"] == "ExactCapacity" else present + change, target)
        if wanted != present and self._has_cooled(name, wanted > present, config):
            self._set_copies(name, wanted)

    def _has_cooled(self, name: str, is_out: bool, config: Json) -> bool:
        """Return whether the last change in this direction was long enough ago."""
        since = time.monotonic() - self._last.get((name, is_out), -math.inf)
        return since >= float(config.get("Cooldown", COOLDOWN_SECONDS))

    def _set_copies(self, name: str, copies: int) -> None:
        """Ask for a number of copies. While the component changes, SageMaker refuses; the alarm asks again."""
        component = self._components.get(name)
        if copies == component["DesiredCopyCount"]:
            return
        request = {"InferenceComponentName": name, "DesiredRuntimeConfig": {"CopyCount": copies}}
        try:
            self._components.update_inference_component_runtime_config(request)
        except ServiceError as error:
            logger.info("%s cannot have %d copies yet: %s", name, copies, error.message)
            return
        self._last[name, copies > component["DesiredCopyCount"]] = time.monotonic()
        logger.info("%s: %d copies instead of %d", name, copies, component["DesiredCopyCount"])

    # ----------------------------------------------------------------------------------------------------- records

    def _new_target(self, request: Json) -> Json:
        identity = hashlib.sha256(request["ResourceId"].encode()).hexdigest()[:34]
        return {
            "ServiceNamespace": "sagemaker",
            "ResourceId": request["ResourceId"],
            "ScalableDimension": DIMENSION,
            "RoleARN": f"arn:aws:iam::{self._account}:{ROLE}",
            "CreationTime": time.time(),
            "ScalableTargetARN": (
                f"arn:aws:application-autoscaling:{self._region}:{self._account}:scalable-target/{identity}"
            ),
        }

    def _name(self, request: Json) -> str:
        """Return the component that a request is about. Raises ServiceError for another kind of resource."""
        resource: str = request["ResourceId"]
        if not self._concerns(request) or not resource.startswith(RESOURCE):
            raise ServiceError(
                "ValidationException",
                f"The local emulator scales {DIMENSION} of {RESOURCE}<name> in the namespace sagemaker, not {resource}",
            )
        return resource.removeprefix(RESOURCE)

    def _concerns(self, request: Json) -> bool:
        return (request["ServiceNamespace"], request.get("ScalableDimension", DIMENSION)) == ("sagemaker", DIMENSION)

    def _target(self, request: Json) -> Json:
        if target := self._store.get("scalable-target", self._name(request)):
            return target
        raise ServiceError(
            "ObjectNotFoundException",
            f"No scalable target found for service namespace: sagemaker, resource ID: {request['ResourceId']}, "
            f"scalable dimension: {DIMENSION}",
        )

    def _policies(self) -> list[Json]:
        return self._store.all("scaling-policy")

    def _alarms(self, arn: str) -> list[Json]:
        pages: Any = self._services.cloudwatch.get_paginator("describe_alarms").paginate(AlarmTypes=["MetricAlarm"])
        alarms = [alarm for page in pages for alarm in page["MetricAlarms"] if arn in alarm.get("AlarmActions", [])]
        return [{"AlarmName": alarm["AlarmName"], "AlarmARN": alarm["AlarmArn"]} for alarm in alarms]


def bounded(copies: int, target: Json) -> int:
    """Return a number of copies within a target's limits."""
    return max(int(target["MinCapacity"]), min(int(target["MaxCapacity"]), copies))


def _same_policy(policy: Json, request: Json) -> bool:
    return all(policy[member] == request[member] for member in ("PolicyName", "ResourceId"))


def _is_in(above: float, step: Json) -> bool:
    """Return whether a breach is in a step: its lower bound is included, its upper bound is not, with both above 0.

    Below 0 it is the other way round: the bound that is closer to the threshold is included
    (https://docs.aws.amazon.com/autoscaling/application/APIReference/API_StepAdjustment.html).
    """
    lower: float = step.get("MetricIntervalLowerBound", -math.inf)
    upper: float = step.get("MetricIntervalUpperBound", math.inf)
    return lower <= above < upper if above >= 0 and lower >= 0 else lower < above <= upper


def _check_policy(request: Json) -> None:
    """Raise ServiceError if a policy is not a complete step scaling policy."""
    config = request.get("StepScalingPolicyConfiguration", {})
    steps = config.get("StepAdjustments", [])
    rules = [
        (
            request.get("PolicyType", "StepScaling") != "StepScaling" or not config,
            "The local emulator carries out policies of the type StepScaling",
        ),
        (
            config.get("AdjustmentType") not in ("ChangeInCapacity", "ExactCapacity"),
            "AdjustmentType must be ChangeInCapacity or ExactCapacity here",
        ),
        (not steps, "At least one step adjustment is required."),
        (
            any(not {"MetricIntervalLowerBound", "MetricIntervalUpperBound"} & step.keys() for step in steps),
            "A step adjustment must have a lower bound or an upper bound.",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise ServiceError("ValidationException", message)
