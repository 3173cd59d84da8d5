"""Saves the state of MiniStack's services while they change. MiniStack itself saves only when it is shut down in order."""

import asyncio
import logging
from collections.abc import Callable

from local_app.aws import hooks

logger = logging.getLogger("pipeline.aws")
SAVE_EVERY_SECONDS = 0.5
# Only a deploy changes these services, and a function's code is too big to compare twice a second.
CHANGED_BY_DEPLOYS = ("cloudformation", "lambda", "iam")


class State:
    """Knows which services may have changed since the last save."""

    def __init__(self) -> None:
        self._changed: set[str] = set()
        self._after_save: list[Callable[[], None]] = []
        self._failing = False

    def changed(self, service: str) -> None:
        """Note that a request to this service, or its own work, may have changed its state."""
        self._changed.add(service)

    def after_save(self, action: Callable[[], None]) -> None:
        """Run `action` after the next save, which includes every change until now."""
        self._after_save.append(action)

    def save(self) -> None:
        """Write the services that may have changed since the last save, unless a deploy is in progress.

        A deploy is saved when it has ended: after a kill in its middle, the next emulator starts with the state before it.
        After a failure, the next save tries again, and the actions after it wait.
        """
        if hooks.deploy_in_progress():
            return
        actions, self._after_save = self._after_save, []
        changed, self._changed = self._changed, set()
        services = hooks.states_of_services()
        if not changed & set(CHANGED_BY_DEPLOYS):
            services = {name: read for name, read in services.items() if name not in CHANGED_BY_DEPLOYS}
        failures = hooks.save_states(services) if changed else []
        if failures:
            self._changed |= changed
            self._after_save = actions + self._after_save
            if not self._failing:
                logger.error("The state of the services is not saved, and a kill would lose it: %s", "; ".join(failures))
        else:
            for action in actions:
                action()
        self._failing = bool(failures)

    async def keep_saving(self) -> None:
        """Save, forever. Runs on the server's event loop: no request changes a service during a save."""
        while True:
            await asyncio.sleep(SAVE_EVERY_SECONDS)
            self.save()
