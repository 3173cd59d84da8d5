"""Inference components: their operations, their records, and which server process a request goes to.

A record has the members of DescribeInferenceComponent, and `DesiredCopyCount`, `Version` (the number of the version that
serves) and, during an update, `Update` (what it changes). `deployments` makes real what the records say: one thread for
each component.
"""

from __future__ import annotations

import logging
import time

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, fitting, page
from local_app.sagemaker.artifacts import check_adapter
from local_app.sagemaker.component_requests import (
    base_of,
    check_new,
    check_settled,
    check_update,
    description,
    is_adapter,
)
from local_app.sagemaker.deployments import Deployments, record
from local_app.sagemaker.endpoints import Endpoints
from local_app.sagemaker.hosting import Lease
from local_app.sagemaker.metrics import Metrics
from local_app.sagemaker.models import Models, already_exists, could_not_find, tags_of
from local_app.sagemaker.store import Store

logger = logging.getLogger(__name__)


class InferenceComponents:
    """The inference components of one account and region."""

    def __init__(
        self,
        store: Store,
        endpoints: Endpoints,
        models: Models,
        deployments: Deployments,
        metrics: Metrics,
        arn_prefix: str,
    ) -> None:
        self._store, self._endpoints, self._models = store, endpoints, models
        self._deployments, self._metrics, self._arn_prefix = deployments, metrics, arn_prefix

    # -------------------------------------------------------------------------------------------------- operations

    def create_inference_component(self, request: Json) -> Json:
        """Check and store a component, and begin to start it. Returns at once, as AWS does."""
        name = request["InferenceComponentName"]
        endpoint = self._endpoints.get(request["EndpointName"])
        check_new(request, endpoint["Variant"])
        self._check_artifacts(request["Specification"], endpoint["EndpointName"])
        with self._store.transaction():
            if self._store.get("component", name):
                raise already_exists("inference component", self._arn(name))
            if not self._endpoints.in_service(endpoint["EndpointName"]):
                status = self._endpoints.get(endpoint["EndpointName"])["EndpointStatus"]
                raise ServiceError(
                    "ValidationException",
                    f'Cannot create an inference component on endpoint "{endpoint["EndpointArn"]}" in status {status}.',
                )
            if is_adapter(request):
                self._check_base(request)
            component = fitting("DescribeInferenceComponentOutput", request) | {
                "InferenceComponentArn": self._arn(name),
                "EndpointArn": endpoint["EndpointArn"],
                "VariantName": endpoint["Variant"]["VariantName"],
                "CreationTime": time.time(),
                "DesiredCopyCount": request.get("RuntimeConfig", {}).get("CopyCount", 0),
                "Version": 1,
            }
            self._store.put("tags", self._arn(name), tags_of(request))
            record(self._store, component, "Creating")
        self._deployments.add(name)
        return {"InferenceComponentArn": self._arn(name)}

    def describe_inference_component(self, request: Json) -> Json:
        """Return a component with the numbers of its copies."""
        component = self.get(request["InferenceComponentName"])
        return description(component, self._deployments.ready_copies(component["InferenceComponentName"]))

    def list_inference_components(self, request: Json) -> Json:
        """Return summaries, filtered and paged."""
        filters = {
            "EndpointName": "EndpointNameEquals",
            "VariantName": "VariantNameEquals",
            "InferenceComponentStatus": "StatusEquals",
        }
        wanted = [
            component
            for component in self._store.all("component")
            if all(request.get(parameter, component[member]) == component[member] for member, parameter in filters.items())
        ]
        result = page(wanted, request, "InferenceComponentName", "InferenceComponentStatus")
        result["InferenceComponents"] = [
            fitting("InferenceComponentSummary", component) for component in result.pop("items")
        ]
        return result

    def update_inference_component(self, request: Json) -> Json:
        """Begin to replace the given parts of a component's specification, to change its number of copies, or both."""
        component = self.get(request["InferenceComponentName"])
        check_update(request, component)
        specification = component["Specification"] | request.get("Specification", {})
        if "Specification" in request:
            self._check_artifacts(specification, component["EndpointName"])
            update: Json = {"Specification": specification, "DeploymentConfig": request.get("DeploymentConfig", {})}
        else:
            update = {}
        return self._begin_update(component, update, request.get("RuntimeConfig"))

    def update_inference_component_runtime_config(self, request: Json) -> Json:
        """Begin to change a component's number of copies."""
        component = self.get(request["InferenceComponentName"])
        if is_adapter(component):
            raise ServiceError("ValidationException", "An adapter inference component has the copies of its base.")
        return self._begin_update(component, {}, request["DesiredRuntimeConfig"])

    def delete_inference_component(self, request: Json) -> Json:
        """Begin to delete a component. A base goes after its adapters, and nothing goes while it changes."""
        name = request["InferenceComponentName"]
        with self._store.transaction():
            component = self.get(name)
            check_settled(component, "delete")
            adapters = [item for item in self._store.all("component") if is_adapter(item) and base_of(item) == name]
            if adapters:
                raise ServiceError(
                    "ValidationException",
                    f'Cannot delete inference component "{component["InferenceComponentArn"]}": it is a base inference '
                    "component for one or more associated adapter inference components.",
                )
            record(self._store, component, "Deleting")
        self._deployments.wake(name)
        return {}

    # ------------------------------------------------------------------------------------------------- for requests

    def lease(self, endpoint_name: str, name: str | None) -> tuple[Lease, Json]:
        """Return a server process for one request, which the caller releases, and the component's record.

        Raises ServiceError, in AWS's words.
        """
        account = self._arn_prefix.split(":")[4]
        if not self._endpoints.in_service(endpoint_name):
            raise ServiceError("ValidationError", f"Endpoint {endpoint_name} of account {account} not found.")
        if not name:
            raise ServiceError(
                "ValidationError",
                "Inference Component Name header is required for endpoints to which you plan to deploy inference "
                "components. Please include Inference Component Name header or consider using SageMaker models.",
            )
        component = self._store.get("component", name)
        if component is None or component["EndpointName"] != endpoint_name:
            raise ServiceError("ValidationError", f"Inference Component {name} of account {account} not found.")
        if component["InferenceComponentStatus"] not in ("InService", "Updating"):
            raise ServiceError(
                "ValidationError", f"Inference Component {name} is in status {component['InferenceComponentStatus']}."
            )
        lease = self._deployments.lease(name)
        if lease is not None:
            return lease, component
        if self._deployments.is_restarting(name):
            for metric in ("Invocations", "Invocation5XXErrors"):
                self._metrics.add(metric, self.dimensions(component), 1)
            raise ServiceError("ServiceUnavailable", "The container of the inference component is not available.", 503)
        self._metrics.add("NoCapacityInvocationFailures", self.dimensions(component), 1)
        raise ServiceError(
            "ValidationError",
            "Inference Component has no capacity to process this request. ApplicationAutoScaling may be in-progress (if "
            "configured) or try to increase the capacity by invoking UpdateInferenceComponentRuntimeConfig API.",
        )

    def dimensions(self, component: Json) -> list[dict[str, str]]:
        """Return the dimensions under which a component's metrics are published.

        Assumption: a request to an adapter counts for its base as well, whose compute it uses.
        """
        names = [component["InferenceComponentName"], *([base_of(component)] if is_adapter(component) else [])]
        variant = {"EndpointName": component["EndpointName"], "VariantName": component["VariantName"]}
        return [*({"InferenceComponentName": name} for name in names), variant]

    def get(self, name: str) -> Json:
        """Return a component's record. Raises ServiceError."""
        if component := self._store.get("component", name):
            return component
        raise could_not_find("inference component", self._arn(name))

    def counts(self) -> dict[str, int]:
        """Return the number of components in each status."""
        result: dict[str, int] = {}
        for component in self._store.all("component"):
            status = component["InferenceComponentStatus"]
            result[status] = result.get(status, 0) + 1
        return result

    # ------------------------------------------------------------------------------------------------------ checks

    def _check_artifacts(self, specification: Json, endpoint_name: str) -> None:
        """Raise ServiceError unless the model, or the adapter's archive, exists."""
        if "ModelName" in specification:
            self._models.describe_model(specification)
        else:
            check_adapter(self._endpoints.services_of(endpoint_name), specification["Container"]["ArtifactUrl"])

    def _check_base(self, request: Json) -> None:
        """Raise ServiceError unless the base serves on the same endpoint.

        "Before you can create an adapter inference component, you must have an existing inference component that contains
        the foundation model that you want to adapt"
        (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_InferenceComponentSpecification.html).
        """
        base = self.get(base_of(request))
        if is_adapter(base) or base["EndpointName"] != request["EndpointName"]:
            raise ServiceError(
                "ValidationException",
                f'"{base["InferenceComponentArn"]}" is no base inference component on endpoint {request["EndpointName"]}.',
            )
        if base["InferenceComponentStatus"] not in ("InService", "Updating"):
            raise ServiceError(
                "ValidationException",
                f'The base inference component "{base["InferenceComponentArn"]}" is in status '
                f"{base['InferenceComponentStatus']}.",
            )

    def _begin_update(self, component: Json, update: Json, runtime: Json | None) -> Json:
        name = component["InferenceComponentName"]
        with self._store.transaction():
            component = self.get(name)
            check_settled(component, "update")
            if component["InferenceComponentStatus"] == "Failed":
                # Assumption: what never served is deleted and created again.
                raise ServiceError(
                    "ValidationException",
                    f'Cannot update inference component "{component["InferenceComponentArn"]}" in status Failed.',
                )
            update["FormerCopyCount"] = component["DesiredCopyCount"]
            component |= {"Update": update} | ({"DesiredCopyCount": runtime["CopyCount"]} if runtime else {})
            component.pop("FailureReason", None)
            record(self._store, component, "Updating")
        self._deployments.wake(name)
        return {"InferenceComponentArn": component["InferenceComponentArn"]}

    def _arn(self, name: str) -> str:
        return f"{self._arn_prefix}:inference-component/{name}"
