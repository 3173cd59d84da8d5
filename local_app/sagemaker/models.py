"""Models and endpoint configurations: what endpoints and inference components are made of."""

from __future__ import annotations

import time

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, fitting, not_found
from local_app.sagemaker.artifacts import check_model_data
from local_app.sagemaker.job_requests import image_rules
from local_app.sagemaker.registry import ModelRegistry
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store

HERE = "The local SageMaker emulator serves"


class Models:
    """The models and endpoint configurations of one account and region."""

    def __init__(self, store: Store, services: Services, registry: ModelRegistry, arn_prefix: str) -> None:
        self._store, self._services, self._registry, self._arn_prefix = store, services, registry, arn_prefix

    # ------------------------------------------------------------------------------------------------------ models

    def create_model(self, request: Json) -> Json:
        """Create a model of one container; its name must be new, and its files must exist."""
        refuse(_model_rules(request, self._services.region))
        if "ExecutionRoleArn" in request:
            self._services.check_role(request["ExecutionRoleArn"])
        if uri := self.source(request):
            role = request.get("ExecutionRoleArn")
            check_model_data(self._services.assume(role) if role else self._services, uri)
        record = fitting("DescribeModelOutput", request) | {"EnableNetworkIsolation": False}
        return {"ModelArn": self._create("model", "model", request["ModelName"], record, request)}

    def describe_model(self, request: Json) -> Json:
        """Return a model."""
        return self._get("model", "model", request["ModelName"])

    def delete_model(self, request: Json) -> Json:
        """Delete a model, also one that a component uses: "deletes only the model entry" (DeleteModel)."""
        return self._delete("model", "model", request["ModelName"])

    def source(self, model: Json) -> str | None:
        """Return the S3 prefix of a model's files, its own or its package's. Raises ServiceError."""
        container = model["PrimaryContainer"]
        if package := container.get("ModelPackageName"):
            description = self._registry.describe_model_package({"ModelPackageName": package})
            [container] = description["InferenceSpecification"]["Containers"]
        source: str | None = container.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri")
        return source

    def environment(self, model: Json) -> dict[str, str]:
        """Return the variables of a model's container: its package's, and its own instead of those."""
        container = model["PrimaryContainer"]
        environment: dict[str, str] = {}
        if package := container.get("ModelPackageName"):
            description = self._registry.describe_model_package({"ModelPackageName": package})
            environment = description["InferenceSpecification"]["Containers"][0].get("Environment", {})
        environment |= container.get("Environment", {})
        return environment

    # ------------------------------------------------------------------------------------- endpoint configurations

    def create_endpoint_config(self, request: Json) -> Json:
        """Create an endpoint configuration with one variant for inference components; its name must be new."""
        refuse(_config_rules(request))
        self._services.check_role(request["ExecutionRoleArn"])
        record = fitting("DescribeEndpointConfigOutput", request) | {"EnableNetworkIsolation": False}
        name = request["EndpointConfigName"]
        return {"EndpointConfigArn": self._create("endpoint-config", "endpoint configuration", name, record, request)}

    def describe_endpoint_config(self, request: Json) -> Json:
        """Return an endpoint configuration."""
        return self._get("endpoint-config", "endpoint configuration", request["EndpointConfigName"])

    def delete_endpoint_config(self, request: Json) -> Json:
        """Delete an endpoint configuration. "It does not delete endpoints created using the configuration"."""
        return self._delete("endpoint-config", "endpoint configuration", request["EndpointConfigName"])

    # ------------------------------------------------------------------------------------------------------- store

    def _create(self, kind: str, words: str, name: str, record: Json, request: Json) -> str:
        arn = f"{self._arn_prefix}:{kind}/{name}"
        with self._store.transaction():
            if self._store.get(kind, name):
                raise already_exists(words, arn)
            member = "ModelArn" if kind == "model" else "EndpointConfigArn"
            self._store.put(kind, name, record | {member: arn, "CreationTime": time.time()})
            self._store.put("tags", arn, tags_of(request))
        return arn

    def _get(self, kind: str, words: str, name: str) -> Json:
        if record := self._store.get(kind, name):
            return record
        raise could_not_find(words, f"{self._arn_prefix}:{kind}/{name}")

    def _delete(self, kind: str, words: str, name: str) -> Json:
        with self._store.transaction():
            self._get(kind, words, name)
            self._store.delete(kind, name)
            self._store.delete("tags", f"{self._arn_prefix}:{kind}/{name}")
        return {}


