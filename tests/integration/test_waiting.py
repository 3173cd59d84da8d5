"""Full quotas wait: for places, for SageMaker's quotas, for machines; in order of arrival, and visibly."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from msgspec import structs
from world import GOOD_DATA, KilledError

from pipeline.runs import clock
from pipeline.runs.states import RunState, backoff
from pipeline.runs.table import CAPACITY
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile


def places(world) -> set[str]:
    return set(world.aws.runs._table.get_item(Key={"id": CAPACITY})["Item"].get("running", ()))


def room(world) -> None:
    world.handle("start_training", world.load_event("start_training.job_ended"))


def states(world, found) -> list[RunState]:
    return [world.run(run.run_id).state for run in found]


@pytest.fixture
def turn(monkeypatch):
    """A clock that tests turn forward by hours."""
    ahead = timedelta()

    def forward(**time) -> None:
        nonlocal ahead
        ahead += timedelta(**time)

    monkeypatch.setattr(clock, "now", lambda: (datetime.now(UTC) + ahead).isoformat(timespec="microseconds"))
    return forward


def test_who_waits_says_so_in_the_run_and_by_event(world):
    world.quota = 0
    run = world.start(world.drop())
    assert run.state == RunState.WAITING
    assert run.reason.startswith("SageMaker quota: 'Instances across all types for training job usage' is 0, and the ")
    detail = json.loads(world.sent_events[-1]["Detail"])
    assert (detail["status"], detail["reason"]) == ("WAITING", run.reason)
    assert world.event_types[-1] == "Training Waiting"
    assert places(world) == set()
    sent = len(world.sent_events)
    room(world)
    assert len(world.sent_events) == sent  # still waiting is no news
    world.quota = None
    room(world)
    run = world.run(run.run_id)
    assert (run.state, run.reason) == (RunState.TRAINING, None)
    assert places(world) == {run.run_id}


def fails(world, run) -> None:
    world.handle("test_model", world.job_event("test_model.train_failed", world.start(run).train_job))


def is_published(world, run) -> None:
    world.tested(world.trained(run))


@pytest.mark.parametrize("ends", [fails, is_published])
def test_a_place_is_free_before_the_event_that_has_the_next_run_take_it(world, ends):
    run = world.drop()
    taken = []

    def look(put):
        taken.append(places(world))
        world.next_call("PutEvents", look)
        return put()

    world.next_call("PutEvents", look)
    sent = len(world.event_types)
    ends(world, run)
    (end,) = (at for at, kind in enumerate(world.event_types[sent:]) if kind in {"Training Failed", "Results Published"})
    assert taken[end] == set()


def test_a_choice_of_instance_whose_quota_is_full_is_passed_over(world):
    world.failing_jobs = ["ResourceLimitExceeded"]
    run = world.start(world.drop())
    assert (run.state, run.instance_type, run.attempt) == (RunState.TRAINING, "ml.g5.4xlarge", 1)


SPOT, ON_DEMAND = "{} for spot training job usage", "{} for training job usage"


def test_a_type_that_sagemaker_does_not_know_there_is_passed_over(world):
    world.failing_jobs = ["ValidationException"]
    run = world.start(world.drop())
    assert (run.state, run.instance_type, run.attempt) == (RunState.TRAINING, "ml.g5.4xlarge", 1)


def test_after_the_list_was_refused_for_one_types_quota_each_type_is_tried_alone(world):
    """The quota of every type of a list must cover the job, though the first would have done."""
    world.put("training_data/cars.yaml", b"compute: {spot: false}")
    world.quotas = {ON_DEMAND.format("ml.g5.4xlarge"): 0}
    run = world.start(world.drop())
    assert (run.state, run.instance_type, run.attempt) == (RunState.TRAINING, "ml.g6e.4xlarge", 1)
    assert world.job_requests[-1]["ResourceConfig"]["InstanceType"] == "ml.g6e.4xlarge"


def test_spot_and_on_demand_have_quotas_of_their_own(world):
    world.quotas = {ON_DEMAND.format(name): 0 for name in ("ml.g6e.4xlarge", "ml.g5.4xlarge")}
    assert world.start(world.drop()).state == RunState.TRAINING


@pytest.mark.parametrize(("config", "quota"), [(b"", SPOT), (b"compute: {spot: false}", ON_DEMAND)])
def test_a_quota_below_the_need_is_said_at_once_and_once(world, config, quota):
    """A new account's quotas of GPU types are 0: waiting alone would never end."""
    world.put("training_data/cars.yaml", config)
    names = [quota.format(name) for name in ("ml.g6e.4xlarge", "ml.g5.4xlarge")]
    world.quotas = dict.fromkeys(names, 0)
    run = world.start(world.drop())
    assert run.state == RunState.WAITING
    assert run.reason == (
        f"SageMaker quota: '{names[0]}' is 0, '{names[1]}' is 0, and the training job needs 1. "
        "Raise the quota in Service Quotas (Amazon SageMaker): the run then starts automatically"
    )
    for _ in range(3):
        room(world)
    (notification,) = world.notifications
    assert notification["Subject"] == "Run waiting for a quota increase: cars"
    assert run.reason in json.loads(notification["Message"])["default"]
    events = [json.loads(each["Detail"]) for each in world.sent_events if each["DetailType"] == "Training Waiting"]
    assert {each["reason"] for each in events} == {run.reason}
    world.quotas[names[1]] = 1
    room(world)
    run = world.run(run.run_id)
    assert (run.state, run.reason, run.instance_type) == (RunState.TRAINING, None, "ml.g5.4xlarge")


