"""One account's SageMaker and Bedrock in one region: dispatches API operations, and delivers the events of what changes."""

from __future__ import annotations

import fcntl
import logging
import math
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from botocore import xform_name

from local_app.common import ACCOUNT, REGION, Json
from local_app.sagemaker import bedrock_runtime, imports, rest, scaling
from local_app.sagemaker.alarms import Alarms
from local_app.sagemaker.api import ServiceError, validate_request
from local_app.sagemaker.components import InferenceComponents
from local_app.sagemaker.deployments import Deployments
from local_app.sagemaker.endpoints import Endpoints
from local_app.sagemaker.imported_models import ImportedModels
from local_app.sagemaker.jobs import TrainingJobs
from local_app.sagemaker.metrics import Metrics
from local_app.sagemaker.models import Models
from local_app.sagemaker.passing import Containers
from local_app.sagemaker.registry import ModelRegistry
from local_app.sagemaker.runtime import Runtime
from local_app.sagemaker.sandbox import StartupError
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store

logger = logging.getLogger(__name__)

TRAINING_OPERATIONS = ("CreateTrainingJob", "DescribeTrainingJob", "ListTrainingJobs", "StopTrainingJob")
REGISTRY_OPERATIONS = (
    *("CreateModelPackageGroup", "DescribeModelPackageGroup", "ListModelPackageGroups", "DeleteModelPackageGroup"),
    *("CreateModelPackage", "DescribeModelPackage", "ListModelPackages", "UpdateModelPackage", "DeleteModelPackage"),
)
MODEL_OPERATIONS = tuple(
    f"{verb}{what}" for what in ("Model", "EndpointConfig") for verb in ("Create", "Describe", "Delete")
)
ENDPOINT_OPERATIONS = ("CreateEndpoint", "DescribeEndpoint", "ListEndpoints", "DeleteEndpoint")
COMPONENT_OPERATIONS = (
    *("CreateInferenceComponent", "DescribeInferenceComponent", "ListInferenceComponents", "DeleteInferenceComponent"),
    *("UpdateInferenceComponent", "UpdateInferenceComponentRuntimeConfig"),
)
TAG_OPERATIONS = ("AddTags", "ListTags", "DeleteTags")
OPERATIONS = (
    *(*TRAINING_OPERATIONS, *REGISTRY_OPERATIONS, *MODEL_OPERATIONS, *ENDPOINT_OPERATIONS, *COMPONENT_OPERATIONS),
    *TAG_OPERATIONS,
)
# Bedrock's operations here, by botocore's names of the services.
BEDROCK_OPERATIONS = {
    "bedrock": (*imports.JOB_OPERATIONS, *imports.MODEL_OPERATIONS),
    "bedrock-runtime": bedrock_runtime.OPERATIONS,
}
MOST_TAGS = 50  # of one resource
SERVER = (sys.executable, "-m", "local_app.serving")


