"""A search for an order of events that loses a run, or does something twice.

Events of several runs arrive twice, late, out of order or never; handlers die in the middle, or are overtaken by another in
the middle; jobs end as they like; quotas close and open; people stop runs, and approve and reject models; `reconcile` comes
by. After every step the invariants hold. In the end every run has ended, every line has its champion, and every end and
every champion is announced.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest
from fake_stack import MODELS, OWN_RULES, PREFIX, TABLE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from moto.dynamodb.models import DynamoDBBackend
from msgspec import structs
from world import GOOD_DATA, KilledError, World, deployed

from pipeline.jobs.answers import suite_prefix
from pipeline.notify.events import CHAMPION_CHANGED, PUBLISHED
from pipeline.runs import clock
from pipeline.runs.lines import LINE, OPEN_LINE, Line
from pipeline.runs.states import FINAL, Run, RunState
from pipeline.runs.table import CAPACITY, RUN, UPLOAD, run_of_item
from tunedrop.object_keys import JobName

from .test_crash_points import die_after, die_before, outcome, overtake
from .test_lines import package_event

PLACES = 2  # MAX_CONCURRENT_JOBS of fake_stack
# How far a run has come within an attempt.
ORDER = {
    state: rank
    for rank, states in enumerate(
        [
            {RunState.VALIDATED},
            {RunState.WAITING},
            {RunState.TRAINING},
            {RunState.TRAINED},
            {RunState.TESTING},
            {RunState.TESTED},
            FINAL,
        ]
    )
    for state in states
}
DATASETS = ["shop/a", "shop/b", "c"]  # of one line: by their folder, and by a config
CONTENTS = {
    "good": GOOD_DATA,
    "better": GOOD_DATA + b'{"question": "100+1?", "answer": "101"}\n',
    "broken": b'{"question": "no answer"}\n',
}
ENDS = {
    "train": ["train_completed", "train_completed", "train_failed", "train_no_capacity", "train_stopped", "train_at_limit"],
    "test": ["test_completed", "test_completed", "test_failed", "train_no_capacity", "test_stopped"],
}
pick = st.integers(0, 1000)


def lost(n: int) -> dict[str, Any]:
    """A test in which the tuned model is no better than the others."""
    return outcome(n) | {"tuned": {"text": "", "score": 0.0, "rewards": {}}}


class Decision(NamedTuple):
    """A verdict, and the line's version and champion right before it was written."""

    run_id: str
    test_job: str
    verdict: str
    version: int
    champion: str | None


def decisions_noted(decided: list[Decision]) -> Callable[..., None]:
    """Return DynamoDB's transaction, which notes each verdict that it writes."""
    transact = DynamoDBBackend.transact_write_items

    def transact_write_items(backend: Any, transact_items: list[dict[str, Any]]) -> None:
        items = {key.value: item for key, item in backend.get_table(TABLE).items.items()}
        writes = [operation for each in transact_items for operation in each.values()]
        found = []
        for write in writes:
            if verdict := write.get("ExpressionAttributeValues", {}).get(":verdict"):
                run = items[write["Key"]["id"]["S"]].attrs
                line = items[LINE + run["line"].value].attrs
                champion = line["champion"].value if "champion" in line else None
                found.append(
                    Decision(run["run_id"].value, run["test_job"].value, verdict["S"], int(line["version"].value), champion)
                )
        transact(backend, transact_items)
        decided.extend(found)

    return transact_write_items


