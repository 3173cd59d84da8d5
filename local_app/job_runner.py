"""Runs one training job as a real process that sees what a SageMaker container sees under /opt/ml.

Download (channels, checkpoints) -> configuration files -> the request's own entry point in a private mount and PID
namespace -> upload (model, output data, checkpoints). Log lines go to CloudWatch Logs and to `job.log` as they appear.

    run = JobRun(describe_training_job_response, folder, services, sandbox, on_phase=print)
    outcome = run.run()                  # in a thread of its own; stop() from any other
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError

from local_app.sagemaker_model import Json

logger = logging.getLogger(__name__)

HOSTS_FILE = "hosts"  # beside a job's ml folder: what is on its /etc/hosts
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
AWS_ERRORS = (BotoCoreError, ClientError, Boto3Error)
# What a job takes over from the machine: how to reach the network, and what the hardware and the caches are.
# Everything else is as in a container: nothing of the user's shell leaks in.
HOST_VARIABLES = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("AWS_CA_BUNDLE", "SSL_CERT_FILE", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME"),
)

StopReason = Literal["Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Interrupted", "Shutdown"]


class EnvironmentProblem(Exception):  # noqa: N818 - it reads as what it is
    """This machine lacks something that the emulator needs; the message says what to do."""


class JobError(Exception):
    """A failure of the job itself; the message becomes its FailureReason."""


class Halted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The job was told to end before its process was started."""


@dataclass
class Outcome:
    """How a run ended: SageMaker's secondary status, or "Shutdown" when the emulator ends and the job will go on."""

    status: Literal["Completed", "Failed"] | StopReason
    failure_reason: str = ""
    metrics: list[Json] = field(default_factory=list)  # FinalMetricDataList
    seconds: int = 0  # how long the process ran


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

    @property
    def credentials(self) -> dict[str, str]:
        """The credentials as environment variables."""
        frozen = self._session.get_credentials().get_frozen_credentials()
        return {
            "AWS_ACCESS_KEY_ID": frozen.access_key,
            "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
            **({"AWS_SESSION_TOKEN": frozen.token} if frozen.token else {}),
        }


# ---------------------------------------------------------------------------------------------- where a process runs


