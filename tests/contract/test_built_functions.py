"""Every event of `events/` into its built function, run by AWS's own Lambda runtime emulator."""

import gzip
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import readme
from fake_stack import ARTIFACTS, DATA, create_resources
from moto.server import ThreadedMotoServer

from local_app.build import build
from local_app.stack import PROJECT

EVENTS = sorted(path.stem for path in (PROJECT / "events").glob("*.json"))
# It comes inside aws-sam-cli, which uses it in its containers.
EMULATOR = next((PROJECT / ".venv-sam").glob("lib/python*/site-packages/samcli/local/rapid")) / (
    "aws-lambda-rie-arm64" if platform.machine() in {"arm64", "aarch64"} else "aws-lambda-rie-x86_64"
)
ROWS = b"".join(b'{"question": "%d+1?", "answer": "%d"}\n' % (n, n + 1) for n in range(30))
ANSWERS = {row.event: row for row in readme.rows() if row.event}
UPLOADS = [name for name in EVENTS if name.startswith("validate_dataset.") and name != "validate_dataset.outside"]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A function's environment, with moto's server as AWS."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    account = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in account.items():
            patch.setenv(name, value)
        yield account | create_resources()
    server.stop()


def start(function: str, paths: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start the runtime of a function that sees `paths` alone, and return its process and the port that it listens on."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, api = probe.getsockname()[1], other.getsockname()[1]
    boot = f"import sys; sys.path[:0] = {paths!r}; from awslambdaric.__main__ import main; main(sys.argv)"
    command = [str(EMULATOR), "--runtime-interface-emulator-address", f"127.0.0.1:{port}", "--runtime-api-address"]
    command += [f"127.0.0.1:{api}", sys.executable, "-S", "-c", boot, f"{function}.app.handler"]
    process = subprocess.Popen(
        command,
        cwd=paths[0],
        env={
            "PATH": os.environ["PATH"],
            "AWS_LAMBDA_FUNCTION_TIMEOUT": "60",
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return process, port


def post(port: int, event: dict[str, Any]) -> Any:
    """Send an event to the runtime on a port, as soon as it listens, and return the function's answer."""
    url = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"
    request = urllib.request.Request(url, json.dumps(event).encode())
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except ConnectionRefusedError:
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture(scope="module")
def invoke(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """Invoke a built function, each in a runtime of its own that sees the function and its layers alone."""
    built = build()
    client = tmp_path_factory.mktemp("runtime-client")  # Lambda keeps it beside the interpreter, not in the artefact
    for distribution in ("awslambdaric", "simplejson", "snapshot-restore-py"):
        files = importlib.metadata.files(distribution) or []
        for top in {file.parts[0] for file in files if ".." not in file.parts}:
            (client / top).symlink_to(Path(sysconfig.get_path("platlib")) / top)
    runtimes: dict[str, tuple[subprocess.Popen[bytes], int]] = {}

    def invoke(function: str, event: dict[str, Any]) -> Any:
        if function not in runtimes:
            runtimes[function] = start(function, [*built.paths(function), str(client)], environment)
        return post(runtimes[function][1], event)

    yield invoke
    for process, _ in runtimes.values():
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_of_what_is_not_there_is_answered_as_the_readme_says(name, invoke, load_event):
    assert ANSWERS[name].function == name.split(".")[0].title().replace("_", "") + "Function"
    answer = invoke(name.split(".")[0], load_event(name))
    assert readme.fits(answer, ANSWERS[name].answer), answer


@pytest.mark.parametrize("name", UPLOADS)
def test_once_its_object_is_there_an_upload_becomes_a_run(name, invoke, load_event, environment):
    event = load_event(name)
    uploaded = event["detail"].get("object", event["detail"])  # as S3 says it, or as we ask for it
    body = gzip.compress(ROWS) if uploaded["key"].endswith(".gz") else ROWS
    stored = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).put_object(
        Bucket=DATA, Key=uploaded["key"], Body=body
    )
    uploaded["version_id" if "version_id" in uploaded else "version-id"] = stored["VersionId"]
    uploaded["sequencer"] = f"0055AED6DCD90282{UPLOADS.index(name):02X}"  # later than those of other tests
    answer = invoke("validate_dataset", event)
    slug = "Fragen-Antworten-gr-e" if name == "validate_dataset.odd_key" else "cars"
    shown = next(row.answer for row in readme.rows() if not row.event and row.function == "ValidateDatasetFunction")
    assert readme.fits(answer, shown.replace("cars", slug)), answer
    assert invoke("validate_dataset", event) == answer  # a second delivery


def test_tokens_are_counted_with_the_layer_alone(invoke, load_event, environment):
    s3 = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
    event = load_event("validate_dataset.gzipped")
    stored = s3.put_object(Bucket=DATA, Key=event["detail"]["object"]["key"], Body=gzip.compress(ROWS + ROWS))
    event["detail"]["object"] |= {"version-id": stored["VersionId"], "sequencer": "0055AED6DCD90283"}
    answer = invoke("validate_dataset", event)
    receipt = s3.get_object(Bucket=ARTIFACTS, Key=f"runs/{answer['run_id']}/validation.json")["Body"].read()
    assert json.loads(receipt)["tokens"]["sample"] == 60


def test_a_parquet_file_is_read_by_the_artefact_alone(invoke, load_event, environment, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": ["1", "2", "3"]}), tmp_path / "t.parquet")
    s3 = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
    event = load_event("validate_dataset.upload")
    key = "training_data/table.parquet"
    stored = s3.put_object(Bucket=DATA, Key=key, Body=(tmp_path / "t.parquet").read_bytes())
    event["detail"]["object"] |= {"key": key, "version-id": stored["VersionId"]}
    # Three rows give no held-out row, so the tests have to come along.
    tests = {"evaluations": [{"id": "1", "prompt": "a", "description": "1"}]}
    s3.put_object(Bucket=DATA, Key="inference_test/table.json", Body=json.dumps(tests).encode())
    answer = invoke("validate_dataset", event)
    assert answer["status"] == "VALIDATED"
    receipt = s3.get_object(Bucket=ARTIFACTS, Key=f"runs/{answer['run_id']}/validation.json")["Body"].read()
    assert json.loads(receipt)["rows"] == 3
