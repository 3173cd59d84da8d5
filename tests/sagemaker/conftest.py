"""A SageMaker emulator for each test. S3 and CloudWatch Logs (moto's server) are shared by a module."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from components import CONTAINER, Serving
from moto.server import ThreadedMotoServer

from local_app.sagemaker.api import service_model
from local_app.sagemaker.constraints import shape_problems
from local_app.sagemaker.emulator import OPERATIONS, SageMakerEmulator
from local_app.sagemaker.metrics import Metrics
from local_app.sagemaker.server import serve

Json = dict[str, Any]
ROLE = "arn:aws:iam::123456789012:role/SageMakerRole"
FINAL = ("Completed", "Failed", "Stopped")


def wait_for(condition: Callable[[], Any], seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return result


# Of a module, and not of the session: `mock_aws` of another module empties moto's state, which is the process's.
@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "local")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "local")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="art")
        yield url
    server.stop()


@pytest.fixture(scope="module")
def s3(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint)


@pytest.fixture(scope="module")
def logs(endpoint: str) -> Any:
    return boto3.client("logs", endpoint_url=endpoint)


@dataclass
class Local:
    """An emulator for a test: a boto3 client, the delivered events, and helpers for jobs."""

    client: Any
    s3: Any
    url: str
    folder: Path
    events: list[Json] = field(default_factory=list)
    close: Callable[[], None] = lambda: None
    emulator: Any = None  # in this process

    @property
    def metrics(self) -> Metrics:
        """The metrics of the emulator."""
        metrics: Metrics = self.emulator.metrics
        return metrics

    def create(self, name: str, script: str, **changes: Any) -> str:
        """Create a job whose entry point is the bash script `script` in the `code` channel."""
        self.client.create_training_job(**self.request(name, script, **changes))
        return name

    def request(self, name: str, script: str, *, specification: Json | None = None, **changes: Any) -> Json:
        self.s3.put_object(Bucket="art", Key=f"code/{name}/run.sh", Body=script)
        request = {
            "TrainingJobName": name,
            "RoleArn": ROLE,
            "AlgorithmSpecification": {
                "TrainingImage": "000000000000.dkr.ecr.us-east-1.amazonaws.com/train:1",
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["/bin/bash"],
                "ContainerArguments": ["/opt/ml/input/data/code/run.sh"],
                **(specification or {}),
            },
            "InputDataConfig": [self.channel("code", f"s3://art/code/{name}/")],
            "OutputDataConfig": {"S3OutputPath": f"s3://art/out/{name}", "CompressionType": "NONE"},
            "ResourceConfig": {"InstanceType": "ml.g5.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
            "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
        }
        return request | changes

    @staticmethod
    def channel(name: str, uri: str, **more: Any) -> Json:
        source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
        return {"ChannelName": name, "DataSource": {"S3DataSource": source}, **more}

    @staticmethod
    def until(condition: Callable[[], Any], seconds: float = 15) -> Any:
        return wait_for(condition, seconds)

    def interrupt(self, name: str) -> int:
        """Request a spot interruption and return the HTTP status."""
        request = urllib.request.Request(f"{self.url}/_tunedrop/interrupt/{name}", method="POST")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def post(self, operation: str, request: Json | bytes) -> tuple[int, Json]:
        """Call the API without botocore's checks."""
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        http = urllib.request.Request(self.url, data=body, headers={"X-Amz-Target": f"SageMaker.{operation}"})
        try:
            with urllib.request.urlopen(http) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def statuses(self, name: str) -> list[str]:
        return [transition["Status"] for transition in self.describe(name)["SecondaryStatusTransitions"]]

    def describe(self, name: str) -> Json:
        return self.client.describe_training_job(TrainingJobName=name)

    def wait(self, name: str, *statuses: str) -> Json:
        """Wait for one of the statuses or secondary statuses; without any, for a final status."""

        def arrived() -> Json | None:
            job = self.describe(name)
            return job if {job["TrainingJobStatus"], job["SecondaryStatus"]} & set(statuses or FINAL) else None

        return wait_for(arrived)

    def log(self, name: str) -> str:
        """The output of the job's processes."""
        return (self.folder / "jobs" / name / "job.log").read_text()

    def keys(self, prefix: str) -> list[str]:
        return [item["Key"] for item in self.s3.list_objects_v2(Bucket="art", Prefix=prefix).get("Contents", [])]

    def text(self, key: str) -> str:
        return self.s3.get_object(Bucket="art", Key=key)["Body"].read().decode()

    def wait_for_key(self, key: str) -> str:
        wait_for(lambda: key in self.keys(key))
        return self.text(key)