class Sandbox(Protocol):
    """A way to give a process its own /opt/ml, PID 1 and network."""

    def command(self, job: Json, ml: Path, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Return the command that runs the entry point with `ml` on /opt/ml and `environment`, and its own environment."""

    def signal(self, process: subprocess.Popen[bytes], job: Json, number: signal.Signals) -> None:
        """Send a signal to the job's PID 1."""


def entry_point(job: Json) -> list[str]:
    """Return the request's ContainerEntrypoint and ContainerArguments as one command."""
    specification = job["AlgorithmSpecification"]
    return [*specification["ContainerEntrypoint"], *specification.get("ContainerArguments", [])]


class Namespaces:
    """Linux mount, PID and (isolated jobs) network namespaces. The container's Python is the one that runs this.

    `setpriv` ends `unshare` when this process dies, even by kill -9, and `unshare --kill-child` then ends PID 1 and
    with it everything that the job started.
    """

    def command(self, job: Json, ml: Path, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """See Sandbox."""
        isolated = bool(job.get("EnableNetworkIsolation"))
        defaults = {name: os.environ[name] for name in HOST_VARIABLES if name in os.environ} | {
            "HOME": "/opt/ml/home",
            "TMPDIR": "/opt/ml/tmp",
            # As AWS's training images have them: lines appear when they are printed.
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LANG": "C.UTF-8",
            # `pip install -r requirements.txt` finds everything installed; it must never change the app's own Python.
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }
        fixed = {"PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        if isolated:
            fixed["TUNEDROP_NETWORK_ISOLATION"] = "1"
        command = [
            *(_program("setpriv"), "--pdeathsig", "KILL", _program("unshare")),
            *(["--user", "--map-root-user"] if os.geteuid() else []),
            *("--mount", "--pid", "--fork", "--kill-child", *(["--net"] if isolated else [])),
            *(sys.executable, "-I", "-S", str(Path(__file__).with_name("sagemaker_container.py")), str(ml)),
            *entry_point(job),
        ]
        return command, defaults | environment | fixed

    def signal(self, process: subprocess.Popen[bytes], job: Json, number: signal.Signals) -> None:  # noqa: ARG002
        """See Sandbox. `unshare` itself ignores SIGTERM; PID 1 is its only child."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it ended meanwhile
            while process.poll() is None:
                if child := children.read_text().split():
                    os.kill(int(child[0]), number)
                    return
                time.sleep(0.01)  # `unshare` has not forked yet


class Docker:
    """The request's own image under Docker, where Linux namespaces cannot be had (macOS, locked-down hosts)."""

    def command(self, job: Json, ml: Path, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """See Sandbox. The names of variables are on the command line, their values are not."""
        if job.get("ResourceConfig", {}).get("InstanceCount", 1) > 1:
            raise JobError("ClientError: Docker runs jobs on one instance here; several need Linux namespaces (unshare)")
        variables = [option for name in environment for option in ("--env", name)]
        if endpoint := environment.get("AWS_ENDPOINT_URL"):  # the container's own 127.0.0.1 is another one
            host = urlsplit(endpoint).hostname or ""
            environment = environment | {"AWS_ENDPOINT_URL": endpoint.replace(host, "host.docker.internal", 1)}
        network = "none" if job.get("EnableNetworkIsolation") else "bridge"
        # A container outlives a client that was killed: the one of an earlier run goes first.
        remove = [_program("docker"), "rm", "--force", job["TrainingJobName"]]
        subprocess.run(remove, check=False, capture_output=True)  # noqa: S603
        first, *arguments = entry_point(job)
        command = [
            *(_program("docker"), "run", "--rm", "--name", job["TrainingJobName"], "--volume", f"{ml}:/opt/ml"),
            *("--network", network, "--add-host", "host.docker.internal:host-gateway", *variables),
            *("--entrypoint", first, job["AlgorithmSpecification"]["TrainingImage"], *arguments),
        ]
        return command, environment | {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}  # for the docker client

    def signal(self, process: subprocess.Popen[bytes], job: Json, number: signal.Signals) -> None:  # noqa: ARG002
        """See Sandbox."""
        command = [_program("docker"), "kill", f"--signal={number.name}", job["TrainingJobName"]]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - it may have ended meanwhile


def _program(name: str) -> str:
    return shutil.which(name) or name


def find_sandbox() -> Sandbox:
    """Return what this machine can run jobs in, tried by running `true` in it; raises EnvironmentProblem without any."""
    probe = {"TrainingJobName": "probe", "AlgorithmSpecification": {"ContainerEntrypoint": ["true"]}}
    namespaces = Namespaces()
    with tempfile.TemporaryDirectory() as folder:
        command, environment = namespaces.command(probe, Path(folder), {})
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
            reason = result.stderr.strip()
            if result.returncode == 0:
                return namespaces
        except FileNotFoundError as error:  # no setpriv: not Linux
            reason = str(error)
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:  # noqa: S607
        return Docker()
    raise EnvironmentProblem(
        "Training jobs need Linux namespaces (util-linux's `unshare` and `setpriv`) or a running Docker; this machine "
        f"has neither. unshare said: {reason}. Where unprivileged user namespaces are switched off, allow them "
        "(`sysctl kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu), run as root, or start Docker."
    )


# ------------------------------------------------------------------------------------------------------- S3 and logs


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


# ----------------------------------------------------------------------------------------------------------- one run


@dataclass
class _Host:
    """One instance of a job, as a process of this machine: its name, its /opt/ml, and its PID 1 once it runs."""

    name: str
    ml: Path
    checkpoints: CheckpointSync | None
    process: subprocess.Popen[bytes] | None = None


class JobRun:
    """One run of a training job on this machine: from its first download to its last upload, or to an interruption.

    Each of the job's instances is a process in namespaces of its own; they share the machine's network, where `algo-1`,
    `algo-2`, … are its loopback address. `job` is the job as DescribeTrainingJob answers it; `folder` is the job's own;
    `on_phase` hears the secondary status ("Downloading", "Training", "Stopping", "Uploading") as it is entered.
    """

    def __init__(
        self,
        job: Json,
        folder: Path,
        services: Services,
        sandbox: Sandbox,
        on_phase: Callable[[str], None],
        *,
        grace: float = 120,
        checkpoint_interval: float = 5,
    ) -> None:
        self._job, self._services, self._sandbox, self._on_phase = job, services, sandbox, on_phase
        self._grace = grace
        self._folder = folder
        self._stop_reason: StopReason | None = None
        self._wake = threading.Event()
        self._exited = threading.Event()
        self._metrics: dict[str, Json] = {}
        self._seconds = 0.0
        condition = job["StoppingCondition"]
        self._runtime_left = condition["MaxRuntimeInSeconds"] - job.get("TrainingTimeInSeconds", 0)
        self._wait_ends = job["CreationTime"] + condition.get("MaxWaitTimeInSeconds", math.inf)
        self._hosts = [
            _Host(name, ml, self._checkpoint_sync(ml, checkpoint_interval))
            for number, name in enumerate(host_names(job), 1)
            for ml in [folder / ("ml" if number == 1 else f"ml-{number}")]
        ]
        self._ended: list[_Host] = []
        self._signalled = False

    def _checkpoint_sync(self, ml: Path, interval: float) -> CheckpointSync | None:
        config = self._job.get("CheckpointConfig")
        if config is None:
            return None
        local = Path(config.get("LocalPath", "/opt/ml/checkpoints")).relative_to("/opt/ml")
        return CheckpointSync(self._services.s3, ml / local, config["S3Uri"], interval)

    def stop(self, reason: StopReason) -> None:
        """Ask the run to end: SIGTERM to PID 1, SIGKILL after the grace time. An interruption gives way to a stop."""
        if self._stop_reason in (None, "Interrupted"):
            self._stop_reason = reason
        self._wake.set()

    def kill(self) -> None:
        """End the job's processes at once."""
        self._signal(signal.SIGKILL)

    def run(self) -> Outcome:
        """Do everything; returns when the job's process is gone and its results are in S3."""
        try:
            self._prepare()
            exit_code = self._execute()
            return self._finish(exit_code)
        except Halted:
            return Outcome(self._stop_reason or "Stopped")
        except JobError as error:
            return self._outcome("Failed", str(error)[:1024])

    def discard(self) -> None:
        """Remove the job's files from this machine; `job.log` stays."""
        for host in self._hosts:
            shutil.rmtree(host.ml, ignore_errors=True)
        self._hosts_file.unlink(missing_ok=True)

    def _outcome(self, status: Literal["Completed", "Failed"] | StopReason, failure_reason: str = "") -> Outcome:
        return Outcome(status, failure_reason, list(self._metrics.values()), math.ceil(self._seconds))

    def _check_halted(self) -> None:
        if self._stop_reason:
            raise Halted
        if time.time() >= self._wait_ends:
            self._on_phase("Stopping")
            self._stop_reason = "MaxWaitTimeExceeded"
            raise Halted

    def _prepare(self) -> None:
        """Fill /opt/ml as SageMaker does: input/data/<channel>/, checkpoints, input/config/*.json, empty outputs."""
        self._check_halted()
        self._on_phase("Downloading")
        job, s3 = self._job, self._services.s3
        first, *others = self._hosts
        try:
            for host in self._hosts:
                if host.checkpoints:
                    host.checkpoints.push(settled=0)  # what an emulator that was killed had not copied yet
                if host.ml.exists():
                    shutil.rmtree(host.ml)
                for part in ("input/config", "input/data", "model", "output/data", "tmp", "home"):
                    (host.ml / part).mkdir(parents=True)
                if host.checkpoints:
                    host.checkpoints.restore(self._check_halted)
                for name, content in config_files(job, host.name).items():
                    (host.ml / "input/config" / name).write_text(json.dumps(content))
            for channel in job.get("InputDataConfig", []):
                folder = first.ml / "input/data" / channel["ChannelName"]
                folder.mkdir()
                uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
                if not download(s3, uri, folder, self._check_halted):
                    raise JobError(
                        f'ClientError: Data download failed:No S3 objects found under S3 URL "{uri}" given in input '
                        f"data source {channel['ChannelName']}. Please ensure that the bucket exists in the selected "
                        f"region ({self._services.region}) and that objects exist under that S3 prefix."
                    )
            for host in others:
                shutil.copytree(first.ml / "input/data", host.ml / "input/data", dirs_exist_ok=True)
            names = " ".join(host.name for host in self._hosts)
            self._hosts_file.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {names}\n")
        except (*AWS_ERRORS, OSError) as error:
            raise JobError(f"ClientError: Data download failed: {error}") from error

    @property
    def _hosts_file(self) -> Path:
        return self._folder / HOSTS_FILE

    def _environment(self) -> dict[str, str]:
        job = self._job
        environment = {
            **job.get("Environment", {}),
            "TRAINING_JOB_NAME": job["TrainingJobName"],
            "TRAINING_JOB_ARN": job["TrainingJobArn"],
            "AWS_REGION": self._services.region,
            "AWS_DEFAULT_REGION": self._services.region,
        }
        if not job.get("EnableNetworkIsolation"):  # an isolated container gets no credentials either
            environment |= self._services.credentials | {"AWS_ENDPOINT_URL": self._services.endpoint_url}
        return environment

    def _execute(self) -> int:
        """Run the entry point on every host to its end; returns the exit code (128 + signal when a signal ended it).

        The first host that fails ends the others, and its exit code is the job's.
        """
        self._check_halted()
        self._on_phase("Training")
        job = self._job
        started = time.monotonic()
        threads, logs = [], []
        for host in self._hosts:
            command, environment = self._sandbox.command(job, host.ml.resolve(), self._environment())
            stream = f"{job['TrainingJobName']}/{host.name}-{int(time.time())}"
            logs.append(log := LogStream(self._services, stream, self._folder / "job.log"))
            host.process = subprocess.Popen(  # noqa: S603 - the request's entry point, and no shell around it
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the app, which then ends its jobs in order
            )
            threads.append(threading.Thread(target=self._read, args=(host.process, log), name="job-output", daemon=True))
        threads += [threading.Thread(target=self._wait, args=(host,), name="job-wait", daemon=True) for host in self._hosts]
        for thread in threads:
            thread.start()
        for host in self._hosts:
            if host.checkpoints:
                host.checkpoints.start()
        runtime_ends = started + self._runtime_left
        wait_ends = started + self._wait_ends - time.time()
        while not self._exited.is_set():
            if self._stop_reason is None:
                left = min(runtime_ends, wait_ends) - time.monotonic()
                if left > 0:
                    self._wake.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                self._stop_reason = "MaxRuntimeExceeded" if runtime_ends <= wait_ends else "MaxWaitTimeExceeded"
                self._on_phase("Stopping")
            self._signalled = True
            self._signal(signal.SIGTERM)
            if not self._exited.wait(self._grace):
                logs[0].write(f"SIGKILL: still running {self._grace:g} seconds after SIGTERM".encode())
                self._signal(signal.SIGKILL)
                self._exited.wait()
        for thread in threads:
            thread.join()
        for log in logs:
            log.close()
        self._seconds = time.monotonic() - started
        code = self._exit_code(self._failed or self._hosts[0])
        return code if code >= 0 else 128 - code

    def _signal(self, number: signal.Signals) -> None:
        for host in self._hosts:
            if host.process:
                self._sandbox.signal(host.process, self._job, number)

    @staticmethod
    def _exit_code(host: _Host) -> int:
        assert host.process is not None and host.process.returncode is not None  # noqa: PT018 - it has ended
        return host.process.returncode

    @property
    def _failed(self) -> _Host | None:
        """The host that failed first."""
        return next((host for host in self._ended if self._exit_code(host)), None)

    def _wait(self, host: _Host) -> None:
        assert host.process is not None
        failed = host.process.wait()
        self._ended.append(host)
        if failed and self._stop_reason is None:
            self._signal(signal.SIGKILL)
        if len(self._ended) == len(self._hosts):
            self._exited.set()
            self._wake.set()

    def _read(self, process: subprocess.Popen[bytes], log: LogStream) -> None:
        definitions = self._job["AlgorithmSpecification"].get("MetricDefinitions", [])
        patterns = [(definition["Name"], re.compile(definition["Regex"])) for definition in definitions]
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.rstrip(b"\r\n")
            log.write(line)
            for name, pattern in patterns:
                if (match := pattern.search(line.decode(errors="replace"))) and (value := metric_value(match)) is not None:
                    self._metrics[name] = {"MetricName": name, "Value": value, "Timestamp": time.time()}

    def _finish(self, exit_code: int) -> Outcome:
        """Upload what the request asks for, and say how the job ended."""
        reason = self._stop_reason if self._signalled else None  # a job that ended by itself has ended
        synced = [host.checkpoints for host in self._hosts if host.checkpoints]
        if reason == "Shutdown":
            for checkpoints in synced:
                checkpoints.abandon()
            return self._outcome(reason)
        try:
            for checkpoints in synced:
                checkpoints.finish()
            if reason == "Interrupted":
                return self._outcome(reason)
            self._on_phase("Uploading")
            self._upload(with_model=exit_code == 0 or reason is not None)
        except (*AWS_ERRORS, OSError) as error:
            raise JobError(f"ClientError: Artifact upload failed: {error}") from error
        if reason:
            return self._outcome(reason)
        if exit_code == 0:
            return self._outcome("Completed")
        failed = self._failed or self._hosts[0]
        return self._outcome("Failed", failure_reason(failed.ml / "output/failure", exit_code))

    def _upload(self, with_model: bool) -> None:
        output = self._job["OutputDataConfig"]
        base = f"{output['S3OutputPath'].rstrip('/')}/{self._job['TrainingJobName']}/output"
        kms_key = output.get("KmsKeyId", "")
        first, *others = self._hosts
        model, data = first.ml / "model", first.ml / "output/data"
        for host in others:  # all leave their files in one place; the first host's win
            for folder in (host.ml / "model", host.ml / "output/data"):
                merge(folder, first.ml / folder.relative_to(host.ml))
        s3 = self._services.s3
        if output.get("CompressionType") == "NONE":
            upload(s3, data, f"{base}/data", kms_key)
            if with_model:
                upload(s3, model, f"{base}/model", kms_key)
        else:
            upload_archive(s3, data, f"{base}/output.tar.gz", kms_key)
            if with_model:
                upload_archive(s3, model, f"{base}/model.tar.gz", kms_key)


def merge(folder: Path, into: Path) -> None:
    """Move the files of a folder into another that has none of their names."""
    for path in folder.rglob("*"):
        target = into / path.relative_to(folder)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def host_names(job: Json) -> list[str]:
    """Return the names of a job's instances, `algo-1` and so on."""
    return [f"algo-{number + 1}" for number in range(job["ResourceConfig"].get("InstanceCount", 1))]


def config_files(job: Json, host: str) -> dict[str, Json]:
    """Return the content of /opt/ml/input/config/*.json, as SageMaker writes them for a host.

    Source: "How Amazon SageMaker AI Provides Training Information" in the developer guide. FastFile shows as File.
    """
    instance_type = job["ResourceConfig"].get("SelectedInstanceType") or job["ResourceConfig"]["InstanceType"]
    channels = {
        channel["ChannelName"]: {
            **({"ContentType": channel["ContentType"]} if "ContentType" in channel else {}),
            "TrainingInputMode": "File",
            "S3DistributionType": channel["DataSource"]["S3DataSource"].get("S3DataDistributionType", "FullyReplicated"),
            "RecordWrapperType": channel.get("RecordWrapperType", "None"),
        }
        for channel in job.get("InputDataConfig", [])
    }
    hosts = host_names(job)
    group = {"instance_group_name": "homogeneousCluster", "instance_type": instance_type, "hosts": hosts}
    return {
        "hyperparameters.json": job.get("HyperParameters", {}),
        "inputdataconfig.json": channels,
        "resourceconfig.json": {
            "current_host": host,
            "current_instance_type": instance_type,
            "current_group_name": "homogeneousCluster",
            "hosts": hosts,
            "instance_groups": [group],
            "network_interface_name": "lo",  # the one interface that every machine, and an isolated job, has
        },
    }


def metric_value(match: re.Match[str]) -> float | None:
    """Return the number in a metric's first group, or None where it is not a finite one."""
    try:
        value = float(match.group(1))
    except (ValueError, TypeError):  # not a number, or an optional group that took no part
        return None
    return value if math.isfinite(value) else None


def failure_reason(failure_file: Path, exit_code: int) -> str:
    """Word a FailureReason as AWS does: what the job wrote to /opt/ml/output/failure, cut so that all is 1,024 long."""
    text = ""
    if failure_file.is_file():
        with failure_file.open(errors="replace") as file:
            text = file.read(1024).strip()
    ending = f", exit code: {exit_code}"
    return f"AlgorithmError: {text or 'The entry point failed and wrote no failure file'}"[: 1024 - len(ending)] + ending
