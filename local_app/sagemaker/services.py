"""What a training job needs of other services: its files in S3, its log lines in CloudWatch Logs, its role's credentials."""

from __future__ import annotations

import contextlib
import logging
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError

from local_app.sagemaker.model import JobError, Json
from local_app.sagemaker.sandbox import EnvironmentProblem

logger = logging.getLogger(__name__)

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
AWS_ERRORS = (BotoCoreError, ClientError, Boto3Error)


class Services:
    """The emulated account's S3 and CloudWatch Logs at one endpoint, and how a job's process reaches the same.

    With credentials of boto3's usual places, or with those of `session`; raises EnvironmentProblem without any.
    """

    def __init__(self, endpoint_url: str, region: str, session: botocore.session.Session | None = None) -> None:
        self._session = boto3.session.Session(region_name=region, botocore_session=session)
        if self._session.get_credentials() is None:
            raise EnvironmentProblem(
                "No AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the local account."
            )
        config = Config(retries={"mode": "standard", "max_attempts": 8}, s3={"addressing_style": "path"})
        self.s3 = self._session.client("s3", endpoint_url=endpoint_url, config=config)
        # Log lines wait and are sent again: no use in waiting inside the client as well.
        self.logs = self._session.client("logs", endpoint_url=endpoint_url, config=Config(retries={"total_max_attempts": 1}))
        self.region, self.endpoint_url = region, endpoint_url

    def assume(self, role_arn: str) -> Services:
        """Return the same services as a role may use them; the role is assumed when first needed, and again in time."""
        fetcher = AssumeRoleCredentialFetcher(
            partial(self._session.client, endpoint_url=self.endpoint_url, region_name=self.region),
            self._session.get_credentials(),
            role_arn,
            # 12 hours, the longest there is: a job's process keeps what it was started with.
            extra_args={"RoleSessionName": "SageMaker", "DurationSeconds": 12 * 3600},
        )
        session = botocore.session.Session()
        session._credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
        return Services(self.endpoint_url, self.region, session)

    def reach_internet(self, subnets: list[str]) -> bool:
        """Return whether a job in these subnets reaches the internet: all of them have a route to a NAT gateway.

        A job's network interfaces have no public address: an internet gateway is of no use to them
        (https://docs.aws.amazon.com/sagemaker/latest/dg/train-vpc.html).
        """
        ec2 = self._session.client("ec2", endpoint_url=self.endpoint_url)

        def has_nat(subnet: str) -> bool:
            tables = ec2.describe_route_tables(Filters=[{"Name": "association.subnet-id", "Values": [subnet]}])[
                "RouteTables"
            ]
            routes = [route for table in tables for route in table["Routes"]]
            return any("NatGatewayId" in route and route.get("DestinationCidrBlock") == "0.0.0.0/0" for route in routes)

        return all(map(has_nat, subnets))

    @property
    def credentials(self) -> dict[str, str]:
        """The credentials as environment variables."""
        frozen = self._session.get_credentials().get_frozen_credentials()
        return {
            "AWS_ACCESS_KEY_ID": frozen.access_key,
            "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
            **({"AWS_SESSION_TOKEN": frozen.token} if frozen.token else {}),
        }


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key (or prefix) of an s3:// URI."""
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme != "s3" or parts.query:
        raise JobError(f"ClientError: {uri} is not an S3 URI of the form s3://bucket/prefix")
    return parts.netloc, parts.path.lstrip("/")


def channel_objects(s3: Any, uri: str) -> Iterator[tuple[str, str]]:
    """Yield (key, path below the channel's folder) of every object that an S3Prefix names.

    As SageMaker has it, a prefix is a string, not a folder. `train/` and `train` both give `train/a.csv` as `a.csv`;
    `train` also matches `train-2/b.csv`, and `data/cars.jsonl` (one object) gives `cars.jsonl`: what matches beyond
    the folder keeps its name from the last slash of the prefix on. Keys that end in a slash are markers, not files.
    """
    bucket, prefix = split_s3_uri(uri)
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    for listing in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in listing.get("Contents", []):
            key = item["Key"]
            if not key.endswith("/"):
                yield key, key[len(folder) if key.startswith(folder) else prefix.rfind("/") + 1 :]


