"""Copies of an inference component or of an imported model: each is a server process on this machine.

It keeps to the contract of vLLM's container: GET /ping, POST /invocations, POST /adapters {"name", "src"} and
DELETE /adapters/{name} (https://github.com/aws/model-hosting-container-standards). Every request has the process's token.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from local_app.common import MARKER, Json
from local_app.processes import free_port
from local_app.sagemaker.api import JobError
from local_app.sagemaker.sandbox import HOST_VARIABLES

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_FAILED_STARTS = 3  # of a new copy, before its component fails. AWS tries until the health check's time limit
LONGEST_PAUSE = 30.0  # seconds between two starts of a copy
STABLE_SECONDS = 60.0  # a process that served so long starts again without a pause
DRAIN_SECONDS = 60.0  # AWS's limit of an invocation: what a copy that leaves may still need for its open requests
END_SECONDS = 5.0  # between SIGTERM and SIGKILL
LOAD_SECONDS = 600.0  # for one adapter


class Refused(Exception):  # noqa: N818 - the server's answer
    """A server's answer with an HTTP status that is not 2xx."""


@dataclass(frozen=True)
class Container:
    """What the copies of one version of a component run.

    `model` is a folder or a hub id. The servers write to the file `log`.
    """

    command: Sequence[str]
    model: str
    environment: Mapping[str, str]
    log: Path
    startup_seconds: float


