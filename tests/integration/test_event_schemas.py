"""The events of runs and lines have the form that docs/events.md says."""

import json
from pathlib import Path

import msgspec
import pytest
from fake_stack import ARTIFACTS
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # as in the rewards
from world import WON

from pipeline.notify import events
from pipeline.notify.deployments import STATUSES, deployment_detail
from pipeline.notify.schemas import SENT, TAKEN, document
from pipeline.runs.deployments import Deployment
from tunedrop.event_bus import ALERT, AlertEvent

PAGE = Path(__file__).parents[2] / "docs/events.md"


def schema(name: str) -> dict[str, object]:
    """The schema of an event, as the page has it."""
    part = PAGE.read_text().split(f"### {name}\n")[1].partition("```json\n")[2].partition("```")[0]
    found: dict[str, object] = json.loads(part)
    return found


def fits(name: str, detail: dict[str, object]) -> None:
    """An event has the fields of its type and no others, and fits the schema of the page."""
    msgspec.convert(detail, SENT[name])
    Draft202012Validator(schema(name)).validate(detail)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == document(), "python -m pipeline.notify.schemas > docs/events.md"


@pytest.mark.parametrize("name", [*SENT, *TAKEN])
def test_each_schema_is_one_and_refuses_another_event(name):
    Draft202012Validator.check_schema(schema(name))
    assert not Draft202012Validator(schema(name)).is_valid({"nothing": 1})


def test_every_event_of_runs_fits_its_schema(world):
    world.put("training_data/cars.yaml", b"rewards: [{type: exact_match}]")
    run = world.tested(world.trained(world.drop()))
    assert run.verdict == "APPROVED"
    world.tested(world.trained(world.drop("training_data/cars/second.jsonl")), WON)
    failed = world.start(world.drop("training_data/faq.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_failed", failed.train_job))
    world.put("training_data/broken.jsonl", b"{}\n")
    world.drop("training_data/broken.jsonl", b"nothing\n")
    for entry in world.sent_events:
        if entry["DetailType"] != events.VALIDATION_REQUESTED:
            fits(entry["DetailType"], json.loads(entry["Detail"]))
    sent = {entry["DetailType"] for entry in world.sent_events}
    expected = {events.VALIDATED, events.REJECTED, events.STARTED, events.TESTS_STARTED, events.FAILED, events.PUBLISHED}
    assert sent >= expected | {events.CHAMPION_CHANGED}


def test_events_of_alerts_waiting_and_deployments_fit_their_schemas(world):
    run = world.drop()
    alert = AlertEvent(
        run_id=run.run_id, dataset="cars", attempt=1, code="PLATEAU", step=3, message="m", evidence={"reward": 0.5}
    )
    fits(ALERT, alert.detail)
    waiting = msgspec.structs.replace(run, reason="no instance")
    fits(events.WAITING, json.loads(json.dumps(events.RunEvent(detail_type=events.WAITING, run=waiting).detail)))
    for deployment in (
        Deployment(line="cars"),
        Deployment(line="cars", run=run.run_id, endpoint="e", component="c", reason="r"),
    ):
        for name in STATUSES:
            fits(name, deployment_detail(deployment, name, run, ARTIFACTS))
