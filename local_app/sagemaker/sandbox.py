"""Where a training job's process runs on this machine: in Linux namespaces of its own, or else in Docker."""

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

# What a job takes over from the machine: how to reach the network, and what the hardware and the caches are.
# Everything else is as in a container: nothing of the user's shell leaks in.
HOST_VARIABLES = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("AWS_CA_BUNDLE", "SSL_CERT_FILE", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME"),
)
# What the docker client finds its engine by.
DOCKER_VARIABLES = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
# Where a container has the certificate of the application's authority.
AUTHORITY = "/etc/ssl/tunedrop-ca.pem"


class EnvironmentProblem(Exception):  # noqa: N818 - it reads as what it is
    """This machine lacks something that the emulator needs; the message says what to do."""


class Sandbox(Protocol):
    """A way to give a process its own /opt/ml, PID 1 and network."""

    def command(
        self, job: Json, ml: Path, environment: dict[str, str], *, network: bool
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command that runs the entry point with `ml` on /opt/ml and `environment`, and its own environment."""

    def signal(self, process: subprocess.Popen[bytes], job: Json, number: signal.Signals) -> None:
        """Send a signal to the job's PID 1."""


def entry_point(job: Json) -> list[str]:
    """Return the request's ContainerEntrypoint and ContainerArguments as one command."""
    specification = job["AlgorithmSpecification"]
    return [*specification["ContainerEntrypoint"], *specification.get("ContainerArguments", [])]


class Namespaces:
    """Linux mount, PID and (jobs without network) network namespaces. The container's Python is the one that runs this.

    `setpriv` ends `unshare` when this process dies, even by kill -9, and `unshare --kill-child` then ends PID 1 and
    with it everything that the job started.
    """

    def command(
        self, job: Json, ml: Path, environment: dict[str, str], *, network: bool
    ) -> tuple[list[str], dict[str, str]]:
        """See Sandbox."""
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
        if not network:
            fixed["TUNEDROP_NETWORK_ISOLATION"] = "1"
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
    """The request's own image under Docker, where Linux namespaces cannot be had (macOS, locked-down hosts)."""

    def command(
        self, job: Json, ml: Path, environment: dict[str, str], *, network: bool
    ) -> tuple[list[str], dict[str, str]]:
        """See Sandbox. The names of variables are on the command line, their values are not."""
        if job.get("ResourceConfig", {}).get("InstanceCount", 1) > 1:
            raise JobError("ClientError: Docker runs jobs on one instance here; several need Linux namespaces (unshare)")
        volumes = ["--volume", f"{ml}:/opt/ml"]
        host = urlsplit(environment.get("AWS_ENDPOINT_URL", "")).hostname or ""
        if host == "localhost" or host.startswith("127."):  # the container's own is another one
            reached = environment["AWS_ENDPOINT_URL"].replace(host, "host.docker.internal", 1)
            environment = environment | {"AWS_ENDPOINT_URL": reached}
        if authority := os.environ.get("AWS_CA_BUNDLE"):
            volumes += ["--volume", f"{authority}:{AUTHORITY}:ro"]
            environment = environment | {"AWS_CA_BUNDLE": AUTHORITY}
        variables = [option for name in environment for option in ("--env", name)]
        # A container outlives a client that was killed: the one of an earlier run goes first.
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
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - it may have ended meanwhile


def _program(name: str) -> str:
    return shutil.which(name) or name


def find_sandbox() -> Sandbox:
    """Return what this machine can run jobs in, tried by running `true` in it; raises EnvironmentProblem without any."""
    probe = {"TrainingJobName": "probe", "AlgorithmSpecification": {"ContainerEntrypoint": ["true"]}}
    namespaces = Namespaces()
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
    raise EnvironmentProblem(
        "Training jobs need Linux namespaces (util-linux's `unshare` and `setpriv`) or a running Docker; this machine "
        f"has neither. unshare said: {reason}. Where unprivileged user namespaces are switched off, allow them "
        "(`sysctl kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu), run as root, or start Docker."
    )
