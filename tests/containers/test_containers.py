"""What needs containers, run by `make containers`: the README's section on events as it is written, and jobs in Docker.

The application runs beside the containers; its rules are disabled, so that nothing acts but what is invoked here.
"""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import boto3
import docker
import pytest
import readme
from botocore.config import Config
from tiny_model import make_tiny_model

from benchmarks.chaos import CONFIG
from local_app.sagemaker.emulator import SageMakerEmulator
from local_app.sagemaker.sandbox import Docker
from local_app.sagemaker.server import serve
from local_app.stack import PROJECT, Stack
from pipeline.runs.states import RunState
from tunedrop_cli.deployment import Deployment

pytestmark = pytest.mark.containers

ROWS = "".join(f'{{"question": "{n}+1?", "answer": "{n + 1}"}}\n' for n in range(30)).encode()
# Any two of these answers are more or less alike: every group of a model's answers teaches something.
ALPHABETS = [ascii_lowercase[n:] + ascii_lowercase[:n] for n in range(12)]
EVENTS = [row for row in readme.rows() if row.event]
OF_A_RUN = [row for row in readme.rows() if not row.event]
INVOKE = "sam local invoke"


class App:
    """The application, in a folder of its own, and the README's commands for it."""

    def __init__(self, folder: Path):
        self.stack = Stack(folder / "state")
        bridge = docker.from_env().networks.get("bridge").attrs["IPAM"]["Config"][0]
        # An engine that chose the network itself names no gateway: it takes the first address.
        address = bridge.get("Gateway") or str(next(ip_network(bridge["Subnet"]).hosts()))
        self._replaced = {".tunedrop/": f"{self.stack.folder}/", "172.17.0.1": address}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SAM_SKIP_PULL_IMAGE": "1",
            "SAM_CLI_TELEMETRY": "0",
        }
        # `tunedrop` uses that folder, for the README's commands as well.
        command = folder / "bin" / "tunedrop"
        command.parent.mkdir()
        command.write_text(
            f'#!/bin/sh\nexec {Path(sys.executable).with_name("tunedrop")} --state {self.stack.folder} "$@"\n'
        )
        command.chmod(0o755)

    def run(self, commands: str) -> str:
        """Run commands of the README and return what they print; an error if one ends with another code than 0."""
        for shown, actual in self._replaced.items():
            commands = commands.replace(shown, actual)
        command = ["bash", "-e", "-o", "pipefail", "-c", commands]
        done = subprocess.run(command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def invoke(self, function: str, event: str) -> Any:
        """Invoke a function with an event, as the README shows it, and return what it answers."""
        *_, account, _ = readme.ONE_FUNCTION.splitlines()
        return json.loads(self.run(f"{account}\n{INVOKE} {function} --env-vars .tunedrop/env.json --event {event}"))

    def disable_rules(self) -> None:
        """Disable the rules of the stack, on both buses."""
        events = self.stack.client("events")
        for bus in ("default", self.stack.outputs.event_bus_name):
            for rule in events.list_rules(EventBusName=bus, NamePrefix="tunedrop")["Rules"]:
                events.disable_rule(Name=rule["Name"], EventBusName=bus)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, str]]:
    """The application, and what the README's commands printed that brought it up and invoked one function."""
    app = App(tmp_path_factory.mktemp("containers"))
    try:
        first, *others = readme.ONE_FUNCTION.splitlines(keepends=True)
        app.run(first)
        app.disable_rules()
        yield app, app.run("".join(others))
    finally:
        app.run("tunedrop down")


@pytest.fixture(scope="module")
def app(started: tuple[App, str]) -> App:
    return started[0]


def test_the_readmes_commands_invoke_a_function(started: tuple[App, str]) -> None:
    _, printed = started
    assert json.loads(printed.splitlines()[-1]) == {"looked_at": 0}


