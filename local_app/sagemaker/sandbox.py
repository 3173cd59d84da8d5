"""Runs a training job's process on this machine: in Linux namespaces of its own, or else in Docker."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from local_app.common import Json
from local_app.sagemaker.api import JobError

# The only variables of the machine that a job inherits: network, hardware and caches. The user's other variables stay out,
# as in a container.
HOST_VARIABLES = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("AWS_CA_BUNDLE", "SSL_CERT_FILE", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME"),
)
# The docker client finds its engine by these variables.
DOCKER_VARIABLES = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
# Variables of a job whose URLs may be on this machine.
HOST_URLS = {"AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"}
# Path of the local app's CA certificate in a container.
AUTHORITY = "/etc/ssl/tunedrop-ca.pem"


class StartupError(Exception):
    """The emulator cannot start. The message says why, and what to do."""


class Sandbox(Protocol):
    """Gives a process its own /opt/ml, PID namespace and network."""

    def command(
        self, job: Json, ml: Path, environment: dict[str, str], *, network: bool
    ) -> tuple[list[str], dict[str, str]]:
        """Return a command that runs the entry point with `ml` on /opt/ml, and the command's environment."""

    def signal(self, process: subprocess.Popen[bytes], job: Json, number: signal.Signals) -> None:
        """Send a signal to the job's PID 1."""


def entry_point(job: Json) -> list[str]:
    """Return the request's ContainerEntrypoint and ContainerArguments as one command."""
    specification = job["AlgorithmSpecification"]
    return [*specification["ContainerEntrypoint"], *specification.get("ContainerArguments", [])]


class Namespaces:
    """Linux mount and PID namespaces, and a network namespace for a job without network. The job runs with this Python.

    A job does not see the folder `private`, except the CA certificate in it, and has no capabilities.
    When this process dies, even by kill -9, `setpriv` ends `unshare`. `unshare --kill-child` then ends PID 1, and with it
    every process of the job.
    """

    def __init__(self, private: Path | None = None) -> None:
        self._private = private

    def command(
        self, job: Json, ml: Path, environment: dict[str, str], *, network: bool
    ) -> tuple[list[str], dict[str, str]]:
        """See Sandbox."""
        defaults = {name: os.environ[name] for name in HOST_VARIABLES if name in os.environ} | {
            "HOME": "/opt/ml/home",
            "TMPDIR": "/opt/ml/tmp",
            # As in AWS's training images: lines appear when they are printed.
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LANG": "C.UTF-8",
            # `pip install -r requirements.txt` finds every package installed. It must never change the app's own Python.
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }
        fixed = {"PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        if not network:
            fixed["TUNEDROP_NETWORK_ISOLATION"] = "1"
        if self._private:
            fixed["TUNEDROP_PRIVATE"] = str(self._private)
        command = [
            *(_program("setpriv"), "--pdeathsig", "KILL", _program("unshare")),
            *(["--user", "--map-root-user"] if os.geteuid() else []),
            *("--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])),
            *(sys.executable, "-I", "-S", str(Path(__file__).with_name("container.py")), str(ml)),
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
    """The request's own image in Docker, for machines without usable Linux namespaces (macOS, restricted hosts)."""

    def command(
        self, job: Json, ml: Path, environment: dict[str, str], *, network: bool
    ) -> tuple[list[str], dict[str, str]]:
        """See Sandbox. The command line has the names of the variables, and not their values."""
        if job.get("ResourceConfig", {}).get("InstanceCount", 1) > 1:
            raise JobError(
                "ClientError: Docker runs jobs of one instance only; several instances need Linux namespaces (unshare)"
            )
        volumes = ["--volume", f"{ml}:/opt/ml"]
        for name in HOST_URLS & environment.keys():
            host = urlsplit(environment[name]).hostname or ""
            if host == "localhost" or host.startswith("127."):  # in the container, this is the container itself
                environment = environment | {name: environment[name].replace(host, "host.docker.internal", 1)}
        if authority := os.environ.get("AWS_CA_BUNDLE"):
            volumes += ["--volume", f"{authority}:{AUTHORITY}:ro"]
            environment = environment | {"AWS_CA_BUNDLE": AUTHORITY}
        variables = [option for name in environment for option in ("--env", name)]
        # A container outlives a killed client: remove the container of an earlier process.
        remove = [_program("docker"), "rm", "--force", job["TrainingJobName"]]
        subprocess.run(remove, check=False, capture_output=True)  # noqa: S603
        first, *arguments = entry_point(job)
        command = [
            *(_program("docker"), "run", "--rm", "--name", job["TrainingJobName"], *volumes),
            *("--network", "bridge" if network else "none", "--add-host", "host.docker.internal:host-gateway", *variables),
            *("--entrypoint", first, job["AlgorithmSpecification"]["TrainingImage"], *arguments),
        ]
        client = {name: os.environ[name] for name in DOCKER_VARIABLES if name in os.environ}
        return command, environment | client

    def signal(self, process: subprocess.Popen[bytes], job: Json, number: signal.Signals) -> None:  # noqa: ARG002
        """See Sandbox."""
        command = [_program("docker"), "kill", f"--signal={number.name}", job["TrainingJobName"]]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - the container may have ended meanwhile


def _program(name: str) -> str:
    return shutil.which(name) or name


def find_sandbox(private: Path | None) -> Sandbox:
    """Return the first sandbox in which this machine can run `true`. Its jobs do not see the folder `private`.

    Raises StartupError without one.
    """
    probe = {"TrainingJobName": "probe", "AlgorithmSpecification": {"ContainerEntrypoint": ["true"]}}
    namespaces = Namespaces(private)
    with tempfile.TemporaryDirectory() as folder:
        command, environment = namespaces.command(probe, Path(folder), {}, network=True)
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
            reason = result.stderr.strip()
            if result.returncode == 0:
                return namespaces
        except FileNotFoundError as error:  # no setpriv: not Linux
            reason = str(error)
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:  # noqa: S607
        return Docker()
    raise StartupError(
        "Training jobs need Linux namespaces (util-linux's `unshare` and `setpriv`) or a running Docker engine; this "
        f"machine has neither. The error of unshare: {reason}. If unprivileged user namespaces are switched off, allow them "
        "(on Ubuntu: `sysctl kernel.apparmor_restrict_unprivileged_userns=0`), run as root, or start Docker."
    )
