"""`local_app.stack`: up, crash, up again, down; with the real template and the real `sam`."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from local_app.aws_emulator import MARKER
from local_app.stack import Stack, StackError

from .conftest import wait_for


def started_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def receipt(stack: Stack, bucket: str) -> str | None:
    """The key of the first receipt there is."""
    listed = stack.client("s3").list_objects_v2(Bucket=bucket, Prefix="runs/").get("Contents", [])
    return next((item["Key"] for item in listed if item["Key"].endswith("/validation.json")), None)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "app")
    yield stack
    stack.down()


def test_what_is_not_up_says_so(stack: Stack) -> None:
    with pytest.raises(StackError, match=re.escape("not running in") + ".*tunedrop up"):
        _ = stack.outputs


def test_up_crash_up_down(stack: Stack) -> None:
    said: list[str] = []
    stack = Stack(stack.folder, progress=said.append)
    outputs = stack.up()

    variables = stack.client("lambda").get_function_configuration(FunctionName="tunedrop-start-training")["Environment"]
    assert variables["Variables"]["AWS_ENDPOINT_URL_SAGEMAKER"] == stack.sagemaker_endpoint
    assert variables["Variables"]["MAX_CONCURRENT_JOBS"] == "1"
    addresses = {c.laddr for p in started_in(stack.folder) for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    # A dataset that cannot be one goes through the real validate_dataset and comes back as a receipt.
    s3 = stack.client("s3")
    plan = b'{"digest": "0", "train": {}, "test": {}}'
    for name in ("current", "0"):
        s3.put_object(Bucket=outputs.artifact_bucket, Key=f"launch_plans/{name}.json", Body=plan)
    s3.put_object(Bucket=outputs.data_bucket, Key="training_data/broken.jsonl", Body=b"{")
    key = wait_for(lambda: receipt(stack, outputs.artifact_bucket))
    # It did so with its own role, which IAM let do all that it did.
    calls = [json.loads(line) for line in (stack.folder / "aws" / "calls.jsonl").read_text().splitlines()]
    assert {("s3:GetObjectVersion", True), ("s3:PutObject", True)} <= {(c["action"], c["allowed"]) for c in calls}
    assert [call for call in calls if not call["allowed"]] == []

    for process in started_in(stack.folder):
        process.kill()
    psutil.wait_procs(started_in(stack.folder), timeout=10)
    assert not stack.running

    said.clear()
    assert stack.up() == outputs
    assert "stack: nothing changed since it was deployed" in said
    assert s3.get_object(Bucket=outputs.artifact_bucket, Key=key)["Body"].read()
    assert Stack(stack.folder).outputs == outputs  # as another process finds it

    stack.down()
    assert started_in(stack.folder) == []
