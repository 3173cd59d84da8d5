"""Run a command where a Docker engine has the base image that `sam local invoke` builds on.

    .venv/bin/python tests/containers/engine.py .venv/bin/python -m pytest -m containers

A running engine that has AWS's image is used as it is. Else one of its own is started, which needs root on Debian or
Ubuntu: Debian's `docker.io`, unpacked into `.containers/` and not installed, in a network of its own that has the engine's
bridge and nothing else. The machine's network and packages stay as they are, and all of the engine ends with the command.
Nothing is pulled from a registry: `debootstrap` makes the base image, of Debian 13 for its Python 3.13, and AWS's runtime
client comes from PyPI. Exit code: the command's, or NOT_RUN where neither engine can be had.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
from docker.errors import DockerException

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".containers"
PACKAGES = CACHE / "packages"  # as they were downloaded, and unpacked beside each other
TOOLS = CACHE / "tools"
BASE = CACHE / "lambda-python3.13.tar"
# Where SAM looks for the base image of `Runtime: python3.13` (samcli/local/docker/lambda_image.py).
REPOSITORY, TAG = "public.ecr.aws/lambda/python", "3.13-x86_64"
NOT_RUN = 3
# All that begins in these namespaces ends with their first process; `unshare` ends that one when it ends itself.
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
START_SECONDS = 60.0
# Lambda runs this file. A layer lies in /opt (https://docs.aws.amazon.com/lambda/latest/dg/python-layers.html). AWS's
# runtime client is the only package that the image brings: all others have to come with the function.
BOOTSTRAP = """#!/bin/sh
export PYTHONPATH=/var/task:/opt/python/lib/python3.13/site-packages:/opt/python:/var/runtime
exec python3.13 -m awslambdaric "$_HANDLER"
"""


class NotRunError(Exception):
    """Nothing can be run here; the message says why, and what would help."""


def main() -> int:
    """Run the command of the arguments, and return its exit code."""
    if sys.argv[1] == "--inside":
        short, data, *command = sys.argv[2:]
        with _own_engine(short, data) as socket:
            return _run(command, {"DOCKER_HOST": socket, "PATH": f"{os.environ['PATH']}:{TOOLS / 'usr/bin'}"})
    try:
        if _has_base_image():
            return _run(sys.argv[1:])
        _prepare()
    except NotRunError as reason:
        print(f"NOT RUN: {reason}", file=sys.stderr)
        return NOT_RUN
    # A socket's path has 107 characters at most, and containerd makes some of its own: not below the project.
    with _folder() as short, _folder(CACHE) as data:
        try:
            return _run([*NAMESPACES, sys.executable, __file__, "--inside", short, data, *sys.argv[1:]])
        finally:
            for group in Path("/sys/fs/cgroup").glob(f"**/{_cgroup(short)}"):
                group.rmdir()


def _run(command: list[str], environment: dict[str, str] | None = None) -> int:
    return subprocess.run(command, env=os.environ | (environment or {}), check=False).returncode


def _folder(place: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tunedrop-", dir=place, ignore_cleanup_errors=True)


def _cgroup(short: str) -> str:
    return Path(short).name


def _has_base_image() -> bool:
    """Whether an engine runs that has AWS's image."""
    try:
        client = docker.from_env()
        return bool(client.images.list(f"{REPOSITORY}:{TAG}"))
    except DockerException:
        return False


# ---- an engine of its own ----


def _tools() -> dict[str, str]:
    """Return the environment in which the unpacked programs are found, and find their libraries and scripts."""
    folders = [
        str(TOOLS / "usr/sbin"),
        str(TOOLS / "usr/bin"),
        str(TOOLS / "sbin"),
        os.environ["PATH"],
        "/usr/sbin",
        "/sbin",
    ]
    libraries = [str(folder) for folder in TOOLS.glob("usr/lib/*-linux-gnu")]
    scripts = {"DEBOOTSTRAP_DIR": str(TOOLS / "usr/share/debootstrap")} if (TOOLS / "usr/sbin/debootstrap").exists() else {}
    return {"PATH": ":".join(folders), "LD_LIBRARY_PATH": ":".join(libraries)} | scripts


