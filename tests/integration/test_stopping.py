"""A run can be stopped in every state that is not final, and ends CANCELLED; and how jobs' ends end their runs."""

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from world import KilledError

from pipeline.jobs import stopping
from pipeline.runs.states import RunState
from pipeline.runs.table import CAPACITY
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile

from .test_crash_points import outcome


def stop(world, run, when: datetime | None = None):
    event = world.load_event("start_training.stop_requested")
    event["detail"]["run_id"] = run.run_id
    event["time"] = (when or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    world.handle("start_training", event)
    return world.run(run.run_id)


def die(call):
    raise KilledError


def waiting(world):
    world.quota = 0
    return world.start(world.drop())


def without_tests_quota(world):
    run = world.start(world.drop())
    world.save_training(run)
    world.quota = 0
    world.handle("test_model", world.job_event("test_model.train_completed", run.train_job))
    return world.run(run.run_id)


def ready_to_publish(world):
    run = world.trained(world.drop())
    run = world.aws.runs.move(run, RunState.TESTED)
    world.jobs[run.test_job] = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}
    world.jobs[run.train_job] = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}
    return run


def places(world) -> set[str]:
    return set(world.aws.runs._table.get_item(Key={"id": CAPACITY}).get("Item", {}).get("running", ()))


@pytest.mark.parametrize(
    ("state", "reach"),
    [
        (RunState.VALIDATED, lambda world: world.drop()),
        (RunState.WAITING, waiting),
        (RunState.TRAINED, without_tests_quota),
        (RunState.TESTED, ready_to_publish),
    ],
)
def test_a_run_without_a_job_is_cancelled_and_announced_at_once(world, state, reach):
    run = reach(world)
    assert run.state == state
    run = stop(world, run)
    assert (run.state, run.reason, run.open) == (RunState.CANCELLED, "stopped on request", None)
    assert world.event_types[-1] == "Training Failed"
    assert world.notifications[-1]["MessageAttributes"]["status"]["StringValue"] == "CANCELLED"
    assert places(world) == set()


@pytest.mark.parametrize(
    ("reach", "function", "ended"),
    [
        (lambda world: world.start(world.drop()), "test_model", "test_model.train_stopped"),
        (lambda world: world.trained(world.drop()), "publish_results", "publish_results.test_stopped"),
    ],
)
def test_a_run_with_a_job_is_cancelled_at_once_and_announced_when_the_job_has_stopped(world, reach, function, ended):
    run = reach(world)
    world.jobs[run.train_job] = world.jobs[run.train_job] if run.test_job is None else {
        "TrainingJobStatus": "Completed", "SecondaryStatus": "Completed",
    }  # fmt: skip
    job = run.test_job or run.train_job
    run = stop(world, run)
    assert run.state == RunState.CANCELLED
    assert world.jobs[job]["TrainingJobStatus"] == "Stopping"
    assert places(world) == {run.run_id}  # the job has its machine still
    assert not world.notifications
    run = stop(world, run)  # a second delivery
    assert not world.notifications
    world.handle(function, world.job_event(ended, job))
    run = world.run(run.run_id)
    assert (run.state, run.reason, run.open) == (RunState.CANCELLED, "stopped on request", None)
    assert len(world.notifications) == 1
    assert places(world) == set()


def test_a_job_that_completes_while_it_is_being_stopped_changes_nothing(world):
    run = world.start(world.drop())
    stop(world, run)
    world.save_training(run)
    world.handle("test_model", world.job_event("test_model.train_completed", run.train_job))
    assert world.run(run.run_id).state == RunState.CANCELLED
    assert len(world.job_requests) == 1


def test_a_late_event_of_the_training_job_does_not_free_the_place_of_a_test_job_that_is_ending(world):
    run = world.start(world.drop())
    world.save_training(run)
    trained = world.job_event("test_model.train_completed", run.train_job)
    world.handle("test_model", trained)
    run = stop(world, world.run(run.run_id))
    world.handle("test_model", trained)
    assert (world.jobs[run.test_job]["TrainingJobStatus"], places(world)) == ("Stopping", {run.run_id})
    world.handle("publish_results", world.job_event("publish_results.test_stopped", run.test_job))
    assert (world.run(run.run_id).open, places(world)) == (None, set())