@pytest.mark.parametrize("row", EVENTS, ids=lambda row: row.event)
def test_every_event_is_answered_as_the_readme_says(row: readme.Row, app: App) -> None:
    answer = app.invoke(row.function, f"events/{row.event}.json")
    assert readme.fits(answer, row.answer), answer


def test_an_error_has_no_function_error_in_sams_emulator(app: App) -> None:
    *_, account, _ = readme.ONE_FUNCTION.splitlines()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"{account}\nexec sam local start-lambda --port {port} --env-vars {app.stack.folder}/env.json"
    server = subprocess.Popen(["bash", "-c", command], cwd=PROJECT, env=app.environment, stderr=subprocess.DEVNULL)
    try:
        client = boto3.client(
            "lambda", endpoint_url=f"http://127.0.0.1:{port}", config=Config(retries={"total_max_attempts": 60})
        )
        event = (PROJECT / "events/start_training.dataset_validated.json").read_bytes()
        answer = client.invoke(FunctionName="StartTrainingFunction", Payload=event)
        assert json.load(answer["Payload"])["errorType"] == "LookupError"
        assert answer.get("FunctionError") is None
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("cars.jsonl.gz", "cars"), ("Fragen & Antworten/größe+maß 100%.jsonl", "Fragen-Antworten-gr-e")],
)
def test_an_upload_that_is_there_becomes_a_run(name: str, slug: str, app: App) -> None:
    key = f"training_data/{name}"
    body = gzip.compress(ROWS) if name.endswith(".gz") else ROWS
    app.stack.client("s3").put_object(Bucket=app.stack.outputs.data_bucket, Key=key, Body=body)
    answer = app.invoke("ValidateDatasetFunction", f"<(tunedrop event '{key}')")
    assert readme.fits(answer, OF_A_RUN[0].answer.replace("cars", slug)), answer


def test_a_run_goes_from_upload_to_publication_by_sam_local_invoke_alone(app: App, tmp_path: Path) -> None:
    deployment = Deployment.local(app.stack)
    data, config = tmp_path / "cars.jsonl", tmp_path / "cars.yaml"
    data.write_text("".join(f'{{"question": "Say it from {text[0]}", "answer": "{text}"}}\n' for text in ALPHABETS))
    config.write_text(CONFIG)
    deployment.upload_model(make_tiny_model(tmp_path / "tiny"))
    deployment.upload(data, config)
    *_, account, _ = readme.ONE_FUNCTION.splitlines()
    for command, row in zip(readme.A_RUN.splitlines(), OF_A_RUN, strict=True):
        assert command.startswith(f"{INVOKE} {row.function} ")
        answer = json.loads(app.run(f"{account}\n{command}"))
        assert readme.fits(answer, row.answer), answer
        run = deployment.find("cars")
        wait_for_job(app, run.test_job or run.train_job)
        assert deployment.find("cars") == run  # the end of a job made nothing happen
    assert (run.state, run.attempt) == (RunState.PUBLISHED, 1)
    result = deployment.read_json(run, "result.json")
    assert result["run_id"] == run.run_id
    package = app.stack.client("sagemaker").describe_model_package(ModelPackageName=result["model_package"])
    assert package["ModelPackageStatus"] == "Completed"


def wait_for_job(app: App, job: str | None) -> None:
    """Wait for the end of a job, if there is one."""
    if job is not None:
        described = until_ended(app.stack.client("sagemaker"), job)
        assert described["TrainingJobStatus"] == "Completed", described.get("FailureReason")


