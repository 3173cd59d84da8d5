"""A process of its own for what a user's file could make loop for ever, fill the memory or crash."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO


class Worker:
    """One of our own files, running without credentials until it is done or its time is over. Close it.

    Raises nothing when it dies: what reads its output finds the end of it. Limits of memory are the file's to set.
    """

    def __init__(self, file: Path, seconds: float, stdin: int | IO[bytes] = subprocess.PIPE):
        self.process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-S", str(file)],
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path)},
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
