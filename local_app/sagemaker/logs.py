"""A training job's log lines: in CloudWatch Logs and in `job.log`."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from pathlib import Path

from local_app.common import Json
from local_app.sagemaker.services import AWS_ERRORS, Services

logger = logging.getLogger(__name__)

LOG_GROUP = "/aws/sagemaker/TrainingJobs"


class LogStream:
    """One CloudWatch Logs stream of a job, written about once a second, and the same lines in a file.

    An unreachable CloudWatch Logs does not disturb the job: the newest 100,000 lines wait for the next batch.
    """

    _batch = 1_000  # PutLogEvents takes 10,000 events, but 1 MB in all
    _longest_line = 250_000  # bytes; the service's limit is 256 KB with its overhead

    def __init__(self, services: Services, stream: str, file: Path) -> None:
        self._logs, self._stream = services.logs, stream
        self._file = file.open("ab", buffering=0)
        self._lines: deque[tuple[int, str]] = deque(maxlen=100_000)
        self._exists = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="log-stream", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Add one line (without its newline)."""
        self._file.write(line + b"\n")
        text = line[: self._longest_line].decode(errors="replace")
        self._lines.append((int(time.time() * 1000), text or " "))  # the service refuses empty messages

    def close(self) -> None:
        """Send the remaining lines and close the file."""
        self._end.set()
        self._thread.join()
        self._file.close()

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(1.0)
            try:
                self._send()
            except AWS_ERRORS as error:
                logger.warning("log lines of %s are not sent yet: %s", self._stream, error)

    def _send(self) -> None:
        while self._lines:
            if not self._exists:
                self._create()
            batch: list[Json] = []
            size = 0
            for timestamp, message in list(self._lines)[: self._batch]:
                size += len(message.encode()) + 26  # the service adds 26 bytes for each event
                if batch and size > 1_000_000:
                    break
                batch.append({"timestamp": timestamp, "message": message})
            self._logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=self._stream, logEvents=batch)
            for _ in batch:
                self._lines.popleft()

    def _create(self) -> None:
        for create, names in (
            (self._logs.create_log_group, {"logGroupName": LOG_GROUP}),
            (self._logs.create_log_stream, {"logGroupName": LOG_GROUP, "logStreamName": self._stream}),
        ):
            with contextlib.suppress(self._logs.exceptions.ResourceAlreadyExistsException):
                create(**names)
        self._exists = True
