"""The events that `tunedrop event` prints drive a whole run."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from aws_lambda_powertools.utilities.parser import parse
from aws_lambda_powertools.utilities.parser.models import S3EventNotificationEventBridgeModel
from fake_stack import MODELS
from world import GOOD_DATA, WON, World

from pipeline.notify.events import JobStateChange
from pipeline.runs.states import Run, RunState

KEY = "training_data/cars.jsonl"
Json = dict[str, Any]


@pytest.fixture
def printed(tunedrop: Callable[..., str]) -> Callable[..., Json]:
    """Print an event."""
    return lambda *arguments: json.loads(tunedrop("event", *arguments))


def end(world: World, job: str | None, status: str = "Completed", reason: str | None = None) -> None:
    """Let a job end, as DescribeTrainingJob describes it."""
    moment = datetime(2026, 11, 2, 9, 45, tzinfo=UTC)
    steps = [{"Status": name, "StartTime": moment, "EndTime": moment} for name in ("Starting", "Training", status)]
    world.jobs[str(job)] = {
        "TrainingJobStatus": status,
        "SecondaryStatus": status,
        "SecondaryStatusTransitions": steps,
        **({"FailureReason": reason} if reason else {}),
    }


def dropped(world: World, printed: Callable[..., Json]) -> Run:
    """Upload a dataset and a config, and validate them."""
    world.put("training_data/cars.yaml", b"rewards: [{type: exact_match}]\n")
    world.put(KEY, GOOD_DATA)
    return world.run(world.handle("validate_dataset", printed(KEY))["run_id"])


def test_printed_events_drive_a_run_from_its_upload_to_its_publication(
    world: World, printed: Callable[..., Json], load_event: Callable[[str], Json]
) -> None:
    run = dropped(world, printed)
    assert run.state == RunState.VALIDATED

    event = printed("cars", "--stage", "start")
    real = world.own_events()[0][1]  # the event of validate_dataset, as EventBridge delivers it
    assert event["detail"] == real["detail"]
    assert event.keys() == load_event("start_training.dataset_validated").keys()
    assert world.handle("start_training", event) == {"run_id": run.run_id, "status": "TRAINING"}
    # A repeated event has the same detail, and changes nothing.
    assert printed("cars", "--stage", "start")["detail"] == event["detail"]
    assert world.handle("start_training", event) == {"run_id": run.run_id, "status": "TRAINING"}

    run = world.run(run.run_id)
    end(world, run.train_job)
    world.save_training(run)
    event = printed(run.run_id, "--stage", "test")
    assert event["detail"]["TrainingJobName"] == run.train_job
    assert event["detail"]["Tags"] == {"tunedrop:run-id": run.run_id, "tunedrop:prefix": "tunedrop"}
    assert event["detail"]["SecondaryStatusTransitions"][1]["StartTime"] == 1793612700000
    assert event["resources"] == [event["detail"]["TrainingJobArn"]]
    assert parse(event, model=JobStateChange).detail.TrainingJobName == run.train_job
    missing = load_event("test_model.train_completed")["detail"].keys() - event["detail"].keys()
    assert missing <= {"TrainingTimeInSeconds", "BillableTimeInSeconds"}  # moto knows neither
    assert world.handle("test_model", event) == {"run_id": run.run_id, "status": "TESTING"}

    run = world.run(run.run_id)
    end(world, run.test_job)
    world.save_tests(run, WON)
    event = printed(str(run.test_job))  # by the job's name
    assert event["detail"] == printed("cars", "--stage", "publish")["detail"]
    assert world.handle("publish_results", event) == {"run_id": run.run_id, "status": "PUBLISHED"}


def test_a_job_that_failed_fails_its_run(world: World, printed: Callable[..., Json]) -> None:
    run = world.start(dropped(world, printed))
    end(world, run.train_job, "Failed", "AlgorithmError: no")
    assert world.handle("test_model", printed("cars", "--stage", "test"))["status"] == "TRAINING_FAILED"
    assert world.run(run.run_id).reason == "AlgorithmError: no"


def test_an_uploads_event_is_s3s_own(world: World, printed: Callable[..., Json], load_event: Callable[[str], Json]) -> None:
    version = world.put("training_data/Größe & Co.jsonl", GOOD_DATA)
    event = printed("training_data/Größe & Co.jsonl")
    s3_object = parse(event, model=S3EventNotificationEventBridgeModel).detail.object
    assert (s3_object.key, s3_object.version_id) == ("training_data/Größe & Co.jsonl", version)
    assert (s3_object.size, len(str(s3_object.etag))) == (len(GOOD_DATA), 32)
    real = load_event("validate_dataset.upload")
    assert event.keys() == real.keys()
    assert event["detail"].keys() == real["detail"].keys()
    assert event["detail"]["object"].keys() == real["detail"]["object"].keys()


def test_it_counts_after_the_last_upload_and_before_the_next(world: World, printed: Callable[..., Json]) -> None:
    first = world.run(world.handle("validate_dataset", world.upload_event(KEY, sequencer="0055AED6DCD90281E5"))["run_id"])
    again = printed(KEY)
    assert again["detail"]["object"]["sequencer"] == "0055AED6DCD90281E6"
    assert world.handle("validate_dataset", again) == {"run_id": first.run_id, "status": "VALIDATED"}
    assert (world.aws.runs.upload(KEY) or {})["sequencer"].startswith("0055AED6DCD90281E6")
    # A further event counts as new again, and S3's event of the next upload as newer.
    assert printed(KEY)["detail"]["object"]["sequencer"] == "0055AED6DCD90281E7"
    newer = world.upload_event(KEY, GOOD_DATA + b'{"question": "more", "answer": "yes"}\n', "0055AED6DCD9028200")
    assert world.handle("validate_dataset", newer)["run_id"] != first.run_id


def test_a_model_packages_event_has_its_present_approval(
    world: World, printed: Callable[..., Json], tunedrop: Callable[..., str]
) -> None:
    run = world.tested(world.trained(dropped(world, printed)))
    event = printed(str(run.model_package))
    assert (event["source"], event["detail-type"]) == ("aws.sagemaker", "SageMaker Model Package State Change")
    assert event["resources"] == [event["detail"]["ModelPackageArn"]] == [run.model_package]
    assert (event["detail"]["ModelPackageGroupName"], event["detail"]["ModelApprovalStatus"]) == (MODELS, "Approved")
    tunedrop("reject", run.run_id)
    rejected = printed(str(run.model_package))
    assert rejected["detail"]["ModelApprovalStatus"] == "Rejected"
    assert rejected["detail"]["UpdatedModelPackageFields"] == ["ModelApprovalStatus"]
    assert rejected["id"] != event["id"]


def test_what_has_no_event_says_so(world: World, printed: Callable[..., Json], tunedrop: Callable[..., str]) -> None:
    assert "There is no object s3://data-bucket/training_data/none.jsonl" in tunedrop("event", "training_data/none.jsonl")
    assert "There is no job 'tunedrop-train-cars-0123456789ab-1'" in tunedrop("event", "tunedrop-train-cars-0123456789ab-1")
    run = dropped(world, printed)
    assert f"{run.run_id} has no training job yet: it is validated." in tunedrop("event", "cars", "--stage", "test")
    run = world.start(run)
    assert f"{run.train_job} is InProgress" in tunedrop("event", "cars", "--stage", "test")
    assert "has no test job yet: it is training." in tunedrop("event", "cars", "--stage", "publish")
    world.put("training_data/broken.jsonl", b"{")
    assert world.handle("validate_dataset", printed("training_data/broken.jsonl"))["status"] == "REJECTED"
    assert "was rejected" in tunedrop("event", "broken", "--stage", "start")
