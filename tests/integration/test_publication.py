"""What a publication leaves: the package, its statistics, the page of all runs, and events that users' rules take."""

import json
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from fake_stack import ARTIFACTS, MODELS, PLAN, SERVING_IMAGE, TABLE, TRAINED_RUN
from template import load_template, resolve

from local_app.aws.hooks import matches_pattern
from pipeline.notify import events
from pipeline.notify.deployments import deployment_detail
from pipeline.publish.index import read_index
from pipeline.publish.result import cost
from pipeline.runs.deployments import Deployment
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


def pattern_of(name):
    template = load_template(RULES / name)
    return resolve(template["Resources"]["Rule"]["Properties"]["EventPattern"], {"ModelPackageGroup": MODELS})


def taken(world, name):
    """Return the sent events that a rule takes."""
    sent = [
        {"source": entry["Source"], "detail-type": entry["DetailType"], "detail": json.loads(entry["Detail"])}
        for entry in world.sent_events
    ]
    return [event for event in sent if matches_pattern(pattern_of(name), event)]


def test_a_failure_pages_someone(world):
    published(world)
    failed = world.start(world.drop("training_data/fails.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_failed", failed.train_job))
    untested = world.trained(world.drop("training_data/untested.jsonl"))
    world.handle("publish_results", world.job_event("publish_results.test_failed", untested.test_job))
    stopped = world.start(world.drop("training_data/stopped.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_stopped", stopped.train_job))
    paged = taken(world, "page_on_failed.yaml")
    assert [event["detail"]["run_id"] for event in paged] == [failed.run_id, untested.run_id]
    assert all(event["detail"]["reason"] for event in paged)


@pytest.mark.parametrize(
    ("detail_type", "pages"), [(events.DEPLOYED, False), (events.DEPLOYMENT_FAILED, True), (events.ROLLED_BACK, True)]
)
def test_a_failed_deployment_pages_someone(detail_type, pages):
    detail = deployment_detail(Deployment(line="cars", reason="no room"), detail_type, TRAINED_RUN, ARTIFACTS)
    event = {"source": "tunedrop", "detail-type": detail_type, "detail": detail}
    assert matches_pattern(pattern_of("page_on_failed.yaml"), event) == pages
    (target,) = load_template(RULES / "page_on_failed.yaml")["Resources"]["Rule"]["Properties"]["Targets"]
    named = {path.removeprefix("$.detail.") for path in target["InputTransformer"]["InputPathsMap"].values()}
    assert named <= detail.keys()


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"source": "tunedrop"}, False),  # no event that a person can put on a bus
        ({"detail": {"ModelPackageGroupName": MODELS, "ModelApprovalStatus": "PendingManualApproval"}}, False),
        ({"detail": {"ModelPackageGroupName": "another", "ModelApprovalStatus": "Approved"}}, False),
    ],
)
def test_only_sagemakers_own_event_of_an_approval_deploys(change, is_taken):
    """The event's shape: https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html."""
    detail = {"ModelPackageGroupName": MODELS, "ModelPackageArn": "arn", "ModelApprovalStatus": "Approved"}
    event = {"source": "aws.sagemaker", "detail-type": "SageMaker Model Package State Change", "detail": detail}
    assert matches_pattern(pattern_of("deploy_on_approved.yaml"), event | change) == is_taken


def at(path, document):
    """Return what a JSONPath of plain names and indices selects."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)]", path):
        document = document[name] if name else document[int(index)]
    return document


def test_what_is_deployed_is_looked_up_in_the_registry(world):
    run = published(world)
    result = world.read_json(f"runs/{run.run_id}/result.json")
    definition = load_template(RULES / "deploy_on_approved.yaml")["Resources"]["DeployIfApproved"]["Properties"][
        "Definition"
    ]
    states = definition["States"]
    assert definition["StartAt"] == "LookUp"
    assert states["LookUp"]["Next"] == "IsApproved"
    assert at(states["LookUp"]["Parameters"]["ModelPackageName.$"], {"ModelPackageArn": "arn"}) == "arn"
    package = world.aws.sagemaker.describe_model_package(ModelPackageName=result["model_package"])
    (choice,) = states["IsApproved"]["Choices"]
    assert (at(choice["Variable"], package), choice["Next"]) == (choice["StringEquals"], "Deploy")
    assert states[states["IsApproved"]["Default"]] == {"Type": "Succeed"}
    given = {name: at(path, package) for name, path in states["Deploy"]["Parameters"]["Input"].items()}
    assert given == {
        "run_id.$": run.run_id,
        "model_data.$": result["artifacts"]["merged_model"],
        "model_package.$": result["model_package"],
    }


def test_what_answers_is_looked_up_in_the_run_table(world):
    rule = load_template(RULES / "model_deployed.yaml")["Resources"]
    pattern = rule["Rule"]["Properties"]["EventPattern"]
    assert set(pattern["detail-type"]) == {events.DEPLOYED, events.ROLLED_BACK}
    states = rule["UseDeployment"]["Properties"]["Definition"]["States"]
    assert states["LookUpDeployment"]["Parameters"]["Key"] == {"id": {"S.$": "States.Format('deployment#{}', $.line)"}}
    (choice,) = states["Answers"]["Choices"]
    assert choice == {"Variable": "$.Item.run.S", "IsPresent": True, "Next": "Use"}
    deployment = world.aws.deployments.write(Deployment(line="cars"), endpoint="e", component="c")
    key = {"id": {"S": "deployment#cars"}}
    assert "run" not in boto3.client("dynamodb").get_item(TableName=TABLE, Key=key)["Item"]
    world.aws.deployments.write(deployment, run="cars-0123456789ab")
    found = boto3.client("dynamodb").get_item(TableName=TABLE, Key=key)
    given = {name: at(path, found) for name, path in states["Use"]["Parameters"]["Input"].items()}
    assert given == {"line.$": "cars", "run_id.$": "cars-0123456789ab", "endpoint.$": "e", "component.$": "c"}