def download(s3: Any, uri: str, folder: Path, check: Callable[[], None]) -> int:
    """Copy every object under an S3Prefix into `folder`; `check` may raise between objects. Returns how many."""
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


def upload(s3: Any, folder: Path, uri: str, kms_key: str = "") -> None:
    """Copy every file below `folder` to the same path below `uri`."""
    bucket, prefix = split_s3_uri(uri)
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix.rstrip('/')}/{path.relative_to(folder)}"
            s3.upload_file(str(path), bucket, key, ExtraArgs=encryption)


def upload_archive(s3: Any, folder: Path, uri: str, kms_key: str = "") -> None:
    """Put everything in `folder` as one .tar.gz at `uri`, as SageMaker does by default."""
    bucket, key = split_s3_uri(uri)
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    with tempfile.NamedTemporaryFile(dir=folder.parent, suffix=".tar.gz") as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, arcname=path.name)
        file.flush()
        s3.upload_file(file.name, bucket, key, ExtraArgs=encryption)


class CheckpointSync:
    """Keeps the S3 copy of the checkpoint folder current: every `interval` seconds, and once more at the end.

    As on SageMaker, files are added and replaced in S3 and never deleted there.
    """

    def __init__(self, s3: Any, folder: Path, uri: str, interval: float) -> None:
        self._s3, self._folder, self._uri, self._interval = s3, folder, uri.rstrip("/"), interval
        self._known: dict[Path, tuple[int, int]] = {}  # path -> (size, mtime in ns) of what S3 has
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="checkpoint-sync", daemon=True)

    def restore(self, check: Callable[[], None]) -> None:
        """Download what S3 has."""
        self._folder.mkdir(parents=True, exist_ok=True)
        download(self._s3, f"{self._uri}/", self._folder, check)
        self._known = dict(self._scan())

    def start(self) -> None:
        """Begin to copy changed files in the background."""
        self._thread.start()

    def abandon(self) -> None:
        """Stop the background copy; the next run of the job copies what is left."""
        self._end.set()

    def finish(self) -> None:
        """Stop the background copy and copy what is left; raises botocore's errors."""
        self._end.set()
        self._thread.join()
        self.push(settled=0)

    def push(self, settled: float) -> None:
        """Upload files that changed and have been left alone for `settled` seconds (others are still being written)."""
        bucket, prefix = split_s3_uri(self._uri)
        for path, state in self._scan():
            if self._known.get(path) != state and time.time() - state[1] / 1e9 >= settled:
                self._s3.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(self._folder)}")
                self._known[path] = state

    def _scan(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for path in sorted(self._folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # the trainer rotates its checkpoints meanwhile
                if path.is_file():
                    yield path, (path.stat().st_size, path.stat().st_mtime_ns)

    def _loop(self) -> None:
        while not self._end.wait(self._interval):
            try:
                self.push(settled=1)
            except (*AWS_ERRORS, FileNotFoundError) as error:  # next time, or in finish()
                logger.warning("checkpoints of %s are not copied yet: %s", self._uri, error)


class LogStream:
    """One CloudWatch Logs stream of a job, written about once a second, and the same lines in `job.log`.

    Unreachable logs do not disturb the job: lines wait (the newest 100,000) and go out with the next batch.
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
        """Send what is left and end."""
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
                logger.warning("log lines of %s wait: %s", self._stream, error)

    def _send(self) -> None:
        while self._lines:
            if not self._exists:
                for create, names in (
                    (self._logs.create_log_group, {"logGroupName": LOG_GROUP}),
                    (self._logs.create_log_stream, {"logGroupName": LOG_GROUP, "logStreamName": self._stream}),
                ):
                    with contextlib.suppress(self._logs.exceptions.ResourceAlreadyExistsException):
                        create(**names)
                self._exists = True
            batch: list[Json] = []
            size = 0
            for timestamp, message in list(self._lines)[: self._batch]:
                size += len(message.encode()) + 26  # what the service counts for each event
                if batch and size > 1_000_000:
                    break
                batch.append({"timestamp": timestamp, "message": message})
            self._logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=self._stream, logEvents=batch)
            for _ in batch:
                self._lines.popleft()
