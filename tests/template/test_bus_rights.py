"""What a person with the stack's policy may put on its bus, by the code that enforces IAM in the local app."""

from fake_stack import BUS
from permissions import ACCOUNT, REGION, Permission, allows, known_names
from template import load_template, of_type, resolve

from pipeline.notify import events
from tunedrop.event_bus import ALERT

POLICY = of_type(load_template(), "AWS::IAM::ManagedPolicy")["StopRunsPolicy"]
STATEMENTS = resolve(POLICY["PolicyDocument"]["Statement"], known_names())
OURS = {value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)} | {ALERT}


def may_put(
    detail_type: str | None, source: str | None = "tunedrop", bus: str = BUS, action: str = "events:PutEvents"
) -> bool:
    keys = {"events:detail-type": detail_type, "events:source": source}
    context = {key: value for key, value in keys.items() if value is not None}
    return allows(STATEMENTS, Permission("Person", action, f"arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{bus}", context))


def test_of_our_events_only_a_request_to_stop() -> None:
    assert {"Stop Requested", "Results Published", "Validation Requested", "Training Alert"} <= OURS
    assert {detail_type for detail_type in OURS if may_put(detail_type)} == {"Stop Requested"}


def test_nothing_else() -> None:
    assert not may_put("Stop Requested", source="aws.sagemaker")
    assert not may_put("Stop Requested", bus="default")
    assert not may_put("Stop Requested", action="events:PutRule")
    assert not may_put(None)  # entries of several detail types in one request
    assert not may_put("Stop Requested", source=None)