class SageMakerEmulator:
    """SageMaker, and Bedrock's Custom Model Import, with their state in `state_dir`, which one emulator at a time may use.

    Raises StartupError.

    `endpoint_url` serves S3, CloudWatch and its Logs of the same account (credentials from boto3's usual places).
    `on_state_change` gets every event "SageMaker Training Job State Change", "SageMaker Model Package State Change" and
    "SageMaker Endpoint State Change" in order. While it raises, the event is kept and delivered again, also after a
    restart: at least once, as on AWS. Jobs do not see the folder `private`. `server_command` starts the server of an
    inference component's copy, and `startup_limit` is the longest, in seconds, to wait until it is healthy. It also starts
    the server of an imported model, which ends `idle_seconds` after the last request; on AWS, these are five minutes
    (https://docs.aws.amazon.com/bedrock/latest/userguide/import-model-calculate-cost.html). The alarms are looked at every
    `alarm_interval` seconds.
    """

    def __init__(
        self,
        state_dir: Path,
        endpoint_url: str,
        *,
        on_state_change: Callable[[Json], object],
        max_instances: int = 4,
        quotas: Mapping[str, int] = MappingProxyType({}),
        without_capacity: Collection[str] = (),
        grace: float = 120,
        checkpoint_interval: float = 5,
        private: Path | None = None,
        server_command: Sequence[str] = SERVER,
        startup_limit: float = math.inf,
        alarm_interval: float = 2,
        idle_seconds: float = 300,
        region: str = REGION,
        account: str = ACCOUNT,
    ) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        (state_dir / "jobs").mkdir(exist_ok=True)
        self._guard = (state_dir / "lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"Another SageMaker emulator uses {state_dir}: end it, or choose another folder") from error
        self._store = Store(state_dir / "state.sqlite")
        self.arn_prefix = arn_prefix = f"arn:aws:sagemaker:{region}:{account}"
        services = Services(endpoint_url, region)
        self._training = TrainingJobs(
            self._store,
            state_dir / "jobs",
            services,
            arn_prefix,
            max_instances=max_instances,
            quotas=quotas,
            without_capacity=without_capacity,
            grace=grace,
            checkpoint_interval=checkpoint_interval,
            private=private,
        )
        self._registry = ModelRegistry(self._store, arn_prefix)
        self._models = Models(self._store, services, self._registry, arn_prefix)
        limits: dict[str, Any] = {"max_instances": max_instances, "quotas": quotas, "without_capacity": without_capacity}
        self._endpoints = Endpoints(self._store, services, self._models, arn_prefix, **limits)
        self._deployments = Deployments(
            self._store,
            state_dir / "components",
            self._endpoints,
            self._models,
            command=server_command,
            startup_limit=startup_limit,
        )
        self._endpoints.on_delete = self._deployments.end_processes
        self.metrics, self.bedrock_metrics = Metrics(), Metrics("AWS/Bedrock")
        self._components = InferenceComponents(
            self._store, self._endpoints, self._models, self._deployments, self.metrics, arn_prefix
        )
        containers = Containers()
        self.runtime = Runtime(self._components, containers, self.metrics)
        self.bedrock_prefix = f"arn:aws:bedrock:{region}:{account}"
        self.imported_models = ImportedModels(self._store, state_dir / "imported", server_command, idle_seconds)
        self._imports = imports.ModelImports(self._store, self.imported_models, services, self.bedrock_prefix)
        self.bedrock_runtime = bedrock_runtime.BedrockRuntime(self.imported_models, containers, self.bedrock_metrics)
        self._scaling = scaling.Scaling(self._store, services, self._components, arn_prefix)
        self._alarms = Alarms(
            lambda: services.cloudwatch,
            self.metrics,
            lambda: self._deployments.measure(self.metrics),
            self._scaling.carry_out,
            alarm_interval,
            [self.bedrock_metrics],
        )
        self._on_state_change = on_state_change
        self._closed = threading.Event()
        self._outbox = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._outbox.start()
        self._training.resume()
        self._endpoints.resume()
        self._deployments.resume()
        self._imports.resume()
        self._alarms.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and release the state. What is open continues in the next emulator of the folder."""
        self._alarms.close()
        self._imports.close()
        self.imported_models.close()
        self._deployments.close()
        self._training.close()
        self._closed.set()
        self._store.changed.set()
        self._outbox.join(5)
        self._store.close()
        self._guard.close()

    def call(self, operation: str, request: Json, service: str = "sagemaker") -> Json:
        """Perform one API operation (named as in the API reference) of SageMaker or application-autoscaling.

        Raises ServiceError.
        """
        operations = OPERATIONS if service == "sagemaker" else scaling.OPERATIONS
        if operation not in operations:
            raise ServiceError(
                "UnknownOperationException",
                f"The local SageMaker emulator has no operation {operation}. It has: {', '.join(operations)}.",
            )
        validate_request(operation, request, service)
        if operation in TAG_OPERATIONS:
            return self._tags(operation, request)
        owners: dict[Any, Sequence[str]] = {
            self._training: TRAINING_OPERATIONS,
            self._registry: REGISTRY_OPERATIONS,
            self._models: MODEL_OPERATIONS,
            self._endpoints: ENDPOINT_OPERATIONS,
            self._components: COMPONENT_OPERATIONS,
            self._scaling: scaling.OPERATIONS,
        }
        owner = next(owner for owner, theirs in owners.items() if operation in theirs)
        result: Json = getattr(owner, xform_name(operation))(request)
        return result

    def call_bedrock(self, call: rest.Call) -> Json:
        """Perform one API operation of Bedrock. Raises ServiceError."""
        owner: Any = self._imports if call.operation.name in imports.JOB_OPERATIONS else self.imported_models
        result: Json = getattr(owner, xform_name(call.operation.name))(call.parameters)
        return result

    def interrupt(self, job_name: str) -> None:
        """Interrupt a running spot job: SIGTERM, grace time, then the same job again with its checkpoints."""
        self._training.interrupt(job_name)

    def health(self) -> Json:
        """Return the numbers of jobs and of inference components by status, and the number of events still to deliver."""
        return {
            "status": "ok",
            "jobs": self._training.counts(),
            "inference_components": self._components.counts(),
            "undelivered_events": self._store.undelivered(),
        }

    def _tags(self, operation: str, request: Json) -> Json:
        arn = request["ResourceArn"]
        with self._store.transaction():
            tags = self._store.get("tags", arn)
            if tags is None:
                raise ServiceError("ValidationException", f"Requested resource {arn} not found.")
            for tag in request.get("Tags", []):
                tags[tag["Key"]] = tag["Value"]
            for key in request.get("TagKeys", []):
                tags.pop(key, None)
            if len(tags) > MOST_TAGS:
                raise ServiceError("ResourceLimitExceeded", f"{arn} would have {len(tags)} tags; the limit is {MOST_TAGS}.")
            if operation != "ListTags":
                self._store.put("tags", arn, tags)
        return {} if operation == "DeleteTags" else {"Tags": [{"Key": key, "Value": tags[key]} for key in tags]}

    def _deliver(self) -> None:
        """Pass the events to `on_state_change`, oldest first, until the emulator is closed."""
        pause = 0.1
        while not self._closed.is_set():
            self._store.changed.clear()
            item = self._store.oldest_event()
            if item is None:
                self._store.changed.wait()
                continue
            number, event = item
            try:
                self._on_state_change(event)
            except Exception as error:  # noqa: BLE001 - the event is kept, whatever error the receiver has
                logger.warning("event %s is not delivered, next try in %.1f s: %s", event["id"], pause, error)
                self._closed.wait(pause)
                pause = min(2 * pause, 10)
            else:
                self._store.delivered(number)
                pause = 0.1
