"""Makes real what the records of inference components say.

One thread for each component starts, updates and ends its servers.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from local_app.common import Json
from local_app.sagemaker.api import JobError, ServiceError
from local_app.sagemaker.artifacts import ENVIRONMENT, fetch_adapter, fetch_model
from local_app.sagemaker.component_requests import base_of, is_adapter
from local_app.sagemaker.copies import Closed, Container
from local_app.sagemaker.endpoints import Endpoints
from local_app.sagemaker.hosting import Host, Lease, watch
from local_app.sagemaker.metrics import Metrics
from local_app.sagemaker.models import Models
from local_app.sagemaker.services import AWS_ERRORS
from local_app.sagemaker.store import Store

logger = logging.getLogger(__name__)

MODEL_FOLDER = "/opt/ml/model"  # where a container has its model's files
RETRY_SECONDS = 5.0
# CloudWatch's periods are whole minutes: what has just come has not been idle for one.
FIRST_MINUTE = 60.0
STARTUP_SECONDS = 600  # without a ContainerStartupHealthCheckTimeoutInSeconds


def record(store: Store, component: Json, status: str) -> None:
    """Write a component's record with a status (inside a transaction)."""
    component = component | {"InferenceComponentStatus": status, "LastModifiedTime": time.time()}
    store.put("component", component["InferenceComponentName"], component)
    logger.info("component %s: %s %s", component["InferenceComponentName"], status, component.get("FailureReason", ""))


def adapter_name(component: Json) -> str:
    """Return an adapter's name in the servers, which is another for each version; "" for a component with a model."""
    return f"{component['InferenceComponentName']}-{component['Version']}" if is_adapter(component) else ""


