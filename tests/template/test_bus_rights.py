"""What a person with one of the stack's policies may put on its bus, by the code that enforces IAM in the local app."""

import pytest
from fake_stack import BUS
from permissions import ACCOUNT, REGION, Permission, allows, known_names
from template import load_template, of_type, resolve

from pipeline.notify import events
from tunedrop.event_bus import ALERT

POLICIES = {"StopRunsPolicy": "Stop Requested", "UndeployPolicy": "Undeploy Requested"}
OURS = {value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)} | {ALERT}


def may_put(
    policy: str, detail_type: str | None, source: str | None = "tunedrop", bus: str = BUS, action: str = "events:PutEvents"
) -> bool:
    document = of_type(load_template(), "AWS::IAM::ManagedPolicy")[policy]["PolicyDocument"]
    keys = {"events:detail-type": detail_type, "events:source": source}
    context = {key: value for key, value in keys.items() if value is not None}
    permission = Permission("Person", action, f"arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{bus}", context)
    return allows(resolve(document["Statement"], known_names()), permission)


@pytest.mark.parametrize(("policy", "requested"), POLICIES.items())
def test_of_our_events_only_a_request(policy: str, requested: str) -> None:
    assert {*POLICIES.values(), "Results Published", "Validation Requested", "Champion Changed", "Training Alert"} <= OURS
    assert {detail_type for detail_type in OURS if may_put(policy, detail_type)} == {requested}


@pytest.mark.parametrize(("policy", "requested"), POLICIES.items())
def test_nothing_else(policy: str, requested: str) -> None:
    assert not may_put(policy, requested, source="aws.sagemaker")
    assert not may_put(policy, requested, bus="default")
    assert not may_put(policy, requested, action="events:PutRule")
    assert not may_put(policy, None)  # entries of several detail types in one request
    assert not may_put(policy, requested, source=None)
