"""Processes, ports and locks of this machine."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from local_app.common import MARKER

SHUTDOWN_SECONDS = 15.0


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock against other processes of this machine. The system frees the lock of a process that dies."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return every live process that the local app of `folder` started, except this process."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another user's process, or one that has ended meanwhile
            if process.environ().get(MARKER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return [process for process in processes if process.pid != os.getpid()]


def end(processes: list[psutil.Process]) -> None:
    """End processes with SIGTERM, and with SIGKILL those that still run after `SHUTDOWN_SECONDS`."""
    for process in processes:
        _signal(process.terminate)
    for process in _wait(processes):
        _signal(process.kill)
    _wait(processes)


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
        send()


def _wait(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Wait until the processes have ended, and return those that still run at the deadline. A zombie has ended."""
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    while True:
        alive = [process for process in processes if process.is_running() and _status(process) != psutil.STATUS_ZOMBIE]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def is_free(host: str, port: int) -> bool:
    """Return whether a server could listen on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str) -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def end_of(file: Path, lines: int = 30) -> str:
    """Return the last lines of a log."""
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
