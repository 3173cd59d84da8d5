"""What runs for an inference component with a model: copies, of two versions during an update, and their adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from local_app.common import Json
from local_app.sagemaker.api import JobError
from local_app.sagemaker.copies import DRAIN_SECONDS, Closed, Container, Copy, Fleet, Refused

ALARM_CHECK_SECONDS = 1.0


@dataclass
class Lease:
    """A copy for one request. `adapter` is the adapter's name in the server, "" for the model itself."""

    host: Host
    copy: Copy
    adapter: str

    def release(self) -> None:
        """End the request."""
        with self.host.changed:
            self.copy.open[self.adapter] -= 1
            self.host.changed.notify_all()


class Host:
    """The servers of one component with a model. Any thread may use it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._fleets: list[Fleet] = []
        self._adapters: dict[str, Path] = {}

    @property
    def is_running(self) -> bool:
        """Whether there is a version of the component, maybe with no copy."""
        return bool(self._fleets)

    @property
    def ready_copies(self) -> int:
        """The number of copies that take requests."""
        return sum(len(fleet.ready) for fleet in self._fleets)

    @property
    def open_requests(self) -> int:
        """The number of open requests."""
        return sum(copy.open.total() for fleet in self._fleets for copy in fleet.ready)

    @property
    def served(self) -> bool:
        """Whether a copy that should run has been ready before: without ready copies, its process is starting again."""
        return any(fleet.served for fleet in self._fleets)

    def lease(self, adapter: str) -> Lease | None:
        """Return the copy with the fewest open requests; None if no copy is ready. The caller releases it."""
        with self.changed:
            ready = [copy for fleet in self._fleets for copy in fleet.ready]
            if not ready:
                return None
            copy = min(ready, key=lambda copy: copy.open.total())
            copy.open[adapter] += 1
            return Lease(self, copy, adapter)

    # ------------------------------------------------------------------------------------------------------ copies

    def start(self, container: Container, copies: int) -> Fleet:
        """Start the first version."""
        fleet = Fleet(container, self._adapters, self.changed)
        self._fleets = [fleet]
        fleet.scale(copies)
        return fleet

    def scale(self, copies: int, before: int, is_closing: threading.Event) -> None:
        """Change the number of copies. Raises JobError, with the number `before` again, if copies do not become healthy."""
        [fleet] = self._fleets
        fleet.scale(copies)
        try:
            fleet.wait(is_closing)
        except JobError:
            fleet.scale(before)
            raise

    def roll(
        self,
        container: Container,
        copies: int,
        before: int,
        policy: Json,
        bake: Callable[[], None],
        is_closing: threading.Event,
    ) -> None:
        """Replace the version by another, batch by batch; raise JobError, with the former version back, if that fails.

        Of each batch, the new copies become healthy and take requests before the old ones end; then `bake` watches them, and
        raises JobError to take the update back. `policy` is the request's RollingUpdatePolicy; without one, all copies are
        one batch.
        """
        [old] = self._fleets
        new = Fleet(container, self._adapters, self.changed)
        self._fleets = [new, old]
        deadline = time.monotonic() + policy.get("MaximumExecutionTimeoutInSeconds", 28_800)
        batch, done = batch_size(policy, copies), 0
        try:
            while done < copies:
                done = min(done + batch, copies)
                new.scale(done)
                new.wait(is_closing)
                old.scale(max(0, before - done))
                bake()
                if time.monotonic() > deadline:
                    raise JobError("The update did not end within its MaximumExecutionTimeoutInSeconds.")
        except JobError:
            old.scale(before)
            try:
                old.wait(is_closing)
            finally:
                self._fleets = [old]
                new.close()
            raise
        self._fleets = [new]
        old.close()

    def close(self, drain: float = DRAIN_SECONDS) -> list[threading.Event]:
        """End all copies, and return the events that are set when their processes have ended."""
        fleets, self._fleets = self._fleets, []
        return [ended for fleet in fleets for ended in fleet.close(drain)]

    # ---------------------------------------------------------------------------------------------------- adapters

    def expect(self, name: str, folder: Path) -> list[Copy]:
        """Have every process that becomes ready from now on load an adapter; return the copies that are ready already."""
        with self.changed:
            self._adapters[name] = folder
            return [copy for fleet in self._fleets for copy in fleet.ready]

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter into every copy. Raises JobError, with the adapter in none, if a server refuses it or ends."""
        try:
            for copy in self.expect(name, folder):
                copy.load(name, folder)
        except Refused as refused:
            self.unload(name)
            raise JobError(f"Failed to load the adapter: the container answered {refused}") from refused
        except OSError as error:
            self.unload(name)  # or each new process would end again
            raise JobError(f"Failed to load the adapter: the container ended meanwhile ({error!r})") from error

    def unload(self, name: str) -> None:
        """Remove an adapter from every copy, after its open requests."""
        with self.changed:
            self._adapters.pop(name, None)
            ready = [copy for fleet in self._fleets for copy in fleet.ready]
            self.changed.wait_for(lambda: not any(copy.open[name] for copy in ready), DRAIN_SECONDS)
        for copy in ready:
            copy.unload(name)


def batch_size(policy: Json, copies: int) -> int:
    """Return the number of copies that a RollingUpdatePolicy replaces at a time."""
    size = policy.get("MaximumBatchSize", {"Type": "CAPACITY_PERCENT", "Value": 100})
    value = int(size["Value"])
    return max(1, value if size["Type"] == "COPY_COUNT" else copies * value // 100)


def watch(alarms: Callable[[], list[str]], seconds: float, is_closing: threading.Event) -> None:
    """Watch alarms for `seconds`, once at least. Raises JobError when `alarms` returns the names of alarms that ring.

    "If any alarms are tripped during a deployment, SageMaker rolls back the deployment"
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_AutoRollbackConfig.html).
    """
    deadline = time.monotonic() + seconds
    while True:
        if ringing := alarms():
            raise JobError(f"The update was rolled back: these alarms are in the state ALARM: {', '.join(ringing)}")
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if is_closing.wait(min(ALARM_CHECK_SECONDS, left)):
            raise Closed