class Copy:
    """One server process, started again whenever it ends, until `stop`.

    A new process gets all `adapters` before it is ready.
    `open` counts the open requests by adapter ("" is the base model). `changed` guards `ready`, `open` and `adapters`, and
    is notified of each change. `ended` is set after the last process.
    """

    def __init__(self, container: Container, adapters: Mapping[str, Path], changed: threading.Condition) -> None:
        self._container, self._adapters, self._changed = container, adapters, changed
        self.ready = False
        self.served = False  # whether a process of this copy was ready once
        self.failed_starts = 0
        self.open: Counter[str] = Counter()
        self.port, self.token = 0, ""
        self._loaded: set[str] = set()
        self._stopping = threading.Event()
        self._drain = DRAIN_SECONDS
        self.ended = threading.Event()
        # The process ends with the thread that starts it (see `_start`), so this thread stays until the process has ended.
        threading.Thread(target=self._keep, name="copy", daemon=True).start()

    def stop(self, drain: float = DRAIN_SECONDS) -> None:
        """Take no more requests, and end the process after its open requests, within `drain` seconds."""
        with self._changed:
            self.ready = False
            self._drain = drain
        self._stopping.set()

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter into the process. Raises Refused, or OSError when the process ends meanwhile."""
        self._call("POST", "/adapters", {"name": name, "src": str(folder)}, LOAD_SECONDS)
        self._loaded.add(name)

    def unload(self, name: str) -> None:
        """Remove an adapter from the process, if it has it."""
        with contextlib.suppress(Refused, OSError):
            self._call("DELETE", f"/adapters/{quote(name, safe='')}", None, END_SECONDS)
        self._loaded.discard(name)

    def _keep(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            started = time.monotonic()
            try:
                self._run_once()
            except Exception:  # the copy must go on, or its component would stay without it
                logger.exception("a copy of %s", self._container.model)
            with self._changed:
                self.ready = False
                self.failed_starts += 1
                self._changed.notify_all()
            stable = time.monotonic() - started > STABLE_SECONDS
            self.failed_starts = 1 if stable else self.failed_starts
            pause = min(LONGEST_PAUSE, 0.25 * 2**self.failed_starts)
        self.ended.set()

    def _run_once(self) -> None:
        """Run a server process until it ends or is to end."""
        process = self._start()
        try:
            if self._is_up(process):
                self._make_ready()
            while process.poll() is None and not self._stopping.wait(0.1):
                pass
            if self._stopping.is_set():
                with self._changed:
                    self._changed.wait_for(lambda: process.poll() is not None or self._is_drained(), self._drain)
            else:
                logger.warning("The server of %s ended with code %s", self._container.model, process.returncode)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _is_drained(self) -> bool:
        return not self.open.total() or not self._drain

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a process, which ends when this thread or the emulator ends, even by kill -9 (where there is `setpriv`)."""
        self.port, self.token = free_port(HOST), secrets.token_urlsafe(24)
        self._loaded = set()
        setpriv = shutil.which("setpriv")
        inherited = {name: os.environ[name] for name in (*HOST_VARIABLES, "PATH", "HOME", MARKER) if name in os.environ}
        own = {"PYTHONUNBUFFERED": "1", "SERVING_TOKEN": self.token}
        with self._container.log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own server
                [
                    *((setpriv, "--pdeathsig", "KILL") if setpriv else ()),
                    *self._container.command,
                    *("--model", self._container.model, "--port", str(self.port)),
                ],
                env=inherited | dict(self._container.environment) | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the app, which then ends its servers in order
            )

    def _is_up(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until the process answers GET /ping with 200. Returns False when it ends before that, or is to end."""
        while process.poll() is None and not self._stopping.is_set():
            with contextlib.suppress(Refused, OSError):
                self._call("GET", "/ping", None, END_SECONDS)
                return True
            self._stopping.wait(0.1)
        return False

    def _make_ready(self) -> None:
        """Load the adapters, those included that are added meanwhile, and take requests."""
        tried: set[str] = set()
        while True:
            with self._changed:
                missing = {name: folder for name, folder in self._adapters.items() if name not in tried}
                if not missing:
                    self.ready = not self._stopping.is_set()
                    self.served = True
                    self._changed.notify_all()
                    return
            for name, folder in missing.items():
                try:
                    self.load(name, folder)
                except Refused as refused:  # its requests fail, those of the base and of other adapters do not
                    logger.error("Adapter %s cannot be loaded: %s", name, refused)
            tried |= missing.keys()

    def _call(self, method: str, path: str, body: Json | None, seconds: float) -> None:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=seconds)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        with contextlib.closing(connection):
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read(4096).decode(errors="replace")
            except http.client.HTTPException as error:
                raise ConnectionError(repr(error)) from error
        if answer.status // 100 != 2:
            raise Refused(f"HTTP {answer.status}: {text}")


class Fleet:
    """The copies of one version of a component."""

    def __init__(self, container: Container, adapters: Mapping[str, Path], changed: threading.Condition) -> None:
        self._container, self._adapters, self._changed = container, adapters, changed
        self._copies: list[Copy] = []
        self._leaving: list[Copy] = []

    @property
    def ready(self) -> list[Copy]:
        """The copies that take requests."""
        return [copy for copy in self._copies if copy.ready]

    @property
    def served(self) -> bool:
        """Whether a copy that is to run has been ready before."""
        return any(copy.served for copy in self._copies)

    def scale(self, count: int) -> None:
        """Start copies, or end those with the fewest open requests, until `count` are left."""
        copies = sorted(self._copies, key=lambda copy: (not copy.ready, -copy.open.total()))
        copies += [Copy(self._container, self._adapters, self._changed) for _ in range(count - len(copies))]
        leaving = copies[count:]
        self._copies = copies[:count]  # a new list: requests read it meanwhile
        self._leaving = [copy for copy in self._leaving if not copy.ended.is_set()] + leaving
        for copy in leaving:
            copy.stop()

    def wait(self, is_closing: threading.Event) -> None:
        """Wait until all copies are ready. Raises JobError when they do not become healthy, and Closed."""
        deadline = time.monotonic() + self._container.startup_seconds
        with self._changed:
            while not all(copy.ready for copy in self._copies):
                if is_closing.is_set():
                    raise Closed
                failed = any(copy.failed_starts >= MOST_FAILED_STARTS and not copy.served for copy in self._copies)
                if failed or time.monotonic() > deadline:
                    raise JobError(
                        "The container for the inference component did not pass the ping health check. Please check "
                        f"its logs (here: {self._container.log})."
                    )
                self._changed.wait(0.1)

    def close(self, drain: float = DRAIN_SECONDS) -> list[threading.Event]:
        """End all copies, and return the events that are set when their processes have ended."""
        copies, self._copies = [*self._copies, *self._leaving], []
        for copy in copies:
            copy.stop(drain)
        return [copy.ended for copy in copies]


class Closed(Exception):  # noqa: N818 - not an error
    """The emulator ends. What was under way begins again in the next one."""
