"""A search for the call after which a look must not die, and for the order of events after which a line serves wrongly.

Every call of every look of a scenario has trouble once; the looks go on, as the schedule's do, until nothing is left to do.
At the end the account must have what it has without trouble. A hanging call is no trouble here: a look holds its line for as
long as its function may run.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from fake_serving import tuned_answer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from world import GOOD_DATA, World

from pipeline.runs import clock
from pipeline.settings import DeploySettings
from pipeline.stages.deploy_model import look_at_all, undeploy

from .test_crash_points import break_down, die_after, die_before, in_a_fork, overtake, take_no_entry, throttle, time_out
from .test_deployments import COMPONENT, approved, archive

BEGIN = datetime.fromisoformat("2026-01-01T00:00:00.000000+00:00")
NOW = [BEGIN]
MOST_LOOKS = 60


@pytest.fixture(autouse=True)
def time(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: NOW[0].isoformat(timespec="microseconds"))


def look(world: World) -> bool:
    """Look once, a minute after the last look; return whether something goes on."""
    NOW[0] += timedelta(minutes=1)
    world.calls.clear()
    try:
        return look_at_all(DeploySettings.from_environment(), world.aws)
    finally:
        world.dead = False


def settle(world: World) -> None:
    """Look until nothing goes on."""
    for _ in range(MOST_LOOKS):
        if not look(world):
            return
    raise AssertionError(f"the deployment never ends: {world.aws.deployments.all()}")


# --- scenarios: what has happened when the looks begin ---


def first_model(world: World) -> None:
    approved(world)


def next_model(world: World) -> None:
    approved(world)
    settle(world)
    approved(world, GOOD_DATA * 2)


def wrong_model(world: World) -> None:
    next_model(world)
    wrong = archive(world.run(str(world.aws.lines.get("cars").champion)))
    world.serving.ask = lambda content, question: "!" if content == wrong else tuned_answer(content, question)


def wrong_under_the_lines_name(world: World) -> None:
    """The candidate answers rightly, and the line's name does not."""
    next_model(world)
    wrong = archive(world.run(str(world.aws.lines.get("cars").champion)))
    world.serving.ask = lambda content, question: (
        "!" if content == wrong and world.serving.serving(COMPONENT) == wrong else tuned_answer(content, question)
    )


def taken_down(world: World) -> None:
    approved(world)
    settle(world)
    undeploy("cars", datetime.fromisoformat(clock.now()), world.aws)


def merged_model(world: World) -> None:
    approved(world, config=b"lora: {r: 128}")
    settle(world)
    approved(world, GOOD_DATA * 2, b"lora: {r: 128}")


def other_instance(world: World) -> None:
    approved(world)
    settle(world)
    approved(world, GOOD_DATA * 2, b"serve: {instance_type: ml.g6.xlarge}")


def to_bedrock(world: World) -> None:
    approved(world)
    settle(world)
    approved(world, GOOD_DATA * 2, b"serve: {target: bedrock}")


def next_on_bedrock(world: World) -> None:
    approved(world, config=b"serve: {target: bedrock}")
    settle(world)
    approved(world, GOOD_DATA * 2, b"serve: {target: bedrock}")


def wrong_on_bedrock(world: World) -> None:
    next_on_bedrock(world)
    wrong = str(world.run(str(world.aws.lines.get("cars").champion)).artifacts)
    world.serving.ask = lambda content, question: "!" if content.startswith(wrong) else tuned_answer(content, question)


def from_bedrock(world: World) -> None:
    approved(world, config=b"serve: {target: bedrock}")
    settle(world)
    approved(world, GOOD_DATA * 2, b"serve: {target: sagemaker}")


SCENARIOS = [
    *(first_model, next_model, wrong_model, wrong_under_the_lines_name, taken_down, merged_model, other_instance),
    *(to_bedrock, next_on_bedrock, wrong_on_bedrock, from_bedrock),
]


def account(world: World) -> dict[str, Any]:
    """What the account has, and the deployment without what counts looks and time."""
    serving = world.serving
    kept = (
        "stage",
        "run",
        "imported",
        "endpoint",
        "component",
        "model",
        "instance_type",
        "refused",
        "answered",
        "unused",
        "event",
    )
    deployment = world.aws.deployments.get("cars")
    there = {
        "endpoints": {name: each["EndpointStatus"] for name, each in serving.endpoints.items()},
        "components": {name: serving.serving(name) for name in serving.components},
        "imported": {model: each["content"] for model, each in serving.imported.items()},
        **{kind: sorted(getattr(serving, kind)) for kind in ("configs", "models", "alarms", "policies", "targets")},
        "deployment": {name: getattr(deployment, name) for name in kept},
        "busy": deployment.busy is not None and deployment.busy > clock.now(),
        "events": sorted({json.loads(event["Detail"]).get("id", "") for event in world.sent_events}),
    }
    return json.loads(json.dumps(there, default=str))


def looks(world: World) -> Iterator[list[str]]:
    """Look until nothing goes on; yield the calls of each look."""
    going_on = True
    while going_on:
        going_on = look(world)
        yield list(world.calls)


