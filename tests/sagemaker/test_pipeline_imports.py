"""The real deploy_model deploys a line on Bedrock: it imports, proves and replaces models against the emulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from components import CONTAINER
from fake_serving import FakeServing
from fake_stack import ARTIFACTS, TABLE
from moto.server import ThreadedMotoServer
from world import GOOD_DATA, WON, World, deployed

from local_app.sagemaker.emulator import BEDROCK_OPERATIONS, SageMakerEmulator
from local_app.sagemaker.server import serve
from pipeline.aws import Aws
from pipeline.runs.deployments import Stage
from pipeline.runs.states import Run
from pipeline.settings import DeploySettings
from pipeline.stages.deploy_model import look_at_all

from .conftest import wait_for


@pytest.fixture
def world(load_event: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A stack in moto, whose Bedrock is the emulator. The emulator reads moto's S3 through moto's server."""
    theirs = {name for names in BEDROCK_OPERATIONS.values() for name in names}
    has = FakeServing.has
    monkeypatch.setattr(FakeServing, "has", staticmethod(lambda operation: operation not in theirs and has(operation)))
    with deployed(load_event) as world:
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        emulator = SageMakerEmulator(
            tmp_path,
            f"http://{host}:{port}",
            on_state_change=lambda _: None,
            server_command=CONTAINER,
            account="123456789012",
        )
        with emulator, serve(emulator) as server:
            for service in ("BEDROCK", "BEDROCK_RUNTIME"):
                monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", f"http://127.0.0.1:{server.port}")
            yield world
        moto.stop()


def approved(world: World, body: bytes, answers: dict[str, str]) -> Run:
    """A run for Bedrock that its line's gate approves, whose model answers so."""
    world.put("training_data/cars.yaml", b"serve: {target: bedrock}")
    run = world.trained(world.drop("training_data/cars.jsonl", body))
    merged = f"{world.artifacts(str(run.train_job)).removeprefix(f's3://{ARTIFACTS}/')}merged/"
    files = {"config.json": '{"architectures": ["Qwen3ForCausalLM"]}', "answers.json": json.dumps(answers)}
    for name, content in (files | {"model.safetensors": "-", "tokenizer.json": "{}", "tokenizer_config.json": "{}"}).items():
        world.write(merged + name, content.encode())
    return world.tested(run, [{**each, "champion": each["base"]} for each in WON])


def test_a_line_is_deployed_on_bedrock_and_a_wrong_model_is_refused(world: World) -> None:
    aws, bedrock = Aws(TABLE), boto3.client("bedrock")
    answers = {name: {each["prompt"][-1]["content"]: each[name]["text"] for each in WON} for name in ("tuned", "base")}

    def look() -> None:
        wait_for(lambda: not look_at_all(DeploySettings.from_environment(), aws), 30)

    right = approved(world, GOOD_DATA, answers["tuned"])
    look()
    deployment = aws.deployments.get("cars")
    assert (deployment.stage, deployment.run) == (Stage.IDLE, right.run_id), deployment
    assert deployment.answered == "20 of 20 answers were those of the tested model"
    [model] = bedrock.list_imported_models()["modelSummaries"]
    assert model["modelArn"] == deployment.component

    wrong = approved(world, GOOD_DATA * 2, answers["base"])
    look()
    deployment = aws.deployments.get("cars")
    assert deployment.run == right.run_id
    assert "does not answer as the tested model: 0 of 20 answers" in deployment.refused[wrong.run_id]
    assert bedrock.list_imported_models()["modelSummaries"] == [model]