class Deliveries(RuleBasedStateMachine):
    """What may happen to a stack."""

    load_event: Any = None  # given by the test

    def __init__(self) -> None:
        super().__init__()
        self.time = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(clock, "now", self.now)
        self.deployment = deployed(type(self).load_event)
        self.world: World = self.deployment.__enter__()
        self.pending: list[tuple[str, dict[str, Any]]] = []  # events that may still arrive: who takes each, and the event
        self.seen_events = 0
        self.history: dict[str, Run] = {}
        self.newest: dict[str, str] = {}  # key → version of the upload that counts
        self.lines: dict[str, Line] = {}
        self.approved: set[str] = set()  # runs that the gate or a person approved at some time
        self.decided: list[Decision] = []
        self.patch.setattr(DynamoDBBackend, "transact_write_items", decisions_noted(self.decided))
        self.world.put("training_data/c.yaml", b"line: shop")

    def now(self) -> str:
        self.time += timedelta(milliseconds=1)
        return self.time.isoformat(timespec="microseconds")

    # --- the world ---

    def items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.world.aws.runs._table.scan()["Items"]
        return items

    def handle(self, function: str, event: dict[str, Any]) -> None:
        """Deliver an event; what the handler sends, and SageMaker's events, are in flight then, whether it lived or not."""
        packages = set(self.world.packages)
        try:
            self.world.handle(function, event)
        except KilledError:
            pass
        finally:
            self.world.trouble_at = -1
        for entry in self.world.sent_events[self.seen_events :]:
            # test_deployment_search.py has the search of deploy_model's events.
            takers = [name for name, types in OWN_RULES.items() if entry["DetailType"] in types and name != "deploy_model"]
            self.pending += [(function, self.world.delivered(entry)) for function in takers]
        self.seen_events = len(self.world.sent_events)
        for token in self.world.packages.keys() - packages:
            self.package_changed(self.world.packages[token]["ModelPackageArn"])

    def package_changed(self, arn: str) -> None:
        """Let SageMaker's event of a model package be in flight."""
        self.pending.append(("publish_results", package_event(self.world, arn)))

    def end_job(self, job: str, how: str, *, won: bool = True) -> None:
        """End a job; its events are in flight then."""
        name = JobName.parse(job, PREFIX)
        kind, run = name.kind, self.world.run(name.run_id)
        if how in {"train_completed", "train_at_limit"}:
            self.world.save_training(structs.replace(run, train_job=job))
        elif how == "test_completed":
            self.world.save_tests(structs.replace(run, test_job=job), [outcome(n) if won else lost(n) for n in range(30)])
        stage = {"train": "test_model", "test": "publish_results"}[kind]
        event = self.world.job_event(f"{'test_model' if how.startswith('train') else 'publish_results'}.{how}", job)
        self.pending += [(stage, event), ("start_training", event)]

    # --- what happens ---

    @rule(name=st.sampled_from(DATASETS), content=st.sampled_from(["good", "better", "good", "better", "broken"]))
    def upload(self, name, content):
        key = f"training_data/{name}.jsonl"
        event = self.world.upload_event(key, CONTENTS[content])
        self.newest[key] = event["detail"]["object"]["version-id"]
        self.pending.append(("validate_dataset", event))

    @rule()
    def all_goes_well(self):
        """Trainings complete, and all that is in flight arrives: the search comes to the verdicts sooner."""
        for job in self.world.active_jobs:
            if JobName.parse(job, PREFIX).kind == "train" and self.world.jobs[job]["TrainingJobStatus"] == "InProgress":
                self.end_job(job, "train_completed")
        while self.pending:
            self.handle(*self.pending.pop(0))

    @precondition(lambda self: self.pending)
    @rule(which=pick, again=st.booleans())
    def deliver(self, which, again):
        function, event = self.pending[which % len(self.pending)]
        if not again:
            self.pending.remove((function, event))
        self.handle(function, event)

    @precondition(lambda self: self.pending)
    @rule(which=pick, call=st.integers(0, 40), death=st.sampled_from([die_before, die_after]))
    def deliver_and_die(self, which, call, death):
        function, event = self.pending[which % len(self.pending)]
        self.world.trouble_happens(death, call)
        self.handle(function, event)

    @precondition(lambda self: len(self.pending) > 1)
    @rule(which=pick, other=pick, call=st.integers(0, 40))
    def deliver_two_at_once(self, which, other, call):
        function, event = self.pending[which % len(self.pending)]
        second = self.pending[other % len(self.pending)]
        self.world.trouble_happens(overtake, call, lambda: self.world.handle(*second))
        self.handle(function, event)

    @precondition(lambda self: any(event["source"] != "aws.s3" for _, event in self.pending))
    @rule(which=pick)
    def lose(self, which):
        # Of an upload whose event nobody ever saw nobody can know.
        losable = [delivery for delivery in self.pending if delivery[1]["source"] != "aws.s3"]
        self.pending.remove(losable[which % len(losable)])

    @precondition(lambda self: self.world.active_jobs)
    @rule(which=pick, how=pick, won=st.sampled_from([True, True, False]))
    def end_a_job(self, which, how, won):
        job = self.world.active_jobs[which % len(self.world.active_jobs)]
        ends = ENDS[JobName.parse(job, PREFIX).kind]
        if self.world.jobs[job]["TrainingJobStatus"] == "Stopping":
            ends = [name for name in ends if name.endswith(("stopped", "completed"))]
        self.end_job(job, ends[how % len(ends)], won=won)

    @precondition(lambda self: self.history)
    @rule(which=pick)
    def stop(self, which):
        event = self.world.load_event("start_training.stop_requested")
        event["time"] = self.now()
        event["detail"]["run_id"] = sorted(self.history)[which % len(self.history)]
        self.pending.append(("start_training", event))

    @precondition(lambda self: self.world.packages)
    @rule(which=pick, status=st.sampled_from(["Approved", "Rejected"]))
    def approve_or_reject_a_model(self, which, status):
        arns = sorted(answer["ModelPackageArn"] for answer in self.world.packages.values())
        arn = arns[which % len(arns)]
        self.world.aws.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus=status)
        if status == "Approved":
            self.approved.add(self.run_of_package(arn))
        self.package_changed(arn)

    @rule(quota=st.sampled_from([None, 1, 0]))
    def change_quota(self, quota):
        self.world.quota = quota

    @rule()
    def come_by(self):
        self.time += timedelta(minutes=90)
        self.handle("reconcile", self.world.load_event("reconcile.scheduled"))

    # --- what is true after every step ---

    @invariant()
    def everything_is_as_it_must_be(self):
        items = self.items()
        found = [run_of_item(item) for item in items if item["id"].startswith(RUN)]
        self.every_job_is_the_only_one_of_its_run_and_has_a_place(items)
        self.runs_only_go_forward(found)
        for run in found:
            if run != self.history.get(run.run_id):
                self.what_a_run_says_is_there(run)
                self.history[run.run_id] = run
        self.approved |= {decision.run_id for decision in self.decided if decision.verdict == "APPROVED"}
        self.every_verdict_is_about_the_champion_in_use()
        for item in items:
            if item["id"].startswith(LINE):
                self.a_line_only_goes_forward(self.world.aws.lines.get(item["line"]))

    def every_job_is_the_only_one_of_its_run_and_has_a_place(self, items: list[dict[str, Any]]) -> None:
        names = [request["TrainingJobName"] for request in self.world.job_requests]
        assert len(names) == len(set(names))
        active = [name.split("-", 2)[2].rpartition("-")[0] for name in self.world.active_jobs]
        assert len(active) == len(set(active))
        places = next((set(item.get("running", ())) for item in items if item["id"] == CAPACITY), set())
        assert len(places) <= PLACES
        assert set(active) <= places

    def runs_only_go_forward(self, found: list[Run]) -> None:
        for run in found:
            before = self.history.get(run.run_id)
            if before is not None:
                assert run.attempt >= before.attempt
                if run.attempt == before.attempt:
                    assert ORDER[run.state] >= ORDER[before.state], (before, run)
                    assert before.state not in FINAL or run.state == before.state, (before, run)

    def what_a_run_says_is_there(self, run: Run) -> None:
        receipt = self.world.read_json(f"runs/{run.run_id}/validation.json")
        assert receipt["ok"] == (run.state != RunState.REJECTED)
        if run.state == RunState.PUBLISHED:
            assert self.world.read_json(f"runs/{run.run_id}/result.json")["model_package"] == run.model_package
            arns = [package["ModelPackageArn"] for package in self.world.packages_of(MODELS)]
            assert run.model_package in arns
            # One for each attempt that came so far as to register one.
            assert len(arns) <= sum(each.attempt for each in self.history.values()) + 1

    def every_verdict_is_about_the_champion_in_use(self) -> None:
        requests = {request["TrainingJobName"]: request["HyperParameters"] for request in self.world.job_requests}
        for decision in self.decided:
            tested = requests[decision.test_job]
            assert (int(tested["line-version"]), tested.get("champion")) == (decision.version, decision.champion), decision

    def a_line_only_goes_forward(self, line: Line) -> None:
        before = self.lines.get(line.line, Line(line=line.line))
        assert before.announced <= line.announced <= line.version
        assert line.version >= before.version
        if line.version == before.version:
            assert (line.champion, line.suite) == (before.champion, before.suite)
            assert before.champion_package in {None, line.champion_package}
        elif line.suite:
            suite = self.world.read_json(f"{suite_prefix(line.line, line.suite)}suite.json")
            members = {part["run_id"] for part in suite["parts"]}
            assert members <= self.approved
        assert (line.champion is None) == (line.suite is None)
        self.lines[line.line] = line

    def run_of_package(self, arn: str) -> str:
        """Return the run of a model package, which its client token names."""
        (token,) = [token for token, answer in self.world.packages.items() if answer["ModelPackageArn"] == arn]
        (found,) = [run for run in self.history if f"{run}-".endswith(token.rpartition("-")[0][-20:] + "-")]
        return found

    # --- the end ---

    def teardown(self) -> None:
        try:
            self.settle()
            self.everything_has_ended()
        finally:
            self.deployment.__exit__(None, None, None)
            self.patch.undo()

    def settle(self) -> None:
        """Let everything that is in flight arrive, every job complete, and `reconcile` come by, until nothing happens."""
        self.world.quota = None
        for _ in range(40):
            for job in self.world.active_jobs:
                stopping = self.world.jobs[job]["TrainingJobStatus"] == "Stopping"
                self.end_job(job, f"{job.split('-')[1]}_{'stopped' if stopping else 'completed'}")
            while self.pending:
                self.handle(*self.pending.pop(0))
            self.come_by()
            self.everything_is_as_it_must_be()
            still_open = [item for item in self.items() if item.get("open", OPEN_LINE) != OPEN_LINE]
            if not self.pending and not self.world.active_jobs and not still_open:
                return
        raise AssertionError(still_open)

    def everything_has_ended(self) -> None:
        announced = {json.loads(entry["Detail"]).get("id") for entry in self.world.sent_events}
        notified = {message["MessageAttributes"]["id"]["StringValue"] for message in self.world.notifications}
        names = {RunState.PUBLISHED: "Results Published", RunState.REJECTED: "Dataset Rejected"}
        items = self.items()
        for run in (run_of_item(item) for item in items if item["id"].startswith(RUN)):
            assert run.state in FINAL
            end = f"{run.run_id}/{run.attempt}/{names.get(run.state, 'Training Failed')}/{run.state}"
            assert end in announced
            assert end in notified
        assert [item.get("running", set()) for item in items if item["id"] == CAPACITY] in ([], [set()])
        uploads = {item["id"].removeprefix(UPLOAD): item for item in items if item["id"].startswith(UPLOAD)}
        assert {key: item["version_id"] for key, item in uploads.items()} == self.newest
        assert {item["run_id"] for item in uploads.values()} <= self.history.keys()
        self.every_line_has_the_newest_approved_model()
        self.every_champion_is_announced()

    def every_line_has_the_newest_approved_model(self) -> None:
        newest: dict[str, tuple[int, str, str]] = {}
        for package in self.world.packages_of(MODELS):
            run = self.history[self.run_of_package(package["ModelPackageArn"])]
            if package["ModelApprovalStatus"] == "Approved":
                found = (package["ModelPackageVersion"], run.run_id, package["ModelPackageArn"])
                newest[run.line] = max(newest.get(run.line, found), found)
        champions = {line.line: (line.champion, line.champion_package) for line in self.lines.values() if line.champion}
        assert champions == {name: (run_id, arn) for name, (_, run_id, arn) in newest.items()}

    def every_champion_is_announced(self) -> None:
        contents = defaultdict(set)
        for entry in self.world.sent_events:
            if entry["DetailType"] in {CHAMPION_CHANGED, PUBLISHED}:
                contents[json.loads(entry["Detail"])["id"]].add(entry["Detail"])
        assert {len(each) for each in contents.values()} <= {1}, contents
        versions = {f"{line.line}/{version}" for line in self.lines.values() for version in range(1, line.version + 1)}
        published = {name for name in contents if name.endswith("/PUBLISHED")}
        assert contents.keys() - published == versions


def search(load_event, **how) -> None:
    Deliveries.load_event = staticmethod(load_event)
    run_state_machine_as_test(
        Deliveries, settings=settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **how)
    )


def test_no_order_of_events_loses_a_run_or_does_something_twice(load_event):
    search(load_event, max_examples=6, stateful_step_count=30, derandomize=True)


@pytest.mark.soak
def test_no_order_of_events_does_so_in_a_long_search(load_event):
    search(load_event, max_examples=150, stateful_step_count=50)
