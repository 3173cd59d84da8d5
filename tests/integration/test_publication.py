"""What a publication leaves: the package, its statistics, the page of all runs, and events that users' rules take."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.client import BaseClient
from fake_stack import ARTIFACTS, PLAN, SERVING_IMAGE

from local_app.aws.hooks import matches_pattern
from pipeline.publish.index import read_index
from pipeline.publish.result import cost
from pipeline.runs.states import RunState
from tunedrop import object_keys

RULES = Path(__file__).parents[2] / "events" / "rules"


def index(world):
    return read_index(world.aws.read(ARTIFACTS, object_keys.INDEX).decode())


def published(world, name="cars", config=b"rewards: [{type: exact_match}]\n"):
    world.put(f"training_data/{name}.yaml", config)
    return world.tested(world.trained(world.drop(f"training_data/{name}.jsonl")))


def test_the_model_package(world):
    run = published(world, config=b"rewards: [{type: exact_match}]\nmax_seq_length: 900\n")
    result = world.read_json(f"runs/{run.run_id}/result.json")
    package = world.aws.sagemaker.describe_model_package(ModelPackageName=result["model_package"])
    (container,) = package["InferenceSpecification"]["Containers"]
    assert container["Image"] == SERVING_IMAGE
    assert container["Environment"] == {
        "SM_VLLM_MODEL": "/opt/ml/model",
        "SM_VLLM_DTYPE": "bfloat16",
        "SM_VLLM_MAX_MODEL_LEN": "900",
    }
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == result["artifacts"]["merged_model"]
    assert (
        package["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"]
        == f"s3://{ARTIFACTS}/runs/{run.run_id}/model_quality.json"
    )
    properties = package["CustomerMetadataProperties"]
    assert (
        properties.items()
        >= {
            "run_id": run.run_id,
            "verdict": "APPROVED",
            "base_model": "base",
            "trainer": PLAN,
            "data": "s3://data-bucket/training_data/cars.jsonl",
            "config": f"s3://{ARTIFACTS}/runs/{run.run_id}/input/config.json",
        }.items()
    )
    assert all(0 < len(value) <= 256 for value in properties.values())
    quality = world.read_json(f"runs/{run.run_id}/model_quality.json")
    assert quality["dataset"] == {"item_count": 30}
    metrics = quality["regression_metrics"]
    assert (metrics["base.reward"]["value"], metrics["tuned.reward"]["value"], metrics["lift.reward"]["value"]) == (
        0.0,
        1.0,
        1.0,
    )
    assert 0 < metrics["lift.reward.exact_match"]["standard_deviation"] < 0.2


def test_odd_names_are_registered_in_characters_that_the_registry_takes(world):
    run = published(world, "a b+c%25 100%/gr\u00f6\u00dfe (1)")
    package = world.aws.sagemaker.describe_model_package(ModelPackageName=run.model_package)
    assert (
        package["CustomerMetadataProperties"]["data"]
        == "s3://data-bucket/training_data/a b+c_25 100_/gr\u00f6\u00dfe _1_.jsonl"
    )
    assert package["CustomerMetadataProperties"]["base_model_license"] == "not stated"


@pytest.mark.parametrize("said", ["ValidationException", "ResourceInUse"])
def test_all_runs_are_registered_in_one_group(world, said):
    """Nothing is asked for before there is a group; that it is there is no news, however SageMaker says so."""
    world.group_is_there = said
    packages = [published(world, name).model_package for name in ("cars", "faq")]
    (group,) = world.groups
    assert [package.rpartition(":")[2] for package in packages] == [f"model-package/{group}/{version}" for version in (1, 2)]


def test_every_published_run_is_in_the_index_once(world):
    runs = [published(world, name) for name in ("cars", "faq")]
    assert [each.run_id for each in index(world)] == [run.run_id for run in reversed(runs)]
    assert (index(world)[0].base, index(world)[0].tuned, index(world)[0].verdict) == (0.0, 1.0, "APPROVED")
    before = world.aws.s3.head_object(Bucket=ARTIFACTS, Key=object_keys.INDEX)["VersionId"]
    world.tested(world.run(runs[0].run_id))  # delivered again
    assert world.aws.s3.head_object(Bucket=ARTIFACTS, Key=object_keys.INDEX)["VersionId"] == before


def test_publications_at_the_same_time_lose_nothing(world, monkeypatch):
    """Whenever one publication has read the index, another one writes it."""
    monkeypatch.setenv("MAX_CONCURRENT_JOBS", "9")
    names = ["b", "c", "d"]
    runs = {name: world.trained(world.drop(f"training_data/{name}.jsonl")) for name in names}
    make_api_call = BaseClient._make_api_call

    def interrupted(client, operation, arguments):
        try:
            return make_api_call(client, operation, arguments)
        finally:
            if operation == "GetObject" and arguments["Key"] == object_keys.INDEX and names:
                world.tested(runs[names.pop()])

    first = world.trained(world.drop("training_data/a.jsonl"))
    with pytest.MonkeyPatch.context() as patch:  # undone before the world's own
        patch.setattr(BaseClient, "_make_api_call", interrupted)
        world.tested(first)
    assert names == []
    assert sorted(run.dataset for run in index(world)) == ["a", "b", "c", "d"]
    assert all(world.run(run.run_id).state == RunState.PUBLISHED for run in [first, *runs.values()])


@pytest.mark.parametrize("change", [{"EnableManagedSpotTraining": True}, {}])
def test_what_jobs_cost(change):
    job: dict[str, Any] = {"TrainingJobName": "j", "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 2}}
    test = {
        "TrainingJobName": "k",
        "ResourceConfig": {"InstancePreferences": [{"InstanceType": "a"}, {"InstanceType": "b"}]},
    }
    billed = job | change | {"BillableTimeInSeconds": 1800, "TrainingTimeInSeconds": 3600}
    known = cost(
        {"train": billed, "test": billed | {"ResourceConfig": job["ResourceConfig"] | {"InstanceCount": 1}}},
        {"ml.g5.xlarge": 1.5},
    )
    assert [each["usd"] for each in known["jobs"].values()] == [1.5, 0.75]
    assert known["usd"] == 2.25
    unknown = cost({"train": billed, "test": test}, {"ml.g5.xlarge": 1.5})
    assert unknown["jobs"]["test"] | {"usd": None, "instance_type": "a or b"} == unknown["jobs"]["test"]
    assert unknown["usd"] is None


# --- the rules in events/ that users copy ---


class Loader(yaml.SafeLoader):
    """CloudFormation's YAML, its functions left as they are."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


