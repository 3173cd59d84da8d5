"""`local_app.stack`: up, crash, up again, down; with the real template and the real `sam`."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fake_stack import plan_request
from tiny_tokenizer import tokenizer_files

from local_app.common import MARKER
from local_app.stack import OF_SAGEMAKER, PROJECT, Stack, StackError
from pipeline.runs.states import RunState
from tunedrop_cli.deployment import Deployment

from .conftest import wait_for


def started_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "app")
    yield stack
    stack.down()


def test_what_is_not_up_says_so(stack: Stack) -> None:
    with pytest.raises(StackError, match=re.escape("not running in") + ".*tunedrop up"):
        _ = stack.outputs


def release_a_job_that_fails(stack: Stack) -> None:
    """Store a launch plan whose jobs end at once, and a base model for the runs."""
    s3, outputs = stack.client("s3"), stack.outputs
    plan: dict[str, Any] = {"digest": "0"}
    for kind in ("train", "test"):
        plan[kind] = plan_request(kind) | {"RoleArn": outputs.sagemaker_role_arn}
        plan[kind]["AlgorithmSpecification"]["ContainerArguments"] = ["-c", "exit 1"]
    for name in ("current", "0"):
        s3.put_object(Bucket=outputs.artifact_bucket, Key=f"launch_plans/{name}.json", Body=json.dumps(plan).encode())
    for name, body in {"config.json": b"{}", "model.safetensors": b"{}", **tokenizer_files()}.items():
        s3.put_object(Bucket=outputs.data_bucket, Key=f"models/SmolLM2-135M-Instruct/{name}", Body=body)


def declared_variables() -> dict[str, set[str]]:
    """Return the names of each function's variables in template.yaml, by logical id."""
    template = yaml.load((PROJECT / ".aws-sam/local/template.yaml").read_text(), Loader=yaml.BaseLoader)
    shared = template["Globals"]["Function"]["Environment"]["Variables"].keys()
    functions = {n: r for n, r in template["Resources"].items() if r["Type"] == "AWS::Serverless::Function"}
    return {name: shared | function["Properties"]["Environment"]["Variables"].keys() for name, function in functions.items()}


@pytest.mark.soak  # test_local_app has up and down
def test_up_crash_up_down_on_an_address_of_ones_own(stack: Stack, tmp_path: Path) -> None:
    """As with `tunedrop up --host`: no server listens on 127.0.0.1, and all servers and functions reach each other."""
    lines: list[str] = []
    serving = {"EndpointInstanceType": "ml.g5.xlarge"}  # every function is deployed
    stack = Stack(stack.folder, host="127.0.0.2", parameters=serving, progress=lines.append)
    outputs = stack.up()

    variables = stack.client("lambda").get_function_configuration(FunctionName="tunedrop-start-training")["Environment"]
    for service in OF_SAGEMAKER.values():
        assert variables["Variables"][f"AWS_ENDPOINT_URL_{service}"] == stack.sagemaker_endpoint
    assert variables["Variables"]["MAX_CONCURRENT_JOBS"] == "1"
    # `sam local invoke` sets the declared variables: the deployed functions have all of them.
    declared = declared_variables()
    assert {name: set(each) for name, each in stack.function_environments("/opt/ca.pem").items()} == declared
    assert (PROJECT / ".venv/bin/sam").samefile(PROJECT / ".venv-sam/bin/sam")
    addresses = {c.laddr for p in started_in(stack.folder) for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in addresses} == {"127.0.0.2"}
    # A dataset becomes a run. Its job starts and fails, and each function receives its event.
    release_a_job_that_fails(stack)
    deployment = Deployment.local(stack)
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"question": "{n}+1?", "answer": "{n + 1}"}}\n' for n in range(20)))
    key, _ = deployment.upload(tmp_path / "sums.jsonl")
    wait_for(lambda: (deployment.runs.upload(key) or {}).get("run_id"), 60)
    run = deployment.find("sums")
    assert (run.rows, run.state != RunState.REJECTED) == (20, True)
    wait_for(lambda: deployment.find("sums").state == RunState.TRAINING_FAILED, 60)
    # The functions used their own roles, and IAM allowed every call.
    calls = [json.loads(line) for line in (stack.folder / "aws" / "calls.jsonl").read_text().splitlines()]
    assert {("s3:GetObjectVersion", True), ("s3:PutObject", True)} <= {(c["action"], c["allowed"]) for c in calls}
    assert [call for call in calls if not call["allowed"]] == []

    for process in started_in(stack.folder):
        process.kill()
    psutil.wait_procs(started_in(stack.folder), timeout=10)
    assert not stack.running

    lines.clear()
    assert stack.up() == outputs
    assert "stack: unchanged since the last deploy" in lines
    assert Deployment.local(stack).find("sums").run_id == run.run_id
    assert Stack(stack.folder).outputs == outputs  # as another process reads them

    stack.down()
    assert started_in(stack.folder) == []
