"""A search for an event of our own bus that changes a run when somebody forges it.

Whoever has `events:PutEvents` on the bus can put each of our events there, with any detail. Forged events arrive before each
event of a scenario, and after the last. In the end, the world must be the one without them: an event only makes a function
look, and the run table, S3 and SageMaker say what there is to do. `Stop Requested` is the one event that is an order: here
it names no run.
"""

from datetime import timedelta
from functools import cache
from typing import Any

import pytest
from fake_stack import OWN_RULES
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from world import GOOD_DATA, KilledError

from pipeline.runs import clock
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile

from .test_crash_points import CLOCK, SCENARIOS, START, fingerprint, no_capacity, overwritten, rejected

KEY = "training_data/cars.jsonl"
RUN, OLDEST = "RUN", "OLDEST"  # stand for the run of `KEY` and for its first version
TAKERS = {detail_type: function for function, types in OWN_RULES.items() for detail_type in types}

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))
details = anything | st.fixed_dictionaries(
    {},
    optional={
        "run_id": st.sampled_from([RUN, RUN, RUN, "cars-ffffffffffff", "../.."]) | anything,
        "key": st.sampled_from([KEY, KEY, KEY, "training_data/other.jsonl", "inference_test/cars.json"]) | anything,
        "version_id": st.sampled_from([OLDEST, "null"]) | anything,
        "sequencer": st.sampled_from(["F" * 64, "0" * 64, "G", ""]) | anything,
        "status": st.sampled_from(["PUBLISHED", "TRAINING_FAILED"]) | anything,
        "attempt": st.integers(),
        "verdict": st.just("APPROVED") | anything,
        "model_package": st.just("arn:aws:sagemaker:us-east-1:123456789012:model-package/forged/1") | anything,
    },
)
forged_events = st.lists(
    st.tuples(st.sampled_from(sorted(TAKERS)), details, st.sampled_from(["1970-01-01T00:00:00Z", "2099-01-01T00:00:00Z"])),
    min_size=4,
    max_size=12,
)


@pytest.fixture(autouse=True)
def still_time(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: CLOCK.now)


def end_of(deploy, scenario, forged=()) -> dict[str, Any]:
    """Play a scenario with forged events at every moment; return the end."""
    CLOCK.now = START
    with deploy() as world:
        for function, event in scenario(world):
            deliver(world, forged)
            world.handle(function, event)
        deliver(world, forged)
        for function, event in world.own_events():  # the stack's own, also those that the scenario left out
            world.handle(function, event)
        return fingerprint(world)


def deliver(world, forged) -> None:
    versions = world.aws.s3.list_object_versions(Bucket="data-bucket", Prefix=KEY).get("Versions", [])
    run_id = (world.aws.runs.upload(KEY) or {}).get("run_id") or "cars-ffffffffffff"
    for detail_type, detail, time in forged:
        if isinstance(detail, dict):
            detail = detail | ({"run_id": run_id} if detail.get("run_id") == RUN else {})  # noqa: PLW2901
            if detail.get("version_id") == OLDEST and versions:
                detail["version_id"] = versions[-1]["VersionId"]
            if detail_type == "Stop Requested":
                detail["run_id"] = "cars-ffffffffffff"
        event = world.load_event("start_training.dataset_validated")
        try:
            world.handle(TAKERS[detail_type], event | {"detail-type": detail_type, "detail": detail, "time": time})
        except (ValueError, LookupError):  # pydantic's ValidationError; an unknown run
            assert not world.calls or set(world.calls) == {"GetItem"}


def search(deploy, **how) -> None:
    @given(scenario=st.sampled_from(SCENARIOS), forged=forged_events)
    @example(
        overwritten,
        [("Validation Requested", {"key": KEY, "version_id": OLDEST, "sequencer": "F" * 64}, "1970-01-01T00:00:00Z")],
    )
    @example(rejected, [("Dataset Validated", {"run_id": RUN}, "2099-01-01T00:00:00Z")])
    @example(no_capacity, [("Results Published", {"run_id": RUN, "verdict": "APPROVED"}, "2099-01-01T00:00:00Z")])
    @settings(
        phases=[Phase.explicit, Phase.generate],  # a scenario takes seconds: no shrinking
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **how,
    )
    def changes_nothing(scenario, forged):
        assert end_of(deploy, scenario, forged) == expected_end(deploy, scenario)

    changes_nothing()


def test_no_forged_event_changes_the_end_of_a_run(deploy):
    search(deploy, max_examples=6, derandomize=True)


@pytest.mark.soak
def test_no_forged_event_does_so_in_a_long_search(deploy):
    search(deploy, max_examples=100)


@cache
def expected_end(deploy, scenario) -> dict[str, Any]:
    return end_of(deploy, scenario)


REQUESTED = {"source": "tunedrop", "detail-type": "Validation Requested", "detail": {"key": KEY, "sequencer": "F" * 64}}


def test_a_forged_request_blocks_no_key(world):
    """Neither before the first upload, nor after it; nor does it use up what `reconcile` may request."""
    request = world.load_event("validate_dataset.requested") | REQUESTED
    assert world.handle("validate_dataset", request) == {}
    first = world.upload_event(KEY)
    upload = first["detail"]["object"]
    world.aws.runs.claim_upload(KEY, upload["version-id"], upload["sequencer"].ljust(64, "0"))
    for _ in range(20):
        world.aws.runs.claim_upload(KEY, upload["version-id"], upload["sequencer"].ljust(64, "0"))
    reconcile(ReconcileSettings.from_environment(), world.aws, validation_age=timedelta(0))
    assert world.event_types == ["Validation Requested"]
    validated = world.handle("validate_dataset", request)
    assert validated == world.handle("validate_dataset", first)
    again = world.drop(KEY, GOOD_DATA * 2)
    assert again.run_id != validated["run_id"]


def test_a_rejected_run_is_announced_as_such(world):
    """A function may die between a run's rejection and its announcement."""

    def die(call):
        raise KilledError

    world.next_call("PutEvents", die)
    event = world.upload_event(KEY, b'{"question": "a"}\n')
    with pytest.raises(KilledError):
        world.handle("validate_dataset", event)
    run_id = world.aws.runs.upload(KEY)["run_id"]
    forged = world.load_event("start_training.dataset_validated")
    world.handle("start_training", forged | {"detail": {"run_id": run_id}})
    assert world.event_types == []
    world.handle("validate_dataset", event)
    assert world.event_types == ["Dataset Rejected"]


@pytest.mark.parametrize("sequencer", ["G", "", "-1", "0x1F", "F" * 65, "１", "0055AED6DCD90281E5\n"])
def test_an_upload_whose_sequencer_is_none_of_s3_changes_nothing(world, sequencer):
    event = world.upload_event(KEY)
    event["detail"]["object"]["sequencer"] = sequencer
    with pytest.raises(ValueError, match="sequencer"):
        world.handle("validate_dataset", event)
    assert world.aws.runs.upload(KEY) is None