def sagemaker_client(url: str, service: str = "sagemaker") -> Any:
    """A boto3 client that also checks every response against the output shape of botocore's model."""
    client = boto3.client(service, endpoint_url=url, config=Config(retries={"total_max_attempts": 1}))

    def check(http_response: Any, model: Any, **_: Any) -> None:
        if http_response.status_code == 200 and model.output_shape:
            problems = shape_problems(model.output_shape, json.loads(http_response.content))
            assert not problems, f"{model.name}: {problems}"

    client.meta.events.register(f"after-call.{service}", check)
    return client


def launch(endpoint: str, s3: Any, folder: Path, **options: Any) -> Local:
    events: list[Json] = []
    settings: Json = {"on_state_change": events.append, "grace": 2, "checkpoint_interval": 0.2} | options
    emulator = SageMakerEmulator(folder, endpoint, **settings)
    server = serve(emulator)

    def close() -> None:
        server.close()
        emulator.close()

    url = f"http://127.0.0.1:{server.port}"
    client = sagemaker_client(url)
    return Local(client=client, s3=s3, url=url, folder=folder, events=events, close=close, emulator=emulator)


@pytest.fixture
def start(endpoint: str, s3: Any, tmp_path: Path) -> Iterator[Callable[..., Local]]:
    """Start an emulator in this process, always in the same folder. The options are SageMakerEmulator's."""
    started: list[Local] = []

    def begin(**options: Any) -> Local:
        started.append(launch(endpoint, s3, tmp_path / "state", **options))
        return started[-1]

    yield begin
    for local in started:
        local.close()


@pytest.fixture(scope="module")
def idle(endpoint: str, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """One emulator for all tests without jobs."""
    local = launch(endpoint, s3, tmp_path_factory.mktemp("idle") / "state")
    yield local
    local.close()


@pytest.fixture
def local(start: Callable[..., Local]) -> Local:
    return start()


def serving_of(local: Local, **variant: Any) -> Serving:
    """An endpoint `ep` of an emulator."""
    serving = Serving(local, sagemaker_client(local.url, "application-autoscaling"))
    serving.endpoint(**variant)
    return serving


@pytest.fixture
def hosted(start: Callable[..., Local]) -> Callable[..., Serving]:
    """Start an emulator with the endpoint `ep`, whose containers start at once."""
    return lambda **options: serving_of(start(**{"server_command": CONTAINER, "startup_limit": 10.0} | options))


@pytest.fixture(scope="module")
def shared(endpoint: str, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One emulator with a base component, for all tests that change neither."""
    local = launch(endpoint, s3, tmp_path_factory.mktemp("shared") / "state", server_command=CONTAINER)
    serving = serving_of(local)
    serving.base()
    yield serving
    local.close()


class Sink:
    """Receives events by POST, as the AWS emulator does (not while `broken` is set), and authorizes every request."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.broken = False
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                event = self.path == "/_tunedrop/events"
                self.send_response(503 if event and sink.broken else 204)
                self.end_headers()
                if event and not sink.broken:
                    sink.events.append(json.loads(body))

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url, self.authorizer = (
            f"http://127.0.0.1:{self.server.server_port}/_tunedrop/{path}" for path in ("events", "authorize")
        )


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.server.shutdown()
    sink.server.server_close()


@pytest.fixture
def command(
    endpoint: str, s3: Any, sink: Sink, tmp_path: Path
) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Local]]]:
    """Start the emulator by its command line, always in the same state folder."""
    processes = []

    def begin(*options: str) -> tuple[subprocess.Popen[bytes], Local]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = ["--port", str(port), "--state-dir", str(tmp_path / "state"), "--s3-endpoint", endpoint]
        arguments += ["--event-sink", sink.url, "--authorizer", sink.authorizer, "--grace", "2", *options]
        process = subprocess.Popen([sys.executable, "-m", "local_app.sagemaker.server", *arguments])
        processes.append(process)
        url = f"http://127.0.0.1:{port}"

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/_tunedrop/health") as answer:
                    return json.load(answer)["status"] == "ok"
            except OSError:
                assert process.poll() is None
                return False

        wait_for(healthy)
        return process, Local(client=sagemaker_client(url), s3=s3, url=url, folder=tmp_path / "state", events=sink.events)

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def supported_shapes() -> list[Any]:
    operations = [service_model().operation_model(name) for name in OPERATIONS]
    return [shape for operation in operations for shape in (operation.input_shape, operation.output_shape) if shape]
