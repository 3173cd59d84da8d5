"""Runs one training job as a real process with the /opt/ml of a SageMaker container.

1. Download the channels and checkpoints, and write the configuration files.
2. Run the request's entry point in a private mount and PID namespace. Log lines go to CloudWatch Logs and to `job.log`.
3. Upload the model, the output data and the checkpoints.

    process = JobProcess(describe_training_job_response, folder, services, sandbox, on_phase=print)
    outcome = process.run()              # in a thread of its own; any other thread may call stop()
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from local_app.common import Json
from local_app.sagemaker.api import JobError
from local_app.sagemaker.logs import LogStream
from local_app.sagemaker.opt_ml import config_files, failure_reason, host_names
from local_app.sagemaker.sandbox import Sandbox
from local_app.sagemaker.services import AWS_ERRORS, Services
from local_app.sagemaker.transfer import CheckpointSync, download, upload, upload_archive

HOSTS_FILE = "hosts"  # the job's /etc/hosts, beside its ml folder

StopReason = Literal["Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Interrupted", "Shutdown"]


class Halted(Exception):  # noqa: N818 - not an error: a caller requested it
    """The job was stopped before its process was started."""


@dataclass
class Outcome:
    """How a process ended: SageMaker's secondary status, or "Shutdown" when the emulator ends and the job will continue."""

    status: Literal["Completed", "Failed"] | StopReason
    failure_reason: str = ""
    metrics: list[Json] = field(default_factory=list)  # FinalMetricDataList
    seconds: int = 0  # the process's running time


@dataclass
class _Host:
    """One instance of a job, as a process of this machine: its name, its /opt/ml, and its PID 1 after the start."""

    name: str
    ml: Path
    checkpoints: CheckpointSync | None
    process: subprocess.Popen[bytes] | None = None


class JobProcess:
    """A training job on this machine, from its first download to its last upload, or to an interruption.

    Each of the job's instances is a process in namespaces of its own. The instances share the machine's network, where
    `algo-1`, `algo-2`, … name the loopback address. `job` is DescribeTrainingJob's response; `folder` belongs to this job.
    Without `network`, its processes reach only themselves. `on_phase` is called with each secondary status that the job
    enters ("Downloading", "Training", "Stopping", "Uploading"). `grace` and `checkpoint_interval` are seconds.
    """

    def __init__(
        self,
        job: Json,
        folder: Path,
        services: Services,
        sandbox: Sandbox,
        on_phase: Callable[[str], None],
        *,
        network: bool = True,
        grace: float = 120,
        checkpoint_interval: float = 5,
    ) -> None:
        self._network = network
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
        """End the job: SIGTERM to PID 1, SIGKILL after the grace time. A stop replaces an earlier interruption."""
        if self._stop_reason in (None, "Interrupted"):
            self._stop_reason = reason
        self._wake.set()

    def kill(self) -> None:
        """End the job's processes at once."""
        self._signal(signal.SIGKILL)

    def run(self) -> Outcome:
        """Run the job. Returns when its process has ended and its results are in S3."""
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
        first, *others = self._hosts
        try:
            for host in self._hosts:
                self._make_folders(host)
            for channel in self._job.get("InputDataConfig", []):
                self._download_channel(channel, first.ml / "input/data" / channel["ChannelName"])
            for host in others:
                shutil.copytree(first.ml / "input/data", host.ml / "input/data", dirs_exist_ok=True)
            names = " ".join(host.name for host in self._hosts)
            self._hosts_file.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {names}\n")
        except (*AWS_ERRORS, OSError) as error:
            raise JobError(f"ClientError: Data download failed: {error}") from error

    def _make_folders(self, host: _Host) -> None:
        """Make a host's /opt/ml, with the checkpoints in S3 and the configuration files."""
        if host.checkpoints:
            host.checkpoints.push(settled=0)  # checkpoints that a killed emulator had not copied yet
        if host.ml.exists():
            shutil.rmtree(host.ml)
        for part in ("input/config", "input/data", "model", "output/data", "tmp", "home"):
            (host.ml / part).mkdir(parents=True)
        if host.checkpoints:
            host.checkpoints.restore(self._check_halted)
        for name, content in config_files(self._job, host.name).items():
            (host.ml / "input/config" / name).write_text(json.dumps(content))

    def _download_channel(self, channel: Json, folder: Path) -> None:
        folder.mkdir()
        uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
        if not download(self._services.s3, uri, folder, self._check_halted):
            raise JobError(
                f'ClientError: Data download failed:No S3 objects found under S3 URL "{uri}" given in input '
                f"data source {channel['ChannelName']}. Please ensure that the bucket exists in the selected "
                f"region ({self._services.region}) and that objects exist under that S3 prefix."
            )

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
        if not job.get("EnableNetworkIsolation"):  # an isolated container gets no credentials
            environment |= self._services.credentials | {"AWS_ENDPOINT_URL": self._services.endpoint_url}
        return environment

    def _execute(self) -> int:
        """Run the entry point on every host to its end and return the exit code (128 + signal when a signal ended it).

        The first host that fails ends the other hosts, and its exit code is the job's.
        """
        self._check_halted()
        self._on_phase("Training")
        started = time.monotonic()
        logs = [self._start(host) for host in self._hosts]
        threads = [
            threading.Thread(target=self._read, args=(host.process, log), name="job-output", daemon=True)
            for host, log in zip(self._hosts, logs, strict=True)
        ]
        threads += [threading.Thread(target=self._wait, args=(host,), name="job-wait", daemon=True) for host in self._hosts]
        for thread in threads:
            thread.start()
        for host in self._hosts:
            if host.checkpoints:
                host.checkpoints.start()
        self._supervise(started, logs[0])
        for thread in threads:
            thread.join()
        for log in logs:
            log.close()
        self._seconds = time.monotonic() - started
        code = self._exit_code(self._failed or self._hosts[0])
        return code if code >= 0 else 128 - code

    def _start(self, host: _Host) -> LogStream:
        """Start the entry point on a host and return the stream of its log lines."""
        job = self._job
        command, environment = self._sandbox.command(job, host.ml.resolve(), self._environment(), network=self._network)
        stream = f"{job['TrainingJobName']}/{host.name}-{int(time.time())}"
        log = LogStream(self._services, stream, self._folder / "job.log")
        host.process = subprocess.Popen(  # noqa: S603 - the request's entry point, without a shell around it
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the app, which then ends its jobs in order
        )
        return log

    def _supervise(self, started: float, log: LogStream) -> None:
        """Wait until every host has ended; end the hosts at a time limit, or when a stop was requested."""
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
                log.write(f"SIGKILL: still running {self._grace:g} seconds after SIGTERM".encode())
                self._signal(signal.SIGKILL)
                self._exited.wait()

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
        """Upload the results that the request asks for, and return how the job ended."""
        reason = self._stop_reason if self._signalled else None  # None: the job ended by itself, before the signal
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
        for host in others:  # of files with the same name, the first host's are kept
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
    """Move a folder's files into another folder, except files whose names it already has."""
    for path in folder.rglob("*"):
        target = into / path.relative_to(folder)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def metric_value(match: re.Match[str]) -> float | None:
    """Return the number in a metric's first group, None for text and for infinite numbers."""
    try:
        value = float(match.group(1))
    except (ValueError, TypeError):  # not a number, or an optional group without a match
        return None
    return value if math.isfinite(value) else None
