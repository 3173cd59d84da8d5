"""A search for the call after which a handler must not die.

For every invocation of a scenario and every AWS call it makes (found by recording a run without trouble), one thing goes
wrong at that call; then the event is delivered again, as EventBridge and Lambda do, and the scenario goes on. At the end the
world must be the one without trouble: the same run, objects, jobs, model package, and the same happenings announced.
"""

import json
import os
import re
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from fake_stack import ARTIFACTS, DATA, MODELS
from world import GOOD_DATA, KilledError

from pipeline.notify.events import VALIDATION_REQUESTED, WAITING
from pipeline.runs import clock
from pipeline.runs.states import FINAL, RunState
from pipeline.runs.table import RUN
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile

Deliveries = Iterator[tuple[str, dict[str, Any]]]
Call = Callable[[], Any]
START, LATER = (f"2026-01-01T00:0{minutes}:00.000000+00:00" for minutes in (0, 1))
CLOCK = SimpleNamespace(now=START)


def die_before(call: Call, again: Call) -> Any:
    raise KilledError


def die_after(call: Call, again: Call) -> Any:
    call()
    raise KilledError


def throttle(call: Call, again: Call) -> Any:
    raise ClientError({"Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"}}, "AnyOperation")


def break_down(call: Call, again: Call) -> Any:
    raise ClientError({"Error": {"Code": "InternalServerError", "Message": "Try again"}}, "AnyOperation")


def time_out(call: Call, again: Call) -> Any:
    call()
    raise ReadTimeoutError(endpoint_url="https://aws")


def overtake(call: Call, again: Call) -> Any:
    """A second delivery of the event is handled from beginning to end before this call is made."""
    again()
    return call()


def hang(call: Call, again: Call) -> Any:
    """The same, but all that the scenario still has happens as well before this call is made (see `play`)."""
    again()
    return call()


def take_no_entry(call: Call, again: Call) -> Any:
    """PutEvents' way to refuse an event is an answer of 200; other calls cannot fail like this."""
    return {"FailedEntryCount": 1, "Entries": [{"ErrorCode": "InternalFailure", "ErrorMessage": "Try again"}]}


# --- scenarios: what is delivered, one after another ---