@pytest.fixture
def takes(world):
    """Which detail types and statuses of the events that were sent a rule takes."""

    def takes(name):
        pattern = yaml.load((RULES / name).read_text(), Loader)["Resources"]["Rule"]["Properties"]["EventPattern"]
        sent = [
            {"source": entry["Source"], "detail-type": entry["DetailType"], "detail": json.loads(entry["Detail"])}
            for entry in world.sent_events
        ]
        return [event for event in sent if matches_pattern(pattern, event)]

    return takes


def test_the_rules_take_what_they_say(world, takes):
    approved = published(world)
    failed = world.start(world.drop("training_data/fails.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_failed", failed.train_job))
    untested = world.trained(world.drop("training_data/untested.jsonl"))
    world.handle("publish_results", world.job_event("publish_results.test_failed", untested.test_job))
    stopped = world.start(world.drop("training_data/stopped.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_stopped", stopped.train_job))
    (deployed,) = takes("deploy_on_approved.yaml")
    assert deployed["detail"]["run_id"] == approved.run_id
    assert deployed["detail"]["model"].endswith("/output/model/merged/")
    assert deployed["detail"]["model_package"].startswith("arn:aws:sagemaker:")
    paged = takes("page_on_failed.yaml")
    assert [event["detail"]["run_id"] for event in paged] == [failed.run_id, untested.run_id]
    assert all(event["detail"]["reason"] for event in paged)