class Deployments:
    """The servers of all components.

    `command` starts one server; `startup_limit` is the longest, in seconds, to wait until it is healthy.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        endpoints: Endpoints,
        models: Models,
        *,
        command: Sequence[str],
        startup_limit: float,
    ) -> None:
        self._store, self._folder, self._endpoints, self._models = store, folder, endpoints, models
        self._command, self._startup_limit = command, startup_limit
        self._hosts: dict[str, Host] = {}  # of the components with a model
        self._ready_since: dict[str, float] = {}
        self._wakes: dict[str, threading.Event] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._switch = threading.Lock()  # taken before the store's: no request sees a component change its adapter
        self._closing = threading.Event()

    def add(self, name: str) -> None:
        """Begin to look after a component."""
        self._prepare(name)
        self._threads[name] = threading.Thread(target=self._drive, args=(name,), name=name, daemon=True)
        self._threads[name].start()

    def wake(self, name: str) -> None:
        """Look at a component's record again."""
        self._wakes[name].set()

    def lease(self, name: str) -> Lease | None:
        """Return a server process for a request to a component; None if no copy is ready. The caller releases it."""
        with self._switch:
            component = self._store.get("component", name)
            host = self._host(component) if component else None
            return host.lease(adapter_name(component)) if component and host else None

    def ready_copies(self, name: str) -> int:
        """Return the number of a component's copies that take requests."""
        return self._hosts[name].ready_copies if name in self._hosts else 0

    def is_restarting(self, name: str) -> bool:
        """Return whether a copy of a component, or of its base, has served before: its process is starting again."""
        component = self._store.get("component", name)
        host = self._host(component) if component else None
        return host is not None and host.served

    def measure(self, metrics: Metrics) -> None:
        """Record the open requests per copy of each component, from its first whole minute with copies on."""
        now = time.monotonic()
        for name, host in list(self._hosts.items()):
            copies = host.ready_copies
            if not copies:
                self._ready_since.pop(name, None)
            elif now - self._ready_since.setdefault(name, now) >= FIRST_MINUTE:
                metrics.add("ConcurrentRequestsPerCopy", [{"InferenceComponentName": name}], host.open_requests / copies)

    def end_processes(self, endpoint_name: str) -> None:
        """End the servers of an endpoint's components."""
        for component in self._store.all("component"):
            if component["EndpointName"] == endpoint_name and (host := self._hosts.get(component["InferenceComponentName"])):
                host.close(drain=0)

    def resume(self) -> None:
        """Start the servers of an earlier emulator again, and go on with what it began."""
        components = self._store.all("component")
        for component in components:
            self._prepare(component["InferenceComponentName"])
        for component in components:  # before their base's servers start: these load the adapters before they are ready
            served = is_adapter(component) and component["InferenceComponentStatus"] in ("InService", "Updating")
            if served and (host := self._host(component)):
                host.expect(adapter_name(component), self._version(component, component["Version"]))
        for component in components:
            self.add(component["InferenceComponentName"])

    def close(self) -> None:
        """End all processes. The records stay, and resume() starts the processes again."""
        self._closing.set()
        for wake in self._wakes.values():
            wake.set()
        ended = [event for host in self._hosts.values() for event in host.close(drain=0)]
        for event in ended:
            event.wait(10)
        for thread in list(self._threads.values()):
            thread.join(5)

    # --------------------------------------------------------------------------------------------------- lifecycle

    def _prepare(self, name: str) -> None:
        self._wakes.setdefault(name, threading.Event())
        component = self._store.get("component", name)
        if component and not is_adapter(component):
            self._hosts.setdefault(name, Host())

    def _drive(self, name: str) -> None:
        """Make real what a component's record says, again after each change, until the component is gone."""
        steps = {"Creating": self._create, "Updating": self._update, "Deleting": self._delete}
        pause: float | None = None
        while not self._closing.is_set() and (component := self._store.get("component", name)):
            self._wakes[name].clear()
            status = component["InferenceComponentStatus"]
            try:
                steps.get(status, self._serve)(component)
            except Closed:
                return
            except Exception:  # a server that cannot be started after a restart of the emulator
                logger.exception("component %s", name)
                pause = RETRY_SECONDS
            else:
                pause = None
                if status == "Deleting":
                    return
            self._wakes[name].wait(pause)

    def _create(self, component: Json) -> None:
        try:
            if is_adapter(component):
                self._load(component)
            else:
                self._endpoints.check_room(component, component["DesiredCopyCount"])
                host = self._hosts[component["InferenceComponentName"]]
                container = self._container(component, component["Specification"], component["Version"])
                host.start(container, component["DesiredCopyCount"]).wait(self._closing)
        except Exception as error:
            if isinstance(error, Closed):
                raise
            if not is_adapter(component):
                self._hosts[component["InferenceComponentName"]].close()
            self._settle(component | {"FailureReason": _reason(error)}, "Failed")
        else:
            self._settle(component, "InService")

    def _serve(self, component: Json) -> None:
        """Start the servers of a component that is in service, if they do not run: after a start of the emulator."""
        host = self._hosts.get(component["InferenceComponentName"])
        in_service = component["InferenceComponentStatus"] in ("InService", "Updating")
        if host and not host.is_running and in_service and self._endpoints.in_service(component["EndpointName"]):
            copies = component.get("Update", {}).get("FormerCopyCount", component["DesiredCopyCount"])
            host.start(self._container(component, component["Specification"], component["Version"]), copies)

    def _update(self, component: Json) -> None:
        """Update a component. If that fails, its former version serves on.

        Assumption: it is InService then, and its FailureReason says why the update failed.
        """
        update = component.pop("Update")
        following = component | {"Version": component["Version"] + 1, "Specification": update.get("Specification")}
        try:
            if is_adapter(component):
                self._load(following)
            else:
                self._change_copies(component, following, update)
        except Exception as error:
            if isinstance(error, Closed):
                raise
            former = {"FailureReason": _reason(error), "DesiredCopyCount": update["FormerCopyCount"]}
            self._settle(component | former, "InService")
        else:
            if "Specification" in update:
                deployment = {"LastDeploymentConfig": update["DeploymentConfig"]} if update["DeploymentConfig"] else {}
                self._settle(following | deployment, "InService")
            else:
                self._settle(component, "InService")
        self._forget_versions(component)

    def _change_copies(self, component: Json, following: Json, update: Json) -> None:
        """Change a component's number of copies, or replace its copies by those of another version."""
        copies, before = component["DesiredCopyCount"], update["FormerCopyCount"]
        self._endpoints.check_room(component, copies)
        self._serve(component | {"Update": update})
        host = self._hosts[component["InferenceComponentName"]]
        if "Specification" not in update:
            host.scale(copies, before, self._closing)
            return
        config = update["DeploymentConfig"]
        policy, names = config.get("RollingUpdatePolicy", {}), config.get("AutoRollbackConfiguration", {}).get("Alarms", [])
        container = self._container(component, following["Specification"], following["Version"])
        seconds = policy.get("WaitIntervalInSeconds", 0)
        host.roll(
            container,
            copies,
            before,
            policy,
            lambda: watch(lambda: self._ringing(component, names), seconds, self._closing),
            self._closing,
        )

    def _delete(self, component: Json) -> None:
        name, host = component["InferenceComponentName"], self._host(component)
        if is_adapter(component):
            if host:
                host.unload(adapter_name(component))
        else:
            for ended in self._hosts[name].close():
                while not ended.wait(1):
                    if self._closing.is_set():
                        raise Closed
        self._hosts.pop(name, None)
        shutil.rmtree(self._folder / name, ignore_errors=True)
        with self._store.transaction():
            self._store.delete("component", name)
            self._store.delete("tags", component["InferenceComponentArn"])

    def _forget_versions(self, component: Json) -> None:
        """Remove the files of versions that do not serve; an adapter's version also from the servers, after its requests."""
        name = component["InferenceComponentName"]
        served = self._store.get("component", name) or component
        for version in (component["Version"], component["Version"] + 1):
            if version != served["Version"]:
                if is_adapter(component) and (host := self._host(component)):
                    host.unload(adapter_name(component | {"Version": version}))
                shutil.rmtree(self._version(component, version), ignore_errors=True)

    def _settle(self, component: Json, status: str) -> None:
        """Enter a status that lasts. From now on, requests go to the record's version."""
        with self._switch, self._store.transaction():
            record(self._store, component, status)

    # ------------------------------------------------------------------------------------------------------- files

    def _load(self, component: Json) -> None:
        """Load an adapter's version into every copy of its base. Raises JobError."""
        host = self._host(component)
        if host is None:
            raise JobError(f"Could not find the base inference component {base_of(component)}")
        folder = self._version(component, component["Version"])
        s3 = self._endpoints.services_of(component["EndpointName"]).s3
        fetch_adapter(s3, component["Specification"]["Container"]["ArtifactUrl"], folder)
        host.load(adapter_name(component), folder)

    def _container(self, component: Json, specification: Json, version: int) -> Container:
        """Fetch a version's files, if they are not here yet, and return what its copies run. Raises JobError."""
        folder = self._version(component, version)
        if not folder.exists():
            model = self._models.describe_model(specification)
            environment, source = self._models.environment(model), self._models.source(model)
            is_local = environment.get("SM_VLLM_MODEL", MODEL_FOLDER) == MODEL_FOLDER
            if is_local and not source:
                raise JobError(
                    f"The model {specification['ModelName']} has no ModelDataSource, and no SM_VLLM_MODEL of the hub."
                )
            s3 = self._endpoints.services_of(component["EndpointName"]).s3
            fetch_model(s3, source if is_local else None, environment, folder, self._check_closing)
        environment = json.loads((folder / ENVIRONMENT).read_text())
        location = environment.get("SM_VLLM_MODEL", MODEL_FOLDER)
        startup = specification.get("StartupParameters", {}).get(
            "ContainerStartupHealthCheckTimeoutInSeconds", STARTUP_SECONDS
        )
        return Container(
            command=self._command,
            model=str(folder / "model") if location == MODEL_FOLDER else location,
            environment=environment,
            log=folder.parent / "server.log",
            startup_seconds=min(startup, self._startup_limit),
        )

    def _version(self, component: Json, version: int) -> Path:
        name: str = component["InferenceComponentName"]
        return self._folder / name / f"version-{version}"

    def _host(self, component: Json) -> Host | None:
        """Return the servers of a component with a model, or those of an adapter's base."""
        return self._hosts.get(base_of(component) if is_adapter(component) else component["InferenceComponentName"])

    def _ringing(self, component: Json, alarms: Sequence[Json]) -> list[str]:
        """Return those of the alarms that are in the state ALARM, as the endpoint's role sees them."""
        names = [alarm["AlarmName"] for alarm in alarms]
        if not names:
            return []
        try:
            cloudwatch = self._endpoints.services_of(component["EndpointName"]).cloudwatch
            found = cloudwatch.describe_alarms(AlarmNames=names, AlarmTypes=["MetricAlarm", "CompositeAlarm"])
        except AWS_ERRORS as error:
            logger.warning("the alarms %s cannot be read: %s", names, error)
            return []
        both = [*found.get("MetricAlarms", []), *found.get("CompositeAlarms", [])]
        return [alarm["AlarmName"] for alarm in both if alarm["StateValue"] == "ALARM"]

    def _check_closing(self) -> None:
        if self._closing.is_set():
            raise Closed


def _reason(error: Exception) -> str:
    """Return a FailureReason, 1,024 characters at most."""
    if isinstance(error, JobError | ServiceError):
        return (error.message if isinstance(error, ServiceError) else str(error))[:1024]
    logger.error("internal error", exc_info=error)
    return f"InternalServerError: We encountered an internal error. {error!r}"[:1024]