def search(deploy: Callable[[], Any], scenario: Callable[[World], None], troubles: list[Any], every: int = 1) -> int:
    """Play a scenario with every trouble at every call, or at every few, one at a time; return how many."""
    NOW[0] = BEGIN
    with deploy() as world:
        scenario(world)
        calls = list(looks(world))
        expected = account(world)
    tried = moment = 0
    NOW[0] = BEGIN
    with deploy() as world:
        scenario(world)
        for operations in calls:
            for at, operation in enumerate(operations):
                moment += 1
                if moment % every:
                    continue
                if operation in {"InvokeEndpoint", "InvokeModel"} and operation == operations[at - 1]:
                    continue  # the questions of an identity test are alike
                for trouble in troubles:
                    if (trouble is take_no_entry and operation != "PutEvents") or (trouble is die_before and at > 0):
                        continue
                    tried += 1
                    failure = in_a_fork(partial(go_on, world, trouble, at, expected))
                    assert not failure, f"{trouble.__name__} at {operation}, call {at}:\n{failure}"
            look(world)
    return tried


def go_on(world: World, trouble: Any, at: int, expected: dict[str, Any]) -> None:
    """Have trouble at one call of the next look, look on when a dead look no longer holds the line, and compare."""
    world.trouble_happens(trouble, at, lambda: look(world))
    try:
        look(world)
    except Exception:  # noqa: BLE001 - whatever the trouble turned into
        assert len(world.calls) > at
    finally:
        world.trouble_at = -1
    NOW[0] += timedelta(minutes=6)
    settle(world)
    assert account(world) == expected


@pytest.mark.parametrize(("scenario", "least"), [(next_model, 8), (next_on_bedrock, 3)])
def test_a_deployment_survives_death_at_every_twentieth_call(deploy, say, scenario, least):
    tried = search(deploy, scenario, [die_after], every=20)
    say(f"{tried} crash points of the deployment {scenario.__name__}")
    assert tried >= least


@pytest.mark.soak
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_deployment_survives_every_trouble_at_every_call(deploy, scenario, say):
    tried = search(deploy, scenario, [die_before, die_after, throttle, break_down, time_out, take_no_entry, overtake])
    say(f"{tried} troubles of the deployment {scenario.__name__}")


# --- any order of events ---


class Deployments(RuleBasedStateMachine):
    """Runs are approved and rejected, looks come and die, endpoints break; no other model than the tested one stays."""

    deploy: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        NOW[0] = BEGIN
        self.context = self.deploy()
        self.world = self.context.__enter__()
        self.runs: list[Any] = []
        self.wrong: set[str] = set()
        self.world.serving.ask = lambda content, question: "!" if content in self.wrong else tuned_answer(content, question)

    @precondition(lambda self: len(self.runs) < 4)
    @rule(wrong=st.booleans())
    def approve_another(self, wrong: bool) -> None:
        run = approved(self.world, GOOD_DATA * (len(self.runs) + 1))
        self.runs.append(run)
        if wrong:
            self.wrong.add(archive(run))

    @precondition(lambda self: self.runs)
    @rule(index=st.integers(0, 3), status=st.sampled_from(["Approved", "Rejected"]))
    def a_person_decides(self, index: int, status: str) -> None:
        run = self.runs[index % len(self.runs)]
        self.world.aws.sagemaker.update_model_package(ModelPackageArn=run.model_package, ModelApprovalStatus=status)
        event = self.world.load_event("publish_results.package_approved")
        event["detail"]["ModelPackageArn"] = run.model_package
        self.world.handle("publish_results", event)

    @rule(times=st.integers(1, 8))
    def look_on(self, times: int) -> None:
        for _ in range(times):
            look(self.world)

    @rule(at=st.integers(0, 12), trouble=st.sampled_from([die_before, die_after, throttle]))
    def a_look_goes_wrong(self, at: int, trouble: Any) -> None:
        self.world.trouble_happens(trouble, at)
        try:
            look(self.world)
        except Exception:  # noqa: BLE001 - the next look goes on
            pass
        finally:
            self.world.trouble_at = -1

    @rule()
    def take_down(self) -> None:
        undeploy("cars", datetime.fromisoformat(clock.now()), self.world.aws)

    @rule()
    def sleep(self) -> None:
        for component in self.world.serving.components.values():
            if "RuntimeConfig" in component:
                component["RuntimeConfig"] = {"DesiredCopyCount": 0, "CurrentCopyCount": 0}

    def teardown(self) -> None:
        try:
            NOW[0] += timedelta(minutes=6)
            settle(self.world)
            self.check()
        finally:
            self.context.__exit__(None, None, None)

    def check(self) -> None:
        """When nothing goes on, the champion answers, or the reason why another model or none does is told."""
        serving, line = self.world.serving, self.world.aws.lines.get("cars")
        deployment = self.world.aws.deployments.get("cars")
        served = {archive(run): run.run_id for run in self.runs}.get(str(serving.serving(COMPONENT)))
        assert served == deployment.run
        assert serving.serving(COMPONENT) not in self.wrong
        assert f"{COMPONENT}-next" not in serving.components
        if line.version in {deployment.refused_version, deployment.removed}:
            assert deployment.reason
        else:
            assert deployment.run == line.champion
        assert set(serving.endpoints) == ({deployment.endpoint} if deployment.run else set())
        assert len(serving.components) == (2 if deployment.run else 0)


def test_no_order_of_events_leaves_a_wrong_model(deploy):
    _search(deploy, examples=2, steps=10)


@pytest.mark.soak
def test_no_order_of_events_does_so_in_a_long_search(deploy):
    _search(deploy, examples=300, steps=25)


def _search(deploy: Callable[[], Any], examples: int, steps: int) -> None:
    machine = type("Machine", (Deployments,), {"deploy": staticmethod(deploy)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
