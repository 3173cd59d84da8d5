"""What is sent and who takes it: every event of `events/` reaches its function, every event we emit reads back."""

import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.parser.models import S3EventNotificationEventBridgeModel
from fake_stack import SETTINGS
from pydantic import ValidationError

from local_app.aws.hooks import matches_pattern
from pipeline.jobs.training_job import TrainingJob
from pipeline.notify.events import (
    DEPLOY_MODEL_EVENT,
    PUBLISH_RESULTS_EVENT,
    START_TRAINING_EVENT,
    ChampionChanged,
    DatasetValidated,
    EndpointStateChange,
    JobStateChange,
    PackageStateChange,
    RunEvent,
    Scheduled,
    SlotMayBeFree,
    StopRequested,
    UndeployRequested,
    Upload,
    ValidationRequested,
)
from pipeline.runs.lines import Line
from pipeline.runs.states import Run, RunState
from pipeline.stages.champions import announce_champion

EVENTS = Path(__file__).parents[2] / "events"
NAMES = sorted(path.stem for path in EVENTS.glob("*.json"))
# One more than the rules let through: a function that is invoked by hand, or twice, must take it too.
OUTSIDE_RULES = {"validate_dataset.outside", "reconcile.scheduled", "deploy_model.scheduled"}
# What deploy_model takes of each event's detail.
DEPLOYMENTS = {
    "Champion Changed": (ChampionChanged, "line"),
    "Undeploy Requested": (UndeployRequested, "line"),
    "SageMaker Endpoint State Change": (EndpointStateChange, "EndpointName"),
}


