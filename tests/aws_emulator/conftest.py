"""The AWS emulator as its own process, with the SageMaker emulator beside it."""

import json
import os
import signal
import socket
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

from local_app.aws_emulator import MARKER

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
    """Both emulators over one folder; `kill` and `start` are a crash and what follows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {"aws": free_port(), "sagemaker": free_port()}
        self.url = f"http://127.0.0.1:{self.ports['aws']}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        port = self.ports[name]
        command = [sys.executable, "-m", f"local_app.{name}_emulator", "--port", str(port)]
        command += ["--state-dir", str(self.folder / name)]
        if name == "sagemaker":
            command += ["--s3-endpoint", self.url, "--event-sink", f"{self.url}/_tunedrop/events"]
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL_SAGEMAKER": f"http://127.0.0.1:{self.ports['sagemaker']}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "OF_THE_CALLER": "yes",
            MARKER: str(self.folder),
        }
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.processes[name] = process

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            return self.healthy(port)

        wait_for(answers)

    @staticmethod
    def healthy(port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_tunedrop/health"):
                return True
        except OSError:
            return False

    def kill(self, name: str) -> None:
        """As the kernel kills: no handler runs, nothing is saved on the way out."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(20)
        for process in psutil.process_iter():  # functions in the middle of something
            try:
                if process.environ().get(MARKER) == str(self.folder):
                    process.kill()
            except psutil.Error:
                continue

    def client(self, service: str) -> Any:
        port = self.ports["sagemaker" if service == "sagemaker" else "aws"]
        key = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client(service, endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **key)

    def post_event(self, event: Any) -> tuple[int, Json]:
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        request = urllib.request.Request(f"{self.url}/_tunedrop/events", data=body)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="session")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulators]:
    emulators = Emulators(tmp_path_factory.mktemp("emulators"))
    emulators.start("sagemaker")
    emulators.start("aws")
    yield emulators
    emulators.stop()