def until_ended(sagemaker: Any, job: str) -> dict[str, Any]:
    """Return a job as it is described after its end."""
    deadline = time.monotonic() + 300
    while True:
        described: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=job)
        if described["TrainingJobStatus"] in {"Completed", "Failed", "Stopped"}:
            return described
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture
def sagemaker(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a SageMaker emulator that runs jobs in Docker, as where there are no namespaces."""
    for name, value in app.stack.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("local_app.sagemaker.jobs.find_sandbox", lambda _private: Docker())
    with SageMakerEmulator(tmp_path / "state", app.stack.endpoint, on_state_change=lambda _: None) as emulator:
        server = serve(emulator)
        yield boto3.client("sagemaker", endpoint_url=f"http://127.0.0.1:{server.port}")
        server.close()


def create_job(app: App, sagemaker: Any, name: str, script: str, **more: Any) -> None:
    """Start a job whose entry point is a shell script, in the image that the functions run in."""
    bucket = app.stack.outputs.artifact_bucket
    app.stack.client("s3").put_object(Bucket=bucket, Key=f"runs/{name}/input/run.sh", Body=script)
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{bucket}/runs/{name}/input/"}
    sagemaker.create_training_job(
        TrainingJobName=name,
        RoleArn=app.stack.outputs.sagemaker_role_arn,
        AlgorithmSpecification={
            "TrainingImage": "public.ecr.aws/lambda/python:3.13-x86_64",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/sh"],
            "ContainerArguments": ["-e", "/opt/ml/input/data/code/run.sh"],
        },
        HyperParameters={"greeting": "it's"},
        InputDataConfig=[{"ChannelName": "code", "DataSource": {"S3DataSource": source}}],
        OutputDataConfig={"S3OutputPath": f"s3://{bucket}/runs/{name}/training", "CompressionType": "NONE"},
        ResourceConfig={"InstanceType": "ml.g5.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
        StoppingCondition={"MaxRuntimeInSeconds": 600},
        **more,
    )


def output(app: App, job: str, name: str) -> str:
    key = f"runs/{job}/training/{job}/output/model/{name}"
    return app.stack.client("s3").get_object(Bucket=app.stack.outputs.artifact_bucket, Key=key)["Body"].read().decode()


# Asks the application for a sign of life, by the address and the certificate that a job's SDK takes.
ASK = (
    "import os, ssl, urllib.request as r; "
    "r.urlopen(os.environ['AWS_ENDPOINT_URL'] + '/_tunedrop/health', context=ssl.create_default_context("
    "cafile=os.environ['AWS_CA_BUNDLE']))"
)


def test_a_job_in_docker_has_its_files_and_reaches_the_application(app: App, sagemaker: Any) -> None:
    script = f"""python3.13 -c "{ASK}"
    cp /opt/ml/input/config/hyperparameters.json /opt/ml/model/
    echo $$ > /opt/ml/model/pid; uname -n; echo "in the container" """
    create_job(app, sagemaker, "in-docker", script)
    job = until_ended(sagemaker, "in-docker")
    lines = list(Deployment.local(app.stack).log_lines("in-docker", {}))
    assert job["TrainingJobStatus"] == "Completed", (job["FailureReason"], lines)
    assert json.loads(output(app, "in-docker", "hyperparameters.json")) == {"greeting": "it's"}
    assert output(app, "in-docker", "pid") == "1\n"
    assert "in the container" in lines


def test_an_isolated_job_in_docker_has_no_network_and_hears_that_it_is_stopped(app: App, sagemaker: Any) -> None:
    script = """trap 'echo stopped > /opt/ml/model/end; exit 0' TERM
    python3.13 -c "import socket; socket.create_connection(('172.17.0.1', 80), 5)" 2>&1 | tail -1 > /opt/ml/model/network
    echo ready; while :; do sleep 0.1; done"""
    create_job(app, sagemaker, "isolated-in-docker", script, EnableNetworkIsolation=True)
    deployment, deadline = Deployment.local(app.stack), time.monotonic() + 60
    while "ready" not in (lines := list(deployment.log_lines("isolated-in-docker", {}))):
        assert time.monotonic() < deadline, lines
        time.sleep(0.5)
    sagemaker.stop_training_job(TrainingJobName="isolated-in-docker")
    assert until_ended(sagemaker, "isolated-in-docker")["TrainingJobStatus"] == "Stopped"
    assert output(app, "isolated-in-docker", "end") == "stopped\n"
    assert "Network is unreachable" in output(app, "isolated-in-docker", "network")