def test_there_is_an_event_for_every_function():
    assert {name.split(".")[0] for name in NAMES} == {
        "validate_dataset", "start_training", "test_model", "publish_results", "reconcile", "deploy_model",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_events_parse_in_their_consumers(name, load_event):
    event = load_event(name)
    if event["source"] == "aws.s3":
        upload = Upload.from_event(parse(event, model=S3EventNotificationEventBridgeModel))
        assert upload.key == event["detail"]["object"]["key"]
    elif event["detail-type"] in DEPLOYMENTS:
        kind, member = DEPLOYMENTS[event["detail-type"]]
        about = DEPLOY_MODEL_EVENT.validate_python(event)
        assert isinstance(about, kind)
        assert getattr(about.detail, member) == event["detail"][member]
    elif event["source"] == "aws.events":
        assert isinstance(DEPLOY_MODEL_EVENT.validate_python(event), Scheduled)
    elif event["detail-type"] == "SageMaker Model Package State Change":
        parsed = PUBLISH_RESULTS_EVENT.validate_python(event)
        assert isinstance(parsed, PackageStateChange)
        assert parsed.detail.ModelPackageArn == event["detail"]["ModelPackageArn"]
    elif event["source"] == "aws.sagemaker":
        assert parse(event, model=JobStateChange).detail.TrainingJobName == event["detail"]["TrainingJobName"]
        job = TrainingJob.model_validate(event["detail"])  # what DescribeTrainingJob would say
        assert job.final
        assert job.started == (name != "test_model.train_no_capacity")
    elif event["detail-type"] == "Validation Requested":
        assert parse(event, model=ValidationRequested).detail.model_dump() == event["detail"]
    elif event["source"] == "tunedrop":
        request = START_TRAINING_EVENT.validate_python(event)
        if event["detail-type"] == "Training Waiting":
            assert isinstance(request, SlotMayBeFree)
        else:
            assert isinstance(request, StopRequested if event["detail-type"] == "Stop Requested" else DatasetValidated)
            assert request.detail.run_id == event["detail"]["run_id"]


def test_start_training_refuses_an_event_that_no_rule_delivers(load_event):
    event = load_event("start_training.dataset_validated") | {"detail-type": "Dataset Rejected"}
    with pytest.raises(ValidationError, match="Dataset Rejected"):
        START_TRAINING_EVENT.validate_python(event)


@pytest.mark.parametrize(
    ("function", "adapter", "detail"),
    [
        ("start_training", START_TRAINING_EVENT, {"run_id": "cars-0123456789ab"}),
        ("deploy_model", DEPLOY_MODEL_EVENT, {"line": "cars", "EndpointName": "tunedrop-base-0a1b2c3d"}),
    ],
)
def test_a_function_takes_every_event_of_its_rules(function, adapter, detail, rules, load_event):
    """A detail type that the template's rules deliver and the union lacks would end in the dead-letter queue."""
    delivered = {kind for rule in rules if rule.function == function for kind in rule.pattern["detail-type"]}
    assert delivered
    event = load_event("start_training.dataset_validated") | {"detail": detail}
    for kind in delivered:
        assert adapter.validate_python(event | {"detail-type": kind}).detail_type == kind


def test_deploy_model_takes_awss_sample_of_an_endpoints_event(load_event):
    """https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html#eventbridge-endpoint"""
    event = load_event("deploy_model.endpoint_in_service") | {"time": "1583831889050"}
    event["detail"]["ProductionVariants"] = [{"DesiredWeight": 1.0, "DesiredInstanceCount": 1.0}]
    assert isinstance(DEPLOY_MODEL_EVENT.validate_python(event), EndpointStateChange)


def test_a_champions_event_reaches_deploy_model(rules, load_event):
    line = Line(line="Größe & Co", version=3, champion="cars-0123456789ab", champion_package="arn")
    aws = MagicMock()
    aws.events.put_events.return_value = {"FailedEntryCount": 0}
    announce_champion(line, SETTINGS, aws)
    (entry,) = aws.events.put_events.call_args.kwargs["Entries"]
    sample = load_event("deploy_model.champion_changed")
    event = sample | {"detail-type": entry["DetailType"], "detail": json.loads(entry["Detail"])}
    assert event["detail"].keys() == sample["detail"].keys()
    assert {rule.function for rule in rules if matches_pattern(rule.pattern, event)} == {"deploy_model"}
    parsed = DEPLOY_MODEL_EVENT.validate_python(event)
    assert isinstance(parsed, ChampionChanged)
    assert parsed.detail.line == line.line


@pytest.mark.parametrize("name", sorted(set(NAMES) - OUTSIDE_RULES - {"start_training.job_ended"}))
def test_the_templates_rules_take_the_events(name, load_event, rules):
    event = load_event(name)
    takers = {rule.function for rule in rules if matches_pattern(rule.pattern, event)}
    function = name.split(".")[0]
    # Every final job also goes to start_training: it frees a place.
    frees_a_place = event["detail-type"] == "SageMaker Training Job State Change"
    assert takers == ({function, "start_training"} if frees_a_place else {function})


def test_what_we_emit_is_what_the_rule_and_the_consumer_expect(rules):
    run = Run(
        run_id="cars-0123456789ab",
        dataset="Größe & Co",
        state=RunState.VALIDATED,
        attempt=1,
        trigger="k@1",
        key="k",
        version_id="v",
        arrived="2026-01-01T00:00:00+00:00",
        updated="2026-01-01T00:00:00+00:00",
        model="m",
        plan="p",
    )
    entry = RunEvent(detail_type="Dataset Validated", run=run, links={"receipt": "s3://b/k"}).entry("bus")
    event = {
        "version": "0",
        "id": "1",
        "source": entry["Source"],
        "detail-type": entry["DetailType"],
        "account": "1",
        "time": entry["Time"].isoformat(),
        "region": "us-east-1",
        "resources": [],
        "detail": json.loads(entry["Detail"]),
    }
    assert {rule.function for rule in rules if matches_pattern(rule.pattern, event)} == {"start_training"}
    assert parse(event, model=DatasetValidated).detail.run_id == run.run_id
    assert event["detail"].keys() >= {"id", "run_id", "dataset", "status", "receipt"}
