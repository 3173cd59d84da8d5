"""Endpoints: their operations, and the state machine behind DescribeEndpoint.

An endpoint's record is its DescribeEndpoint response with its variant. Every change of status writes the record and its
event in one transaction. Its instances are those that the copies of its inference components need.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping

from local_app.common import Json
from local_app.sagemaker.api import JobError, ServiceError, fitting, page
from local_app.sagemaker.models import HERE, Models, already_exists, could_not_find, tags_of
from local_app.sagemaker.quotas import check_quota
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store
from pipeline.notify.endpoint_events import endpoint_event
from tunedrop.config.instances import gpus

logger = logging.getLogger(__name__)

NO_CAPACITY = (
    "Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity error. Please retry using a "
    "different ML instance type or after some time."
)
NO_ROOM = (
    "There is not enough hardware resources on the instances for this endpoint to create a copy of the inference component."
)


class Endpoints:
    """The endpoints of one account and region.

    `on_delete` is called with an endpoint's name when its instances end: its components' processes end then.
    """

    def __init__(
        self,
        store: Store,
        services: Services,
        models: Models,
        arn_prefix: str,
        *,
        max_instances: int,
        quotas: Mapping[str, int],
        without_capacity: Collection[str],
    ) -> None:
        self._store, self._services, self._models, self._arn_prefix = store, services, models, arn_prefix
        self._assumed: dict[str, Services] = {}  # by the role's ARN: their clients take time to make
        self._max_instances, self._quotas, self._without_capacity = max_instances, quotas, without_capacity
        self.on_delete: Callable[[str], None] = lambda _name: None

    # -------------------------------------------------------------------------------------------------- operations

    def create_endpoint(self, request: Json) -> Json:
        """Create an endpoint; its name must be new, and its configuration must exist. Returns at once, as AWS does."""
        if "DeploymentConfig" in request:
            raise ServiceError("ValidationException", f"{HERE} endpoints without DeploymentConfig")
        config = self._models.describe_endpoint_config(request)
        name, [variant] = request["EndpointName"], config["ProductionVariants"]
        with self._store.transaction():
            if self._store.get("endpoint", name):
                raise already_exists("endpoint", self._arn(name))
            self._check_quota(variant)
            endpoint = {
                "EndpointName": name,
                "EndpointArn": self._arn(name),
                "EndpointConfigName": config["EndpointConfigName"],
                "CreationTime": time.time(),
                "ExecutionRoleArn": config["ExecutionRoleArn"],
                "Variant": variant,
            }
            self._store.put("tags", self._arn(name), tags_of(request))
            self._record(endpoint, "Creating")
        self._later(self._launch, name)
        return {"EndpointArn": self._arn(name)}

    def describe_endpoint(self, request: Json) -> Json:
        """Return an endpoint with the numbers of its instances."""
        return self._description(self.get(request["EndpointName"]))

    def list_endpoints(self, request: Json) -> Json:
        """Return summaries, filtered and paged."""
        wanted = [
            endpoint
            for endpoint in self._store.all("endpoint")
            if request.get("StatusEquals", endpoint["EndpointStatus"]) == endpoint["EndpointStatus"]
        ]
        result = page(wanted, request, "EndpointName", "EndpointStatus")
        result["Endpoints"] = [fitting("EndpointSummary", endpoint) for endpoint in result.pop("items")]
        return result

    def delete_endpoint(self, request: Json) -> Json:
        """Delete an endpoint. Its inference components stay, without instances, and keep their names.

        Two reports differ: components outlive their endpoint (https://github.com/huggingface/skills), or SageMaker refuses
        ("Cannot delete endpoint with inference component associated", https://github.com/gruntwork-io/cloud-nuke/pull/1142).
        Whoever deletes the components first is right in both cases.
        """
        name = request["EndpointName"]
        with self._store.transaction():
            endpoint = self.get(name)
            if endpoint["EndpointStatus"] not in ("InService", "Failed"):
                raise ServiceError("ValidationException", f'Cannot update in-progress endpoint "{endpoint["EndpointArn"]}".')
            self._record(endpoint, "Deleting")
        self._later(self._remove, name)
        return {}

    # ------------------------------------------------------------------------------------------------ for components

    def get(self, name: str) -> Json:
        """Return an endpoint's record. Raises ServiceError."""
        if endpoint := self._store.get("endpoint", name):
            return endpoint
        raise could_not_find("endpoint", self._arn(name))

    def in_service(self, name: str) -> bool:
        """Return whether an endpoint has instances for its components."""
        endpoint = self._store.get("endpoint", name)
        return endpoint is not None and endpoint["EndpointStatus"] == "InService"

    def services_of(self, name: str) -> Services:
        """Return the services with the credentials of an endpoint's role. Raises ServiceError."""
        role = self.get(name)["ExecutionRoleArn"]
        if role not in self._assumed:
            self._assumed[role] = self._services.assume(role)
        return self._assumed[role]

    def check_room(self, component: Json, copies: int) -> None:
        """Raise JobError unless the endpoint's instances can hold `copies` of a component beside the others' copies."""
        endpoint = self.get(component["EndpointName"])
        others = [
            item
            for item in self._components(endpoint["EndpointName"])
            if item["InferenceComponentName"] != component["InferenceComponentName"]
        ]
        needed = _needed_instances(endpoint["Variant"], [*others, component | {"DesiredCopyCount": copies}])
        if needed > _instance_limits(endpoint["Variant"])[1]:
            raise JobError(NO_ROOM)

    # --------------------------------------------------------------------------------------------------- lifecycle

    def resume(self) -> None:
        """Go on with what an earlier emulator began."""
        for endpoint in self._store.all("endpoint"):
            step = {"Creating": self._launch, "Deleting": self._remove}.get(endpoint["EndpointStatus"])
            if step:
                self._later(step, endpoint["EndpointName"])

    def _later(self, step: Callable[[str], None], name: str) -> None:
        threading.Thread(target=step, args=(name,), name=name, daemon=True).start()

    def _launch(self, name: str) -> None:
        with self._store.transaction():
            endpoint = self.get(name)
            if endpoint["Variant"]["InstanceType"] in self._without_capacity:
                self._record(endpoint | {"FailureReason": NO_CAPACITY}, "Failed")
            else:
                self._record(endpoint, "InService")

    def _remove(self, name: str) -> None:
        self.on_delete(name)
        with self._store.transaction():
            self._store.delete("endpoint", name)
            self._store.delete("tags", self._arn(name))

    def _check_quota(self, variant: Json) -> None:
        kind = variant["InstanceType"]
        others = [endpoint["Variant"] for endpoint in self._store.all("endpoint")]
        used = sum(other["InitialInstanceCount"] for other in others if other["InstanceType"] == kind)
        quota = f"{kind} for endpoint usage"
        check_quota(quota, used, variant["InitialInstanceCount"], self._quotas.get(quota, self._max_instances))

    def _components(self, name: str) -> list[Json]:
        return [item for item in self._store.all("component") if item["EndpointName"] == name]

    def _record(self, endpoint: Json, status: str) -> None:
        endpoint = endpoint | {"EndpointStatus": status, "LastModifiedTime": time.time()}
        self._store.put("endpoint", endpoint["EndpointName"], endpoint)
        tags = self._store.get("tags", endpoint["EndpointArn"]) or {}
        self._store.enqueue(endpoint_event(self._description(endpoint), tags))
        logger.info("endpoint %s: %s %s", endpoint["EndpointName"], status, endpoint.get("FailureReason", ""))

    def _description(self, endpoint: Json) -> Json:
        variant = endpoint["Variant"]
        least, most = _instance_limits(variant)
        needed = _needed_instances(variant, self._components(endpoint["EndpointName"]))
        count = min(most, max(least, needed)) if endpoint["EndpointStatus"] == "InService" else 0
        desired = count if endpoint["EndpointStatus"] == "InService" else variant["InitialInstanceCount"]
        summary = fitting("ProductionVariantSummary", variant) | {
            "CurrentWeight": variant.get("InitialVariantWeight", 1.0),
            "DesiredWeight": variant.get("InitialVariantWeight", 1.0),
            "CurrentInstanceCount": count,
            "DesiredInstanceCount": desired,
        }
        return fitting("DescribeEndpointOutput", endpoint) | {"ProductionVariants": [summary]}

    def _arn(self, name: str) -> str:
        return f"{self._arn_prefix}:endpoint/{name}"


def _instance_limits(variant: Json) -> tuple[int, int]:
    """Return the fewest and the most instances of a variant. Without managed scaling, both are its initial number."""
    scaling: Json = variant.get("ManagedInstanceScaling", {})
    count = int(variant["InitialInstanceCount"])
    if scaling.get("Status") != "ENABLED":
        return count, count
    return int(scaling.get("MinInstanceCount", 1)), int(scaling.get("MaxInstanceCount", count))


def _needed_instances(variant: Json, components: list[Json]) -> int:
    """Return how many instances the copies of components need by their accelerators; with a CPU instance, one for each."""
    per_instance = gpus(variant["InstanceType"]) or 1
    accelerators = sum(
        component["DesiredCopyCount"]
        * component["Specification"]["ComputeResourceRequirements"].get("NumberOfAcceleratorDevicesRequired", 1)
        for component in components
        if "ComputeResourceRequirements" in component["Specification"]  # an adapter uses its base's
    )
    return math.ceil(float(accelerators) / per_instance)
