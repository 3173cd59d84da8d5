"""What is sent and who takes it: every event of `events/` reaches its function, every event we emit reads back."""

import json
from pathlib import Path

import pytest
from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.parser.models import S3EventNotificationEventBridgeModel
from pydantic import ValidationError

from local_app.aws.hooks import matches_pattern
from pipeline.jobs.training_job import TrainingJob
from pipeline.notify.events import (
    PUBLISH_RESULTS_EVENT,
    START_TRAINING_EVENT,
    DatasetValidated,
    JobStateChange,
    PackageStateChange,
    RunEvent,
    SlotMayBeFree,
    StopRequested,
    Upload,
    ValidationRequested,
)
from pipeline.runs.states import Run, RunState

EVENTS = Path(__file__).parents[2] / "events"
NAMES = sorted(path.stem for path in EVENTS.glob("*.json"))
# One more than the rules let through: a function that is invoked by hand, or twice, must take it too.
OUTSIDE_RULES = {"validate_dataset.outside", "reconcile.scheduled"}


def test_there_is_an_event_for_every_function():
    assert {name.split(".")[0] for name in NAMES} == {
        "validate_dataset", "start_training", "test_model", "publish_results", "reconcile",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_events_parse_in_their_consumers(name, load_event):
    event = load_event(name)
    if event["source"] == "aws.s3":
        upload = Upload.from_event(parse(event, model=S3EventNotificationEventBridgeModel))
        assert upload.key == event["detail"]["object"]["key"]
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


def test_start_training_takes_every_event_of_its_rules(rules, load_event):
    """A detail type that the template's rules deliver and the union lacks would end in the dead-letter queue."""
    delivered = {kind for rule in rules if rule.function == "start_training" for kind in rule.pattern["detail-type"]}
    event = load_event("start_training.dataset_validated")
    for kind in delivered:
        assert START_TRAINING_EVENT.validate_python(event | {"detail-type": kind}).detail_type == kind


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