def test_several_instances_need_a_quota_for_all_of_them(world):
    world.put("training_data/cars.yaml", b"compute: {instance_type: ml.g5.4xlarge, instance_count: 2}")
    world.quotas = {SPOT.format("ml.g5.4xlarge"): 1}
    run = world.start(world.drop())
    assert "is 1, and the training job needs 2." in run.reason
    assert len(world.notifications) == 1


def test_a_full_quota_is_no_news_for_people(world):
    world.quotas = {SPOT.format("ml.g6e.4xlarge"): 1, SPOT.format("ml.g5.4xlarge"): 0}
    world.start(world.drop())
    waits = world.start(world.drop("training_data/trucks.jsonl"))
    assert waits.state == RunState.WAITING
    assert "'ml.g6e.4xlarge for spot training job usage' is 1" in waits.reason
    assert world.notifications == []


def test_on_demand_sagemaker_walks_the_list_of_instance_types(world):
    world.put("training_data/cars.yaml", b"compute: {spot: false}")
    run = world.start(world.drop())
    resources = world.job_requests[-1]["ResourceConfig"]
    types = ["ml.g6e.4xlarge", "ml.g5.4xlarge"]
    assert resources["InstancePreferences"] == [{"InstanceType": name} for name in types]
    assert resources["InstanceCount"] == 1
    assert "InstanceType" not in resources
    selected = resources | {"SelectedInstanceType": "ml.g5.4xlarge"}
    event = world.job_event("test_model.train_completed", run.train_job, ResourceConfig=selected)
    world.save_training(run)
    world.handle("test_model", event)
    assert world.run(run.run_id).instance_type == "ml.g5.4xlarge"


def test_a_job_that_finds_no_machine_tries_the_next_choice_at_once_and_then_backs_off(world, turn):
    run = world.start(world.drop())
    tried = []
    for _ in range(2):
        tried.append(run.instance_type)
        world.handle("test_model", world.job_event("test_model.train_no_capacity", run.train_job))
        room(world)
        run = world.run(run.run_id)
    assert tried == ["ml.g6e.4xlarge", "ml.g5.4xlarge"]
    assert run.state == RunState.WAITING  # both choices had their turn
    assert run.reason.startswith("CapacityError: ")
    assert run.not_before > clock.now()
    turn(minutes=2)
    room(world)
    run = world.run(run.run_id)
    assert (run.state, run.attempt, run.instance_type, run.not_before) == (RunState.TRAINING, 3, "ml.g6e.4xlarge", None)