@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_job_that_was_being_created_while_its_run_was_cancelled_is_stopped(world, kind):
    run = world.drop()
    creates = "start_training"
    event = world.load_event("start_training.dataset_validated")
    event["detail"]["run_id"] = run.run_id
    if kind == "test":
        run = world.start(run)
        world.save_training(run)
        creates, event = "test_model", world.job_event("test_model.train_completed", run.train_job)

    def stopped_meanwhile(call):
        stop(world, run)
        return call()

    world.next_call("CreateTrainingJob", stopped_meanwhile)
    world.handle(creates, event)
    run = world.run(run.run_id)
    (job,) = [name for name in world.jobs if f"-{kind}-" in name]
    assert run.state == RunState.CANCELLED
    assert world.jobs[job]["TrainingJobStatus"] == "Stopping"
    function, ended = {
        "train": ("test_model", "test_model.train_stopped"),
        "test": ("publish_results", "publish_results.test_stopped"),
    }[kind]
    world.handle(function, world.job_event(ended, job))
    assert world.run(run.run_id).open is None
    assert places(world) == set()


def test_a_job_of_a_run_that_another_delivery_saw_refused_is_stopped(world):
    run = world.drop()

    def refused_meanwhile(call):
        world.failing_jobs = ["ValidationException"] * 2  # for each instance type
        world.start(run)
        return call()

    world.next_call("CreateTrainingJob", refused_meanwhile)
    run = world.start(run)
    assert (run.state, run.open) == (RunState.TRAINING_FAILED, None)
    (job,) = world.jobs.values()
    assert job["TrainingJobStatus"] == "Stopping"


def test_a_run_whose_job_nobody_lived_to_create_ends_when_nobody_can_be_creating_it_any_more(world, monkeypatch):
    run = world.drop()
    world.next_call("CreateTrainingJob", die)
    with pytest.raises(KilledError):
        world.start(run)
    run = stop(world, run)
    assert (run.state, places(world)) == (
        RunState.CANCELLED,
        {run.run_id},
    )  # who took the place may be creating the job still
    help_after = partial(reconcile, ReconcileSettings.from_environment(), world.aws, minimum_age=timedelta(0))
    help_after()
    assert world.run(run.run_id).open
    monkeypatch.setattr(stopping, "LONGEST_INVOCATION", timedelta(0))
    help_after()
    assert (world.run(run.run_id).open, places(world)) == (None, set())


def test_a_run_that_is_dropped_again_while_its_job_stops_begins_its_next_attempt_when_that_has_ended(world):
    run = world.start(world.drop())
    stop(world, run)
    upload = world.upload_event(run.key)
    assert world.handle("validate_dataset", upload) == {}
    assert world.run(run.run_id).attempt == 1
    world.handle("test_model", world.job_event("test_model.train_stopped", run.train_job))
    (requested,) = [event for function, event in world.own_events() if function == "validate_dataset"]
    world.handle("validate_dataset", requested)
    again = world.run(run.run_id)
    assert (again.state, again.attempt) == (RunState.VALIDATED, 2)
    assert world.notifications[0]["MessageAttributes"]["status"]["StringValue"] == "CANCELLED"


def test_reconcile_ends_a_cancelled_run_whose_jobs_end_was_lost(world):
    run = world.start(world.drop())
    stop(world, run)
    world.jobs[run.train_job] = {"TrainingJobStatus": "Stopped", "SecondaryStatus": "Stopped"}
    reconcile(ReconcileSettings.from_environment(), world.aws, minimum_age=timedelta(0))
    assert world.run(run.run_id).open is None
    assert places(world) == set()


def test_a_stopped_run_may_be_dropped_again_and_an_old_request_stops_no_later_attempt(world):
    run = stop(world, world.drop())
    again = world.start(world.drop())
    assert (again.run_id, again.attempt, again.state) == (run.run_id, 2, RunState.TRAINING)
    assert stop(world, again, datetime.now(UTC) - timedelta(minutes=1)).state == RunState.TRAINING
    assert stop(world, again).state == RunState.CANCELLED


