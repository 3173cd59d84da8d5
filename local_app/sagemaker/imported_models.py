"""The models that Bedrock has imported: their operations, and the server process that answers for a model while it is asked.

https://docs.aws.amazon.com/bedrock/latest/userguide/model-customization-import-model.html
"""

from __future__ import annotations

import math
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, page
from local_app.sagemaker.copies import Container
from local_app.sagemaker.hosting import Host, Lease
from local_app.sagemaker.store import Store

KIND = "imported-model"
MODEL_ARN = re.compile("arn:aws(-[^:]+)?:bedrock:[a-z0-9-]+:[0-9]{12}:imported-model/[a-z0-9]{12}")
LOOK_SECONDS = 0.5  # between two looks for models that nobody asks
END_SECONDS = 10.0  # for a process that is to end at once


class ImportedModels:
    """The imported models of one account and region, with their files below `folder`.

    A model has no process until somebody asks for it. `command` starts one; it ends `idle_seconds` after the last request.
    A record has the members of GetImportedModel, and the model's `tags` by their keys.
    """

    def __init__(self, store: Store, folder: Path, command: Sequence[str], idle_seconds: float) -> None:
        self._store, self._folder, self._command, self._idle_seconds = store, folder, command, idle_seconds
        self._lock = threading.Lock()  # guards what follows
        self._hosts: dict[str, Host] = {}
        self._asked: dict[str, float] = {}  # when the last request came
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._put_to_sleep, name="imported models", daemon=True)
        self._thread.start()

    def folder(self, arn: str) -> Path:
        """Return the folder of a model's files."""
        return self._folder / arn.rpartition("/")[2]

    def find(self, identifier: str) -> Json | None:
        """Return the record of a model, by its ARN or its name; None without one."""
        names = ("modelArn", "modelName")
        return next((model for model in self.all() if identifier in [model[name] for name in names]), None)

    def all(self) -> list[Json]:
        """Return the records of all models, oldest first."""
        return self._store.all(KIND)

    # -------------------------------------------------------------------------------------------------- operations

    def get_imported_model(self, request: Json) -> Json:
        """Return a model. Raises ServiceError."""
        if model := self.find(request["modelIdentifier"]):
            return model
        raise _not_found(request["modelIdentifier"])

    def list_imported_models(self, request: Json) -> Json:
        """Return the models that a request asks for. Raises ServiceError for a token of another service."""
        return page_of(self.all(), request, "modelName", "modelSummaries")

    def delete_imported_model(self, request: Json) -> Json:
        """Delete a model: its record, its process and its files. Raises ServiceError."""
        with self._store.transaction():
            arn = self.get_imported_model(request)["modelArn"]
            self._store.delete(KIND, arn)
        with self._lock:
            host = self._hosts.pop(arn, None)
        for ended in host.close(drain=0) if host else []:
            ended.wait(END_SECONDS)
        shutil.rmtree(self.folder(arn), ignore_errors=True)
        return {}

    # -------------------------------------------------------------------------------------------------- processes

    def lease(self, identifier: str) -> Lease:
        """Return the server process of a model for one request, which the caller releases.

        Raises ServiceError. A model without a process gets one, and a ModelNotReadyException is raised
        (https://docs.aws.amazon.com/bedrock/latest/userguide/invoke-imported-model.html).
        """
        if not MODEL_ARN.fullmatch(identifier):
            raise ServiceError(
                "ValidationException",
                "The provided model identifier is invalid. The local application answers for imported models, by their "
                "ARNs. It has no foundation models.",
            )
        with self._lock:
            if self._closing.is_set() or not self._store.get(KIND, identifier):
                raise _not_found(identifier)
            self._asked[identifier] = time.monotonic()
            host = self._hosts.setdefault(identifier, Host())
            if not host.is_running:
                host.start(self._container(identifier), 1)
            if lease := host.lease(""):
                return lease
        raise ServiceError(
            "ModelNotReadyException", "Model is not ready for inference. Wait and try your request again.", 429
        )

    def close(self) -> None:
        """End all processes. A later request starts a model's process again."""
        with self._lock:
            self._closing.set()
            hosts = list(self._hosts.values())
        for ended in [event for host in hosts for event in host.close(drain=0)]:
            ended.wait(END_SECONDS)
        self._thread.join(5)

    def _container(self, arn: str) -> Container:
        folder = self.folder(arn)
        return Container(self._command, str(folder / "model"), {}, folder / "server.log", math.inf)

    def _put_to_sleep(self) -> None:
        """End the process of each model for which nobody has asked for a while."""
        while not self._closing.wait(LOOK_SECONDS):
            with self._lock:
                for arn, host in self._hosts.items():
                    if host.open_requests:
                        self._asked[arn] = time.monotonic()
                    elif time.monotonic() - self._asked[arn] > self._idle_seconds:
                        host.close()


def now() -> float:
    """Return the time, in seconds since 1970 and with the milliseconds that answers have."""
    return round(time.time(), 3)


def page_of(records: list[Json], request: Json, name: str, member: str) -> Json:
    """Return the records that a List operation asks for, as its `member`. `name` is the member by which it filters."""
    wanted = {parameter[0].upper() + parameter[1:]: value for parameter, value in request.items()}
    items = [{"Name": record[name], "CreationTime": record["creationTime"], "record": record} for record in records]
    result = page(items, wanted, "Name")
    token = {"nextToken": result["NextToken"]} if "NextToken" in result else {}
    return {member: [item["record"] for item in result["items"]]} | token


def _not_found(identifier: str) -> ServiceError:
    return ServiceError("ResourceNotFoundException", f"Could not find the imported model {identifier}.", 404)