def published(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield from trained(world, newest(world))
    yield from after_tests(world, newest(world))


def trained(world, run_id: str) -> Deliveries:
    yield "start_training", validated(world, run_id)
    run = world.run(run_id)
    world.save_training(run)
    yield "test_model", world.job_event("test_model.train_completed", run.train_job)
    yield "start_training", world.job_event("start_training.job_ended", run.train_job)


def rejected(world) -> Deliveries:
    broken = b'{"question": "a"}\n'
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl", broken)
    # Dropping the same bytes again is the next attempt.
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl", broken)


def training_failed(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "start_training", validated(world, newest(world))
    yield "test_model", world.job_event("test_model.train_failed", world.run(newest(world)).train_job)
    # Dropping the same bytes again is the next attempt.
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "start_training", validated(world, newest(world))


def untested(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield from trained(world, newest(world))
    yield "publish_results", world.job_event("publish_results.test_failed", world.run(newest(world)).test_job)


def no_capacity(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "start_training", validated(world, newest(world))
    job = world.run(newest(world)).train_job
    yield "test_model", world.job_event("test_model.train_no_capacity", job)
    yield "start_training", world.job_event("start_training.job_ended", job)


def refused(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    world.failing_jobs = ["ValidationException"] * 6  # for each instance type, in every delivery that there may be
    yield "start_training", validated(world, newest(world))


def stopped(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "start_training", validated(world, newest(world))
    yield "start_training", stop_requested(world)
    job = world.run(newest(world)).train_job
    yield "test_model", world.job_event("test_model.train_stopped", job)
    yield "start_training", world.job_event("start_training.job_ended", job)


def stopped_while_waiting(world) -> Deliveries:
    world.quota = 0
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "start_training", validated(world, newest(world))
    yield "start_training", stop_requested(world)


def untested_for_want_of_capacity(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield from trained(world, newest(world))
    job = world.run(newest(world)).test_job
    yield "publish_results", world.job_event("test_model.train_no_capacity", job)
    yield "start_training", world.job_event("start_training.job_ended", job)


def dropped_again_while_stopping(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "start_training", validated(world, newest(world))
    yield "start_training", stop_requested(world)
    run = world.run(newest(world))
    CLOCK.now = LATER
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "test_model", world.job_event("test_model.train_stopped", run.train_job)
    requests = [event for _, event in world.own_events() if event["detail-type"] == VALIDATION_REQUESTED]
    (event,) = {json.dumps(event["detail"]): event for event in requests}.values()  # some troubles make it send it twice
    yield "validate_dataset", event
    yield "start_training", validated(world, run.run_id)


def overwritten(world) -> Deliveries:
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl", GOOD_DATA * 2)


def overwritten_before(world) -> Deliveries:
    late = world.upload_event("training_data/cars.jsonl")
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl", GOOD_DATA * 2)
    yield "validate_dataset", late


def second_of_a_line(world) -> Deliveries:
    champion(world)
    world.put("training_data/cars.yaml", b"start_from: champion")
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl")
    yield from trained(world, newest(world))
    yield from after_tests(world, newest(world))


def overtaken(world) -> Deliveries:
    """A run is approved while another run of its line is tested: the other run is tested against the new champion."""
    champion(world)
    yield "validate_dataset", world.upload_event("training_data/cars.jsonl", GOOD_DATA * 2)
    late = newest(world)
    yield from trained(world, late)
    world.put("training_data/taxis.yaml", b"line: cars")
    champion(world, GOOD_DATA * 3, "taxis")
    yield from after_tests(world, late)
    waiting = [event for function, event in world.own_events() if event["detail-type"] == WAITING]
    yield "start_training", next(event for event in waiting if event["detail"]["run_id"] == late)
    yield from after_tests(world, late)


def approved_and_rejected_by_a_person(world) -> Deliveries:
    first, second = champion(world), champion(world, GOOD_DATA * 2)
    for run, status in ((second, "Rejected"), (first, "Rejected"), (second, "Approved")):
        package = str(world.run(run).model_package)
        world.aws.sagemaker.update_model_package(ModelPackageArn=package, ModelApprovalStatus=status)
        event = world.load_event("publish_results.package_approved")
        event["detail"]["ModelPackageArn"] = package
        yield "publish_results", event


def champion(world, body: bytes = GOOD_DATA, name: str = "cars") -> str:
    """Publish a run of the line that becomes its champion; return its id."""
    run = world.trained(world.drop(f"training_data/{name}.jsonl", body))
    world.tested(run, [outcome(n) for n in range(30)])
    assert world.aws.lines.get("cars").champion == run.run_id
    return run.run_id


def after_tests(world, run_id: str) -> Deliveries:
    run = world.run(run_id)
    world.save_tests(run, [outcome(n) for n in range(30)])
    yield "publish_results", world.job_event("publish_results.test_completed", run.test_job)
    yield "start_training", world.job_event("start_training.job_ended", run.test_job)


def stop_requested(world) -> dict[str, Any]:
    event = world.load_event("start_training.stop_requested")
    event["time"] = START
    event["detail"]["run_id"] = newest(world)
    return event


def newest(world) -> str:
    item = world.aws.runs.upload("training_data/cars.jsonl")
    return item["run_id"]


def validated(world, run_id: str) -> dict[str, Any]:
    event = world.load_event("start_training.dataset_validated")
    event["detail"]["run_id"] = run_id
    return event


def outcome(n: int) -> dict[str, Any]:
    case = {"id": f"t{n}", "prompt": [{"role": "user", "content": f"{n}?"}], "reference": "!", "tags": [], "weight": 1.0}
    return case | {
        "must_pass": False,
        "base": {"text": "", "score": 0.0, "rewards": {}},
        "champion": {"text": "", "score": 0.0, "rewards": {}},
        "tuned": {"text": "!", "score": 1.0, "rewards": {}},
    }


# --- the search ---


def fingerprint(world) -> dict[str, Any]:
    """All that there is in the end, but for the versions that S3 gave the uploads, and how long rewards took.

    The files of a run that never began stay unused.
    """
    items = sorted(world.aws.runs._table.scan()["Items"], key=lambda item: item["id"])
    runs = {item["id"].removeprefix(RUN) for item in items if item["id"].startswith(RUN)}
    versions = [version["VersionId"] for version in world.aws.s3.list_object_versions(Bucket=DATA)["Versions"]]
    objects = {
        item["Key"]: world.aws.read(ARTIFACTS, item["Key"]).decode()
        for prefix in ("runs/", "lines/")
        for item in world.aws.s3.list_objects_v2(Bucket=ARTIFACTS, Prefix=prefix).get("Contents", [])
        if prefix == "lines/" or item["Key"].count("/") == 1 or item["Key"].split("/")[1] in runs
    }
    jobs = sorted(request["TrainingJobName"] for request in world.job_requests)
    everything = {
        "table": json.loads(
            json.dumps(items, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        ),
        "objects": objects,
        "jobs": jobs,
        "packages": [(package["ModelPackageArn"], package["ModelApprovalStatus"]) for package in world.packages_of(MODELS)],
        "events": sorted({json.loads(event["Detail"]).get("id", event["DetailType"]) for event in world.sent_events}),
        "notified": sorted({message["MessageAttributes"]["id"]["StringValue"] for message in world.notifications}),
    }
    text = re.sub(r'\\"(p50_ms|p95_ms|run_seconds)\\": [-+.e\d]+', "", json.dumps(everything))
    for version in versions:
        text = text.replace(version, "VERSION")
    return json.loads(text)


def play(deploy, scenario) -> tuple[list[list[str]], dict[str, Any]]:
    """Play a scenario without trouble; return the calls of each delivery, and the end."""
    CLOCK.now = START
    with deploy() as world:
        calls = []
        for function, event in scenario(world):
            world.handle(function, event)
            calls.append(list(world.calls))
        return calls, fingerprint(world)


def search(deploy, scenario, troubles, every=1) -> int:
    """Play a scenario with every trouble at every call, or at every so many, one at a time; return how many were tried.

    The world before a delivery is the same for all troubles of the delivery: a forked process goes on from there.
    """
    calls, expected = play(deploy, scenario)
    tried = 0
    CLOCK.now = START
    with deploy() as world:
        deliveries = scenario(world)
        for number, (function, event) in enumerate(deliveries):
            for at, operation in list(enumerate(calls[number]))[number % every :: every]:
                for trouble in troubles:
                    if trouble is take_no_entry and operation != "PutEvents":
                        continue
                    if trouble is die_before and at > 0:
                        continue  # the same moment as death after the call before it
                    tried += 1
                    rest = partial(go_on, world, chain([(function, event)], deliveries), trouble, at, expected)
                    failure = in_a_fork(rest)
                    assert not failure, f"{trouble.__name__} at {operation}, call {at} of delivery {number}:\n{failure}"
            world.handle(function, event)
    return tried


def go_on(world, deliveries: Deliveries, trouble, at: int, expected: dict[str, Any]) -> None:
    """Have trouble at one call of the next delivery, deliver it again and all that follows, and compare the end."""
    function, event = next(deliveries)

    def again() -> None:
        world.handle(function, event)
        for later in deliveries if trouble is hang else []:
            world.handle(*later)

    world.trouble_happens(trouble, at, again)
    try:
        world.handle(function, event)
    except Exception:  # noqa: BLE001 - whatever the trouble turned into
        assert len(world.calls) > at  # it died of the trouble, not of something before it
    finally:
        world.trouble_at = -1
    for later in chain([(function, event)], deliveries):
        world.handle(*later)
    assert fingerprint(world) == expected


def in_a_fork(check: Callable[[], None]) -> str:
    """Run a check in a copy of this process; return the traceback of its failure, empty if it holds."""
    receiver, sender = os.pipe()
    if os.fork() == 0:
        try:
            check()
        except BaseException:  # noqa: BLE001 - the parent reports it
            os.write(sender, traceback.format_exc()[-40_000:].encode())
        finally:
            os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8", errors="replace") as pipe:  # noqa: PTH123 - a pipe has no path
        failure = pipe.read()
    os.wait()
    return failure


@pytest.fixture(autouse=True)
def still_time(monkeypatch):
    """A clock that stands still, so that what differs in the end is not the time."""
    monkeypatch.setattr(clock, "now", lambda: CLOCK.now)


# `make soak` searches every scenario.


def test_a_run_survives_death_at_every_sixth_call(deploy, say):
    tried = search(deploy, published, [die_before, die_after], every=6)
    say(f"{tried} crash points of a run that ends published")
    assert tried >= 10


SCENARIOS = [
    *(published, rejected, training_failed, untested, no_capacity, refused, overwritten, overwritten_before),
    *(stopped, stopped_while_waiting, dropped_again_while_stopping, untested_for_want_of_capacity),
    *(second_of_a_line, overtaken, approved_and_rejected_by_a_person),
]


@pytest.mark.soak
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_scenario_survives_every_trouble_at_every_call(deploy, scenario, say):
    troubles = [die_before, die_after, throttle, break_down, time_out, take_no_entry, overtake, hang]
    tried = search(deploy, scenario, troubles)
    say(f"{tried} troubles of a run that ends {scenario.__name__}")


def test_the_scenarios_end_as_they_say(deploy):
    ends = {}
    for scenario in SCENARIOS:
        CLOCK.now = START
        with deploy() as world:
            for function, event in scenario(world):
                world.handle(function, event)
            items = world.aws.runs._table.scan()["Items"]
            run = world.run(newest(world))
            ends[scenario.__name__] = (run.state, run.attempt, sum(item["id"].startswith(RUN) for item in items))
    assert ends == {
        "published": (RunState.PUBLISHED, 1, 1),
        "rejected": (RunState.REJECTED, 2, 1),
        "training_failed": (RunState.TRAINING, 2, 1),
        "untested": (RunState.TESTING_FAILED, 1, 1),
        "no_capacity": (RunState.TRAINING, 2, 1),
        "refused": (RunState.TRAINING_FAILED, 1, 1),
        "overwritten": (RunState.VALIDATED, 1, 2),
        "overwritten_before": (RunState.VALIDATED, 1, 1),
        "stopped": (RunState.CANCELLED, 1, 1),
        "stopped_while_waiting": (RunState.CANCELLED, 1, 1),
        "dropped_again_while_stopping": (RunState.TRAINING, 2, 1),
        "untested_for_want_of_capacity": (RunState.TESTING, 2, 1),
        "second_of_a_line": (RunState.PUBLISHED, 1, 2),
        "overtaken": (RunState.PUBLISHED, 2, 3),
        "approved_and_rejected_by_a_person": (RunState.PUBLISHED, 1, 2),
    }


# --- stops ---


def stopped_at(deploy, scenario, delivery: int, at: int) -> bool:
    """Play a scenario whose run somebody stops right before one call of one delivery, which then goes on and comes again.

    Asserts that a run that had no verdict is cancelled, that its jobs and its place end with it, and that it is announced.
    False: there was no run yet.
    """
    CLOCK.now = START
    with deploy() as world:
        found = []

        def stop(call: Call, again: Call) -> Any:
            item = world.aws.runs.upload("training_data/cars.jsonl") or {}
            if run := world.aws.runs.get(item.get("run_id", "")):
                found.append(run)
                world.handle("start_training", stop_requested(world))
            return call()

        for number, (function, event) in enumerate(scenario(world)):
            if number == delivery:
                world.trouble_happens(stop, at)
            world.handle(function, event)
            if number == delivery:
                world.handle(function, event)
                break
        if not found:
            return False
        (run,) = found
        end = run.state if run.state in FINAL else RunState.PUBLISHED if run.verdict else RunState.CANCELLED
        assert {world.jobs[job]["TrainingJobStatus"] for job in world.active_jobs} <= {"Stopping"}
        for job in world.active_jobs:
            function, kind = ("test_model", "train") if "-train-" in job else ("publish_results", "test")
            world.handle(function, world.job_event(f"{function}.{kind}_stopped", job))
        reconcile(ReconcileSettings.from_environment(), world.aws, minimum_age=timedelta(0))
        there = world.run(run.run_id)
        assert (there.state, there.attempt, there.open) == (end, run.attempt, None)
        assert not world.aws.runs.has_slot(there)
        told = {message["MessageAttributes"]["id"]["StringValue"] for message in world.notifications}
        assert [name.rpartition("/")[2] for name in told if name.startswith(run.run_id)] == [end]
        return True


@pytest.mark.parametrize(
    "scenario",
    [
        (published, 4),
        *(
            pytest.param((each, 1), marks=pytest.mark.soak)
            for each in (published, no_capacity, untested_for_want_of_capacity, overtaken)
        ),
    ],
    ids=lambda scenario: f"{scenario[0].__name__}-{scenario[1]}",
)
def test_a_run_can_be_stopped_before_its_calls(deploy, scenario, say):
    scenario, every = scenario
    calls, _ = play(deploy, scenario)
    moments = [(delivery, at) for delivery, operations in enumerate(calls) for at in range(len(operations))][::every]
    tried = sum(stopped_at(deploy, scenario, *moment) for moment in moments)
    say(f"{tried} stops of a run {scenario.__name__}")
    assert tried >= 15
