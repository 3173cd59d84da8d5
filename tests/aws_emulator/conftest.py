"""The AWS emulator and the SageMaker emulator, each in a process of its own."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from local_app.certificates import make_certificates
from local_app.common import MARKER
from local_app.credentials import post_signed, root_credentials
from local_app.stack import OF_SAGEMAKER

Json = dict[str, Any]


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Emulators:
    """Both emulators in one folder. `kill` simulates a crash; `start` starts an emulator again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {"aws": free_port(), "sagemaker": free_port()}
        self.url = f"https://127.0.0.1:{self.ports['aws']}"
        self.authority = make_certificates(folder / "tls", "127.0.0.1").authority
        self.root = root_credentials(folder)
        self.trust = ssl.create_default_context(cafile=self.authority)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", f"local_app.{name}.server", "--port", str(self.ports[name])]
        command += ["--state-dir", str(self.folder / name)]
        if name == "sagemaker":
            command += ["--s3-endpoint", self.url, "--event-sink", f"{self.url}/_tunedrop/events"]
            command += ["--authorizer", f"{self.url}/_tunedrop/authorize", "--private", str(self.folder)]
        else:
            command += ["--tls-dir", str(self.folder / "tls")]
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL_SAGEMAKER": self.url_of("sagemaker"),
            "AWS_CA_BUNDLE": str(self.authority),
            **self.root.environment,
            "OF_THE_CALLER": "yes",
            MARKER: str(self.folder),
        }
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.processes[name] = process

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            return self.healthy(name)

        wait_for(answers)

    def url_of(self, name: str) -> str:
        return self.url if name == "aws" else f"http://127.0.0.1:{self.ports[name]}"

    def healthy(self, name: str) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url_of(name)}/_tunedrop/health", context=self.trust):
                return True
        except OSError:
            return False

    def kill(self, name: str) -> None:
        """End an emulator with SIGKILL: no handler runs, and the emulator saves nothing."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(20)
        for other in psutil.process_iter():  # functions in the middle of something
            try:
                if other.environ().get(MARKER) == str(self.folder):
                    other.kill()
            except psutil.Error:
                continue

    def client(self, service: str, **credentials: str) -> Any:
        """A client with the account's own credentials, or with `credentials`."""
        url = self.url_of("sagemaker" if service in OF_SAGEMAKER else "aws")
        root = {"aws_access_key_id": self.root.access_key_id, "aws_secret_access_key": self.root.secret_access_key}
        key = credentials or root
        return boto3.client(service, endpoint_url=url, region_name="us-east-1", verify=str(self.authority), **key)

    def post_event(self, event: Any) -> tuple[int, Json]:
        try:
            body = event if isinstance(event, bytes) else json.dumps(event).encode()
            return 200, post_signed(f"{self.url}/_tunedrop/events", self.root, body, str(self.authority))
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="session")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulators]:
    emulators = Emulators(tmp_path_factory.mktemp("emulators"))
    emulators.start("sagemaker")
    emulators.start("aws")
    yield emulators
    emulators.stop()
