"""Child processes without credentials, for work on a user's file that may loop forever, exhaust the memory or crash."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

# The folder of Tunedrop's packages. An editable installation has it in an import hook, and not in sys.path.
PACKAGES = str(Path(__file__).resolve().parents[1])


def bare_environment() -> dict[str, str]:
    """Return the environment of a process without credentials.

    Lambda's interpreter finds its shared library through LD_LIBRARY_PATH (a defined runtime environment variable,
    https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html).
    """
    return {"PATH": os.defpath, "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}


class WorkerKilledError(Exception):
    """Something else than a limit killed the worker: a fault of the machine, not of the user's file."""


class Worker:
    """One of Tunedrop's own files in a child process without credentials, for at most `seconds`. The caller must close it.

    A worker that dies raises no exception: its output ends. `blame` then says whose fault it is. The file itself sets its
    memory limit, at which its allocations fail; no limit of a worker sends SIGKILL.
    """

    def __init__(self, file: Path, seconds: float, stdin: int | IO[bytes] = subprocess.PIPE):
        self.process = subprocess.Popen(  # noqa: S603 - the file is part of Tunedrop
            [sys.executable, "-S", str(file)],
            env=bare_environment() | {"PYTHONPATH": os.pathsep.join([PACKAGES, *sys.path])},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._timed_out = False
        self._end = threading.Timer(seconds, self._time_out)
        self._end.daemon = True
        self._end.start()

    def _time_out(self) -> None:
        self._timed_out = True
        self.process.kill()

    def blame(self) -> None:
        """Return if the file made the worker die. Raises WorkerKilledError if something else did: repeat the work."""
        if self.process.wait() == -signal.SIGKILL and not self._timed_out:
            raise WorkerKilledError(f"process {self.process.pid} was killed")

    def close(self) -> None:
        """Kill the process and free its pipes."""
        self._end.cancel()
        self.process.kill()
        self.process.communicate()