def already_exists(words: str, arn: str) -> ServiceError:
    """Return SageMaker's error for a name that is taken."""
    return ServiceError("ValidationException", f'Cannot create already existing {words} "{arn}".')


def could_not_find(words: str, arn: str) -> ServiceError:
    """Return SageMaker's error for an unknown name."""
    return not_found(f'Could not find {words} "{arn}".')


def tags_of(request: Json) -> dict[str, str]:
    """Return a request's tags by their keys."""
    return {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}


def refuse(rules: list[tuple[bool, str]]) -> None:
    """Raise ServiceError for the first rule that is broken."""
    for broken, message in rules:
        if broken:
            raise ServiceError("ValidationException", message)


def _model_rules(request: Json, region: str) -> list[tuple[bool, str]]:
    """Return AWS's rules for CreateModel, and what the emulator lacks.

    https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ContainerDefinition.html
    """
    container = request.get("PrimaryContainer", {})
    source = container.get("ModelDataSource", {}).get("S3DataSource", {})
    environment = container.get("Environment", {})
    longest = max((len(text.encode()) for pair in environment.items() for text in pair), default=0)
    package = "ModelPackageName" in container
    return [
        (not container, f"{HERE} models with a PrimaryContainer"),
        (package == ("Image" in container), "You must specify either an Image or a ModelPackageName in PrimaryContainer."),
        (package and bool(source), "ModelDataSource is the model package's: it cannot be specified with ModelPackageName."),
        *image_rules(container.get("Image"), region),
        ("ModelDataUrl" in container, f"{HERE} models with a ModelDataSource, not with a ModelDataUrl"),
        (
            bool(source) and (source["S3DataType"], source["CompressionType"]) != ("S3Prefix", "None"),
            f"{HERE} a ModelDataSource of S3DataType S3Prefix and CompressionType None",
        ),
        (bool(source) and not source["S3Uri"].endswith("/"), "An S3Uri of S3DataType S3Prefix must end with a slash."),
        (longest > 1024, "The maximum length of each key and value in the Environment map is 1024 bytes."),
        (request.get("EnableNetworkIsolation", False), f"{HERE} models without EnableNetworkIsolation"),
    ]


def _config_rules(request: Json) -> list[tuple[bool, str]]:
    """Return AWS's rules for an endpoint configuration for inference components, and what the emulator lacks.

    https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-deploy-models.html
    """
    [variant, *others] = request["ProductionVariants"]
    scaling = variant.get("ManagedInstanceScaling", {})
    most, least = scaling.get("MaxInstanceCount"), scaling.get("MinInstanceCount", 1)
    count = variant.get("InitialInstanceCount", 0)
    lacking = {"ServerlessConfig", "InstancePools", "CapacityReservationConfig", "AcceleratorType"} & variant.keys()
    lacking |= {"AsyncInferenceConfig", "ShadowProductionVariants", "ExplainerConfig", "DataCaptureConfig"} & request.keys()
    return [
        (bool(others), f"{HERE} endpoint configurations with one variant"),
        (bool(lacking), f"{HERE} endpoint configurations without {', '.join(sorted(lacking))}"),
        ("ModelName" in variant, f"{HERE} inference components: leave out the variant's ModelName"),
        (
            "ExecutionRoleArn" not in request,
            "ExecutionRoleArn is required in an endpoint configuration whose variant has no ModelName.",
        ),
        ("InstanceType" not in variant, "A production variant must have an InstanceType."),
        (count < 1, "A production variant must have an InitialInstanceCount of at least 1."),
        (
            most is not None and not least <= count <= most,
            "InitialInstanceCount must be between MinInstanceCount and MaxInstanceCount of ManagedInstanceScaling.",
        ),
    ]
