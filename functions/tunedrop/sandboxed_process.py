"""A process of its own for what a user's file could make loop for ever, fill the memory or crash."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO


def bare_environment() -> dict[str, str]:
    """Return the environment of a process that is not to have our credentials.

    Lambda's interpreter finds its own shared library by LD_LIBRARY_PATH (a defined runtime environment variable,
    https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html).
    """
    return {"PATH": os.defpath, "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}


class Worker:
    """One of our own files, running without credentials until it is done or its time is over. Close it.

    Raises nothing when it dies: what reads its output finds the end of it. Limits of memory are the file's to set.
    """

    def __init__(self, file: Path, seconds: float, stdin: int | IO[bytes] = subprocess.PIPE):
        self.process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-S", str(file)],
            env=bare_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = threading.Timer(seconds, self.process.kill)
        self._end.daemon = True
        self._end.start()

    def close(self) -> None:
        """End the process."""
        self._end.cancel()
        self.process.kill()
        self.process.communicate()
