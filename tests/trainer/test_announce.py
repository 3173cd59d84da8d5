"""The event of a training job: its content, and a job that continues although it cannot announce an alert."""

import json

import boto3
import pytest
from botocore.client import BaseClient
from moto import mock_aws

from trainer.announce import announcer

ALERT = {
    "code": "PLATEAU",
    "step": 21,
    "message": "it has stayed",
    "evidence": {"reward": 0.5},
    "samples": [{"prompt": "secret"}],
}


@pytest.fixture
def piped(job) -> None:
    """A job as the pipeline starts it."""
    job.channel("training", "run.json", '{"run_id": "cars-0123456789ab", "dataset": "it\'s/cars"}')
    job.patch.setenv("EVENT_BUS", "tunedrop")
    job.patch.setenv("TRAINING_JOB_NAME", "tunedrop-train-cars-0123456789ab-2")
    job.patch.setenv("AWS_REGION", "us-east-1")


def test_a_alert_is_an_event_on_the_stacks_bus(piped, monkeypatch):
    sent = []
    call = BaseClient._make_api_call

    def record(client, operation, arguments):
        sent.append((operation, arguments))
        return call(client, operation, arguments)

    with mock_aws():
        boto3.client("events", region_name="us-east-1").create_event_bus(Name="tunedrop")
        monkeypatch.setattr(BaseClient, "_make_api_call", record)
        announcer()(ALERT)
    ((operation, arguments),) = sent
    (entry,) = arguments["Entries"]
    assert operation == "PutEvents"
    assert (entry["EventBusName"], entry["Source"], entry["DetailType"]) == ("tunedrop", "tunedrop", "Training Alert")
    assert json.loads(entry["Detail"]) == {
        "id": "cars-0123456789ab/2/Training Alert/PLATEAU",
        "run_id": "cars-0123456789ab",
        "dataset": "it's/cars",
        "status": "TRAINING",
        "attempt": 2,
        "code": "PLATEAU",
        "step": 21,
        "message": "it has stayed",
        "evidence": {"reward": 0.5},
    }


@pytest.mark.parametrize("lacking", ["network", "credentials"])
def test_who_cannot_be_heard_goes_on(piped, monkeypatch, caplog, lacking):
    caplog.set_level("INFO", "trainer")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    if lacking == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    announcer()(ALERT)
    assert "the alert was not announced" in caplog.text


@pytest.mark.parametrize("lacking", ["bus", "run"])
def test_a_job_without_a_pipeline_tells_nobody(job, piped, monkeypatch, lacking):
    if lacking == "bus":
        monkeypatch.delenv("EVENT_BUS")
    else:
        (job.root / "input/training/run.json").unlink()
    monkeypatch.setattr("boto3.client", None)
    announcer()(ALERT)