def _prepare() -> None:
    """Fetch what an engine of our own needs, if it is not there from an earlier run. Raises NotRunError."""
    if platform.machine() != "x86_64" or os.geteuid() or not shutil.which("apt-get") or not shutil.which("unshare"):
        raise NotRunError(
            f"it takes either a running Docker engine that has {REPOSITORY}:{TAG} (`docker pull` gets it), or root on a "
            "Debian or Ubuntu machine (x86_64), where an engine can be started."
        )
    _do([*NAMESPACES, "true"])
    if not TOOLS.exists():
        _say("downloading Debian's docker.io and debootstrap")
        (PACKAGES / "partial").mkdir(parents=True, exist_ok=True)
        install = ["apt-get", "install", "-qq", "-y", "--download-only", "--no-install-recommends"]
        _do(["apt-get", "update", "-qq"])
        # From Debian 13 on, the client is a package of its own.
        client = subprocess.run(["apt-cache", "show", "docker-cli"], capture_output=True, check=False).returncode == 0
        wanted = ["docker.io", "debootstrap", "debian-archive-keyring", "iproute2", *(["docker-cli"] if client else [])]
        _do([*install, "-o", f"Dir::Cache::archives={PACKAGES}", *wanted])
        unpacked = Path(tempfile.mkdtemp(dir=CACHE))
        for package in PACKAGES.glob("*.deb"):
            _do(["dpkg", "-x", str(package), str(unpacked)])
        unpacked.rename(TOOLS)
    if not BASE.exists() or BASE.stat().st_mtime < Path(__file__).stat().st_mtime:
        _say("making the base image with debootstrap")
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _make_base_image(Path(folder, "root"), Path(folder, "image.tar"))


def _make_base_image(root: Path, archive: Path) -> None:
    keyring = TOOLS / "usr/share/keyrings/debian-archive-keyring.gpg"  # there if this machine had none
    signed = ["--force-check-gpg", *(["--keyring", str(keyring)] if keyring.exists() else [])]
    release = ["--variant=minbase", "--include=python3.13", "trixie", str(root), "http://deb.debian.org/debian"]
    _do(["debootstrap", *signed, *release])
    client = [
        f"{name}=={importlib.metadata.version(name)}" for name in ("awslambdaric", "simplejson", "snapshot-restore-py")
    ]
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    # awslambdaric has C in it: the wheel of the image's Python, not of ours.
    pip += ["--implementation", "cp", "--python-version", "3.13", "--platform", "manylinux2014_x86_64"]
    _do([*pip, "--platform", "manylinux_2_28_x86_64", "--target", str(root / "var/runtime"), *client])
    bootstrap = root / "var/runtime/bootstrap"
    bootstrap.write_text(BOOTSTRAP)
    bootstrap.chmod(bootstrap.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    (root / "var/task").mkdir()
    _do(["tar", "--create", "--file", str(archive), "--directory", str(root), "--exclude=./var/cache/apt/*", "."])
    archive.rename(BASE)


@contextlib.contextmanager
def _own_engine(short: str, data: str) -> Iterator[str]:
    """Start an engine in the namespaces of this process, with the base image in it, and yield the URL of its socket."""
    tools = os.environ | _tools()
    subprocess.run(["ip", "link", "set", "lo", "up"], env=tools, check=True)
    socket, log = f"unix://{short}/docker.sock", CACHE / "dockerd.log"
    command = ["dockerd", "--host", socket, "--data-root", data, "--exec-root", f"{short}/exec"]
    command += ["--pidfile", f"{short}/dockerd.pid", "--cgroup-parent", f"/{_cgroup(short)}"]
    command += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
    # Containers reach the bridge's address, where the application listens, and nothing else: there is nothing else.
    command += ["--iptables=false", "--ip6tables=false", "--ip-masq=false"]
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, env=tools, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(socket, daemon, log)
        docker.DockerClient(base_url=socket).api.import_image_from_file(str(BASE), repository=REPOSITORY, tag=TAG)
        yield socket
    finally:
        daemon.terminate()
        daemon.wait(30)


def _wait(socket: str, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(DockerException):
            docker.DockerClient(base_url=socket).ping()
            return
        if daemon.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text().splitlines()
            print(f"NOT RUN: dockerd does not start here. The end of {log}:", *lines[-10:], sep="\n", file=sys.stderr)
            sys.exit(NOT_RUN)
        time.sleep(0.1)


def _do(command: list[str]) -> None:
    """Run a program of the preparations. Raises NotRunError with what it said last."""
    done = subprocess.run(command, env=os.environ | _tools(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise NotRunError(f"`{' '.join(command[:3])} ...` failed: {' / '.join(said)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