@pytest.mark.parametrize(
    ("attempt", "choices", "minutes"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 8), (50, 1, 60), (5000, 1, 60), (1, 2, 0), (2, 2, 1), (3, 2, 0), (4, 2, 2)],
)
def test_backoff(world, monkeypatch, attempt, choices, minutes):
    monkeypatch.setattr(clock, "now", lambda: "2026-01-01T00:00:00.000000+00:00")
    run = structs.replace(world.drop(), attempt=attempt, choices=choices)
    expected = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)).isoformat(timespec="microseconds")
    assert backoff(run) == (expected if minutes else None)


def test_the_quota_may_be_full_of_the_very_job_that_is_asked_for(world):
    run = world.drop()
    world.quota = 1

    def die(call):
        call()
        raise KilledError

    world.next_call("CreateTrainingJob", die)
    with pytest.raises(KilledError):
        world.start(run)
    run = world.start(run)
    assert run.state == RunState.TRAINING
    assert len(world.job_requests) == 1


def test_a_newcomer_waits_behind_those_that_wait_and_a_dataset_keeps_its_order(world):
    world.quota = 0
    first = world.start(world.drop("training_data/a.jsonl"))
    world.quota = None
    second = world.start(world.drop("training_data/b.jsonl"))
    assert states(world, [first, second]) == [RunState.WAITING, RunState.WAITING]
    assert second.reason == "other runs have waited longer"
    room(world)
    assert states(world, [first, second]) == [RunState.TRAINING, RunState.TRAINING]


def test_within_a_dataset_nobody_overtakes_one_who_backs_off_but_other_datasets_do(world, turn):
    first = world.start(world.drop("training_data/a.jsonl"))
    for _ in range(2):
        world.handle("test_model", world.job_event("test_model.train_no_capacity", world.run(first.run_id).train_job))
        room(world)
    same = world.start(world.drop("training_data/a.jsonl", GOOD_DATA.replace(b"+1?", b" + 1?")))
    other = world.start(world.drop("training_data/b.jsonl"))
    room(world)
    assert states(world, [first, same, other]) == [RunState.WAITING, RunState.WAITING, RunState.TRAINING]
    turn(minutes=5)
    room(world)
    assert states(world, [first, same, other]) == [RunState.TRAINING, RunState.WAITING, RunState.TRAINING]


def test_a_test_job_without_quota_is_started_by_the_next_final_job_event(world):
    run = world.start(world.drop())
    world.save_training(run)
    ended = world.job_event("test_model.train_completed", run.train_job)
    world.quota = 0
    world.handle("test_model", ended)
    run = world.run(run.run_id)
    assert run.state == RunState.TRAINED
    assert run.reason.startswith(
        "SageMaker quota: 'Instances across all types for training job usage' is 0, and the test job"
    )
    assert json.loads(world.sent_events[-1]["Detail"])["status"] == "TRAINED"
    assert world.event_types[-1] == "Training Waiting"
    assert places(world) == {run.run_id}
    world.quota = None
    room(world)
    run = world.run(run.run_id)
    assert (run.state, run.reason) == (RunState.TESTING, None)


def test_a_test_job_without_a_machine_is_tried_again_and_the_training_is_kept(world):
    run = world.trained(world.drop())
    artifacts = run.artifacts
    world.handle("publish_results", world.job_event("test_model.train_no_capacity", run.test_job))
    run = world.run(run.run_id)
    assert (run.state, run.attempt, run.artifacts) == (RunState.TRAINED, 2, artifacts)
    room(world)
    run = world.run(run.run_id)
    assert (run.state, run.test_job) == (RunState.TESTING, f"tunedrop-test-{run.run_id}-2")
    assert world.tested(run).state == RunState.PUBLISHED


