"""Broken and hostile input through the handlers: a receipt with a reason, nothing left in between, nothing executed."""

import json
import re
from pathlib import Path

import pytest
from fake_stack import ARTIFACTS, DATA
from hostile import CONFIG_KEY, CONFIGS, DATASETS, GOOD, KEYS, MODELS, TESTS, TESTS_KEY
from world import deployed

from pipeline.runs.states import RunState
from pipeline.runs.table import RUN

EVENTS = Path(__file__).parents[2] / "events"
PWNED = Path("/tmp/tunedrop-pwned")


@pytest.fixture(scope="module")
def world():
    """One stack for all: what one case leaves behind must not trouble the next."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with deployed(lambda name: json.loads((EVENTS / f"{name}.json").read_text())) as world:
            yield world


@pytest.fixture(autouse=True)
def nothing_stays(world):
    """Take away what a case puts beside its dataset: config, tests, files of the base model."""

    def keys():
        return {item["Key"] for item in world.aws.s3.list_objects_v2(Bucket=DATA, Prefix="models/")["Contents"]}

    before = {key: world.aws.read(DATA, key) for key in keys()}
    yield
    for key in {CONFIG_KEY, TESTS_KEY} | (keys() - before.keys()):
        world.aws.s3.delete_object(Bucket=DATA, Key=key)
    for key, body in before.items():
        if world.aws.read(DATA, key) != body:
            world.put(key, body)


@pytest.fixture(autouse=True)
def nothing_runs():
    PWNED.unlink(missing_ok=True)
    yield
    assert not PWNED.exists()


def receipt_of(world, run):
    """The receipt of a run that has ended, or waits for its training job, with nothing left to say or to do before that."""
    upload = world.aws.runs.upload(run.key)
    assert (upload["run_id"], upload["state"], "open" in upload) == (run.run_id, run.state, False)
    assert (run.open is None) == (run.state == RunState.REJECTED)
    assert world.event_types[-1] == f"Dataset {run.state.title()}"
    return world.read_json(f"runs/{run.run_id}/validation.json")


def check(world, run, codes, says=""):
    receipt = receipt_of(world, run)
    assert run.state == (RunState.REJECTED if codes else RunState.VALIDATED), receipt["errors"]
    assert set(receipt["error_counts"]) <= set(codes)
    assert bool(receipt["error_counts"]) == bool(codes)
    messages = [f"{error['message']} {error.get('hint', '')}" for error in receipt["errors"]]
    assert any(says in message for message in messages) or not codes
    assert all(len(message) < 1000 for message in messages)


@pytest.mark.parametrize("case", DATASETS, ids=str)
def test_datasets(world, case):
    run = world.drop(f"training_data/cars{case.suffix}", case.body())
    check(world, run, case.codes, case.says)


@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_configs(world, case):
    world.put(CONFIG_KEY, case.body())
    check(world, world.drop(), case.codes, case.says)


@pytest.mark.parametrize("case", TESTS, ids=str)
def test_inference_tests(world, case):
    world.put(TESTS_KEY, case.body())
    check(world, world.drop(), case.codes, case.says)


@pytest.mark.parametrize(("name", "body", "code"), MODELS, ids=[f"{name} {code}" for name, _, code in MODELS])
def test_models(world, name, body, code):
    world.put(f"models/base/{name}", body)
    check(world, world.drop(), {code, "TOKENIZER"} if name.startswith("tokenizer") else {code})


@pytest.mark.parametrize(("key", "dataset"), KEYS.items(), ids=[key[:40] for key in KEYS])
def test_keys(world, key, dataset):
    before, runs = set(Path.cwd().iterdir()), runs_of(world)
    answer = world.handle("validate_dataset", world.upload_event(key))
    assert bool(answer) == dataset
    assert set(Path.cwd().iterdir()) == before
    if not dataset:
        assert runs_of(world) == runs
        return
    run = world.run(answer["run_id"])
    assert receipt_of(world, run)["source"]["key"] == key
    # A run's objects are below its folder, and its name is one that SageMaker takes.
    assert re.fullmatch(r"[a-zA-Z0-9-]{1,36}", run.run_id)
    listed = world.aws.s3.list_objects_v2(Bucket=ARTIFACTS)["Contents"]
    places = {item["Key"].split("/")[1] for item in listed if item["Key"].startswith("runs/")}
    assert places == {identifier.removeprefix(RUN) for identifier in runs_of(world)}
    world.job_requests.clear()
    assert world.start(run).state in {RunState.TRAINING, RunState.WAITING}


def runs_of(world):
    pages = world.aws.runs._table.meta.client.get_paginator("scan").paginate(TableName=world.aws.runs._table.name)
    return {item["id"] for page in pages for item in page["Items"] if item["id"].startswith(RUN)}


def test_an_object_that_changes_while_it_is_read_is_the_version_of_its_event(world):
    event = world.upload_event("training_data/cars.jsonl", GOOD)
    world.put("training_data/cars.jsonl", b"something else")
    run = world.run(world.handle("validate_dataset", event)["run_id"])
    assert (run.state, run.rows) == (RunState.VALIDATED, 30)
    assert run.version_id == event["detail"]["object"]["version-id"]


def test_a_model_that_changes_is_another_run(world):
    first = world.drop("training_data/a.jsonl")
    world.put("models/base/model.safetensors", b"y")
    assert world.drop("training_data/a.jsonl").run_id != first.run_id