@pytest.mark.parametrize("end", [RunState.PUBLISHED, RunState.REJECTED, RunState.TRAINING_FAILED])
def test_a_run_that_has_ended_stays_as_it_is(world, end):
    if end == RunState.PUBLISHED:
        run = world.tested(world.trained(world.drop()))
    elif end == RunState.REJECTED:
        run = world.drop(body=b"{")
    else:
        run = world.start(world.drop())
        world.handle("test_model", world.job_event("test_model.train_failed", run.train_job))
    sent = len(world.sent_events)
    assert stop(world, run).state == end
    assert len(world.sent_events) == sent


def test_a_request_to_stop_a_run_that_is_not_there_is_an_error(world):
    with pytest.raises(LookupError, match="the run table has no run"):
        world.handle("start_training", world.load_event("start_training.stop_requested"))


@pytest.mark.parametrize(
    ("operation", "end"),
    [
        pytest.param("TransactWriteItems", RunState.CANCELLED, id="before the verdict"),
        pytest.param("CreateModelPackage", RunState.PUBLISHED, id="after it"),
    ],
)
def test_a_run_can_be_stopped_until_its_verdict_is_written(world, operation, end):
    run = world.trained(world.drop())
    world.save_tests(run, [outcome(n) for n in range(30)])
    world.jobs[run.train_job] = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}

    def stopped_meanwhile(call):
        stop(world, run)
        return call()

    world.next_call(operation, stopped_meanwhile)
    world.handle("publish_results", world.job_event("publish_results.test_completed", run.test_job))
    assert world.run(run.run_id).state == end
    published = end == RunState.PUBLISHED
    assert ("Results Published" in world.event_types) == published
    assert (world.run(run.run_id).verdict is not None) == published


# --- the ends of jobs ---

ENDS = [
    # event, whether the trainer had saved a model, state of the run, attempt
    ("test_model.train_completed", True, RunState.TESTING, 1),
    ("test_model.train_failed", False, RunState.TRAINING_FAILED, 1),
    ("test_model.train_no_capacity", False, RunState.WAITING, 2),
    ("test_model.train_stopped", True, RunState.CANCELLED, 1),
    ("test_model.train_at_limit", True, RunState.TESTING, 1),
    ("test_model.train_at_limit", False, RunState.TRAINING_FAILED, 1),
    ("waited", False, RunState.WAITING, 2),
    ("interrupted", True, RunState.TESTING, 1),
    ("interrupted", False, RunState.TRAINING_FAILED, 1),
]


@pytest.mark.parametrize(("name", "saved", "state", "attempt"), ENDS)
def test_ends_of_a_training_job(world, name, saved, state, attempt):
    run = world.start(world.drop())
    if saved:
        world.save_training(run)
    transitions = {
        # Spot: no instance within MaxWaitTimeInSeconds; and interrupted, with none to go on within it.
        "waited": ["Starting", "Stopping", "MaxWaitTimeExceeded"],
        "interrupted": ["Starting", "Downloading", "Training", "Interrupted", "Starting", "Stopping", "MaxWaitTimeExceeded"],
    }.get(name)
    described = {}
    if transitions:
        described = {
            "SecondaryStatus": transitions[-1],
            "SecondaryStatusTransitions": [{"Status": status, "StatusMessage": ""} for status in transitions],
        }
    event = "test_model.train_at_limit" if transitions else name
    world.handle("test_model", world.job_event(event, run.train_job, **described))
    run = world.run(run.run_id)
    assert (run.state, run.attempt) == (state, attempt)
    assert run.bounded == (state == RunState.TESTING and name != "test_model.train_completed")


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ("publish_results.test_failed", RunState.TESTING_FAILED),
        ("publish_results.test_stopped", RunState.CANCELLED),
        ("test_model.train_at_limit", RunState.TESTING_FAILED),
        ("test_model.train_no_capacity", RunState.TESTING),
    ],
)
def test_ends_of_a_test_job(world, event, state):
    run = world.trained(world.drop())
    ended = world.job_event(event, run.test_job)
    world.handle("publish_results", ended)
    world.handle("start_training", ended)
    run = world.run(run.run_id)
    assert run.state == state
    if run.failed:
        assert world.event_types[-1] == "Training Failed"
        assert "inference tests" in run.reason