def test_every_end_and_every_wait_makes_start_training_look_for_room(world):
    runs_ = [world.start(world.drop(f"training_data/d{n}.jsonl")) for n in range(3)]
    assert states(world, runs_) == [RunState.TRAINING, RunState.TRAINING, RunState.WAITING]
    assert world.run(runs_[2].run_id).reason == "concurrency limit reached (2 runs)"
    # The event of a final job is handled by two functions: the one that looks for room may come too early.
    ended = world.job_event("test_model.train_failed", runs_[0].train_job)
    world.handle("start_training", ended)
    assert states(world, runs_) == [RunState.TRAINING, RunState.TRAINING, RunState.WAITING]
    before = len(world.sent_events)
    world.handle("test_model", ended)
    for entry in world.sent_events[before:]:
        world.handle("start_training", world.delivered(entry))
    assert states(world, runs_) == [RunState.TRAINING_FAILED, RunState.TRAINING, RunState.TRAINING]


def test_reconcile_starts_what_waits_and_leaves_who_backs_off(world, turn):
    settings = ReconcileSettings.from_environment()
    run = world.start(world.drop())
    for _ in range(2):
        world.handle("test_model", world.job_event("test_model.train_no_capacity", world.run(run.run_id).train_job))
        reconcile(settings, world.aws)
    assert world.run(run.run_id).state == RunState.WAITING
    turn(hours=1)
    reconcile(settings, world.aws)
    assert world.run(run.run_id).state == RunState.TRAINING


def test_one_run_that_cannot_be_started_does_not_stand_in_the_way_of_others(world):
    world.quota = 0
    broken, good = (world.start(world.drop(f"training_data/{name}.jsonl")) for name in "ab")
    world.quota = None
    world.aws.s3.delete_object(Bucket="artifact-bucket", Key=f"runs/{broken.run_id}/input/config.json")
    with pytest.raises(AssertionError):
        room(world)
    assert states(world, [broken, good]) == [RunState.WAITING, RunState.TRAINING]


def test_a_config_that_this_version_does_not_take_any_more_ends_the_run(world):
    run = world.drop()
    config = world.read_json(f"runs/{run.run_id}/input/config.json")
    world.write(f"runs/{run.run_id}/input/config.json", json.dumps(config | {"gone": 1}).encode())
    run = world.start(run)
    assert run.state == RunState.TRAINING_FAILED
    assert "gone" in run.reason


# --- uploads ---


def test_an_upload_that_nobody_finished_is_validated_when_reconcile_asks_for_it(world, turn):
    event = world.upload_event("training_data/cars.jsonl")

    def die(call):
        raise KilledError

    world.next_call("GetObject", die)
    with pytest.raises(KilledError):
        world.handle("validate_dataset", event)
    settings = ReconcileSettings.from_environment()
    reconcile(settings, world.aws)
    assert not world.sent_events  # it may still be under way
    reconcile(settings, world.aws, validation_age=timedelta(0))
    ((function, request),) = world.own_events()
    assert (function, request["detail-type"]) == ("validate_dataset", "Validation Requested")
    run = world.run(world.handle(function, request)["run_id"])
    assert run.state == RunState.VALIDATED
    assert world.handle("validate_dataset", event)["run_id"] == run.run_id  # the event itself, late, is a duplicate
    assert run.trigger == f"training_data/cars.jsonl@{event['detail']['object']['sequencer'].ljust(64, '0')}"
    assert world.aws.runs.open_uploads() == []


def test_an_upload_that_kills_every_validation_is_left_to_a_person(world):
    upload = world.upload_event("training_data/cars.jsonl")["detail"]["object"]
    world.aws.runs.claim_upload(upload["key"], upload["version-id"], upload["sequencer"].ljust(64, "0"))
    for requests in (*range(1, 11), 10):
        reconcile(ReconcileSettings.from_environment(), world.aws, validation_age=timedelta(0))
        assert len(world.sent_events) == requests


def test_an_upload_that_is_gone_is_closed(world):
    assert world.handle("validate_dataset", world.load_event("validate_dataset.odd_key")) == {}
    assert world.aws.runs.open_uploads() == []


def test_a_late_duplicate_makes_no_other_run_of_a_config_that_came_after_it(world):
    event = world.upload_event("training_data/cars.jsonl")
    first = world.handle("validate_dataset", event)
    world.put("training_data/cars.yaml", b"grpo: {beta: 0.01}")
    assert world.handle("validate_dataset", event) == first
