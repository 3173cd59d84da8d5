"""A training job's files between S3 and this machine: channels, results and checkpoints."""

from __future__ import annotations

import contextlib
import logging
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from local_app.sagemaker.api import JobError
from local_app.sagemaker.services import AWS_ERRORS

logger = logging.getLogger(__name__)


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Return the bucket and the key (or prefix) of an s3:// URI. Raises JobError for another URI."""
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme != "s3" or parts.query:
        raise JobError(f"ClientError: {uri} is not an S3 URI of the form s3://bucket/prefix")
    return parts.netloc, parts.path.lstrip("/")


def channel_objects(s3: Any, uri: str) -> Iterator[tuple[str, str]]:
    """Yield the key of every object under an S3Prefix, with its path below the channel's folder.

    As in SageMaker, a prefix is a string, not a folder. `train/` and `train` both give `train/a.csv` as `a.csv`. `train`
    also matches `train-2/b.csv`, and `data/cars.jsonl` (one object) gives `cars.jsonl`: an object outside the folder keeps
    its name from the last slash of the prefix on. Keys that end in a slash are markers, not files.
    """
    bucket, prefix = split_s3_uri(uri)
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    for listing in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in listing.get("Contents", []):
            key = item["Key"]
            if not key.endswith("/"):
                yield key, key[len(folder) if key.startswith(folder) else prefix.rfind("/") + 1 :]


def download(s3: Any, uri: str, folder: Path, check: Callable[[], None]) -> int:
    """Copy every object under an S3Prefix into `folder` and return their number. `check` may raise before each object."""
    bucket, _ = split_s3_uri(uri)
    count = 0
    for key, name in channel_objects(s3, uri):
        check()
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise JobError(f"ClientError: Data download failed: key {key!r} leads out of its channel's folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(target))
        count += 1
    return count


def _encryption(kms_key: str) -> dict[str, str]:
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}


def upload(s3: Any, folder: Path, uri: str, kms_key: str = "") -> None:
    """Copy every file below `folder` to the same path below `uri`."""
    bucket, prefix = split_s3_uri(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix.rstrip('/')}/{path.relative_to(folder)}"
            s3.upload_file(str(path), bucket, key, ExtraArgs=_encryption(kms_key))


def upload_archive(s3: Any, folder: Path, uri: str, kms_key: str = "") -> None:
    """Store the content of `folder` as one .tar.gz at `uri`, which is SageMaker's default."""
    bucket, key = split_s3_uri(uri)
    with tempfile.NamedTemporaryFile(dir=folder.parent, suffix=".tar.gz") as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, arcname=path.name)
        file.flush()
        s3.upload_file(file.name, bucket, key, ExtraArgs=_encryption(kms_key))


class CheckpointSync:
    """Copies the checkpoint folder to S3 every `interval` seconds, and once more at the end.

    As in SageMaker, files are added and replaced in S3, and never deleted there.
    """

    def __init__(self, s3: Any, folder: Path, uri: str, interval: float) -> None:
        self._s3, self._folder, self._uri, self._interval = s3, folder, uri.rstrip("/"), interval
        self._copied: dict[Path, tuple[int, int]] = {}  # path -> size and mtime in ns of the copy in S3
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="checkpoint-sync", daemon=True)

    def restore(self, check: Callable[[], None]) -> None:
        """Download the checkpoints in S3."""
        self._folder.mkdir(parents=True, exist_ok=True)
        download(self._s3, f"{self._uri}/", self._folder, check)
        self._copied = dict(self._scan())

    def start(self) -> None:
        """Start to copy changed files in the background."""
        self._thread.start()

    def abandon(self) -> None:
        """Stop the background copy. The next process of the job copies the remaining files."""
        self._end.set()

    def finish(self) -> None:
        """Stop the background copy and copy the remaining files. Raises botocore's errors."""
        self._end.set()
        self._thread.join()
        self.push(settled=0)

    def push(self, settled: float) -> None:
        """Upload files that changed, at least `settled` seconds ago: a younger file may still be written."""
        bucket, prefix = split_s3_uri(self._uri)
        for path, state in self._scan():
            if self._copied.get(path) != state and time.time() - state[1] / 1e9 >= settled:
                self._s3.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(self._folder)}")
                self._copied[path] = state

    def _scan(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for path in sorted(self._folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # the trainer deletes old checkpoints meanwhile
                if path.is_file():
                    yield path, (path.stat().st_size, path.stat().st_mtime_ns)

    def _loop(self) -> None:
        while not self._end.wait(self._interval):
            try:
                self.push(settled=1)
            except (*AWS_ERRORS, FileNotFoundError) as error:  # the next interval, or finish(), tries again
                logger.warning("checkpoints of %s are not copied yet: %s", self._uri, error)
