"""Measures the cost of a burst of uploads: runs the handlers against an emulated AWS (moto), in one process.

    .venv/bin/python -m benchmarks.burst                   # 1,000 different uploads, 200 duplicates, 20 concurrent jobs

The benchmark delivers every event as EventBridge does. When no event is left, it ends all jobs. It asserts that each run
requests exactly one training job, and that every run is published. A burst of a tenth of the size runs first: calls per run
must not grow with the number of runs. CPU time is measured inside AWS calls (SDK and emulator) and outside (the handlers'
own code).
"""

import argparse
import json
import logging
import os
import resource
import sys
import time
from collections import Counter, deque
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "functions"), str(ROOT / "tests" / "support")]
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "POWERTOOLS_METRICS_NAMESPACE"):
    os.environ.setdefault(name, "testing")
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")

from botocore.client import BaseClient  # noqa: E402 - after the paths
from fake_stack import OWN_RULES, PREFIX  # noqa: E402
from world import World, deployed  # noqa: E402

from pipeline.runs.states import RunState  # noqa: E402
from pipeline.runs.table import RUN, run_of_item  # noqa: E402
from tunedrop.object_keys import JobName  # noqa: E402

# On-demand list prices in US dollars, us-east-1, as of 2026-11, from aws.amazon.com/<service>/pricing. Writes of items under
# 1 KB: one unit for the item, and one for each entry that the index `open` gains or loses. A transaction doubles them.
WRITE_UNIT, READ_UNIT = 0.625e-6, 0.125e-6
PRICES = {
    "PutItem": 2 * WRITE_UNIT,
    "UpdateItem": 3 * WRITE_UNIT,
    "TransactWriteItems": 8 * WRITE_UNIT,
    "GetItem": READ_UNIT,
    "Query": READ_UNIT,
    "PutObject": 5e-6,
    "ListObjectsV2": 5e-6,
    "GetObject": 0.4e-6,
    "HeadObject": 0.4e-6,
    "PutEvents": 1e-6,
    "Publish": 0.5e-6,
}
INVOCATION = 0.2e-6  # Lambda, without its GB-seconds
GB_SECOND = 16.6667e-6
SECONDS_PER_INVOCATION = 0.5  # an assumption, at 1 GB; most of this time is spent waiting for AWS
DYNAMODB = ("PutItem", "UpdateItem", "TransactWriteItems", "GetItem", "Query")
S3 = ("PutObject", "GetObject", "ListObjectsV2", "HeadObject")


@dataclass
class Figures:
    """The figures of a burst: wall and CPU seconds, calls by operation, invocations by function, jobs."""

    runs: int
    seconds: float = 0.0
    cpu: float = 0.0
    cpu_in_calls: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    invocations: Counter[str] = field(default_factory=Counter)
    most_jobs: int = 0
    trained: int = 0

    def per_run(self, operations: tuple[str, ...]) -> float:
        """Return the number of calls of these operations per run."""
        return sum(self.calls[name] for name in operations) / self.runs

    @property
    def dollars_per_run(self) -> float:
        """The cost of the control plane per run, in US dollars."""
        lambdas = self.invocations.total() * (INVOCATION + SECONDS_PER_INVOCATION * GB_SECOND)
        return (sum(PRICES.get(name, 0) * number for name, number in self.calls.items()) + lambdas) / self.runs


def burst(uploads: int, duplicates: int, jobs: int) -> Figures:
    """Drop `uploads` different datasets, deliver `duplicates` of their events twice, and return the figures.

    Raises AssertionError if a run is lost, is not published, or is trained twice.
    """
    figures = Figures(uploads)
    with deployed(lambda name: json.loads((ROOT / "events" / f"{name}.json").read_text())) as world:
        os.environ["MAX_CONCURRENT_JOBS"] = str(jobs)
        world.quota = jobs
        pending: deque[tuple[str, dict[str, Any]]] = deque()
        events = [world.upload_event(f"training_data/d{n:04}.jsonl", dataset(n)) for n in range(uploads)]
        pending += [("validate_dataset", event) for event in [*events, *events[:duplicates]]]
        restore = measure(figures)
        try:
            started, cpu = time.perf_counter(), time.process_time()
            while pending or world.active_jobs:
                while pending:
                    deliver(world, pending, figures)
                end_jobs(world, pending)
            figures.seconds, figures.cpu = time.perf_counter() - started, time.process_time() - cpu
        finally:
            restore()
        check(world, uploads, figures)
    return figures


def dataset(n: int) -> bytes:
    """Return the n-th dataset: 30 rows, different from those of all other datasets."""
    return b"".join(b'{"question": "What is %d+%d?", "answer": "%d"}\n' % (n, row, n + row) for row in range(30))


def deliver(world: World, pending: deque[tuple[str, dict[str, Any]]], figures: Figures) -> None:
    """Deliver the oldest event. Events that the handlers send are appended to `pending`."""
    function, event = pending.popleft()
    before = len(world.sent_events)
    figures.invocations[function] += 1
    world.handle(function, event)
    for entry in world.sent_events[before:]:
        takers = [taker for taker, types in OWN_RULES.items() if entry["DetailType"] in types]
        pending.extend((taker, world.delivered(entry)) for taker in takers)
    figures.most_jobs = max(figures.most_jobs, len(world.active_jobs))


def end_jobs(world: World, pending: deque[tuple[str, dict[str, Any]]]) -> None:
    """Let every job complete."""
    for job in world.active_jobs:
        name = JobName.parse(job, PREFIX)
        run = world.run(name.run_id)
        if name.kind == "train":
            world.save_training(run)
            event = world.job_event("test_model.train_completed", job)
        else:
            world.save_tests(run, [outcome(n) for n in range(6)])
            event = world.job_event("publish_results.test_completed", job)
        pending.extend([({"train": "test_model", "test": "publish_results"}[name.kind], event), ("start_training", event)])


def outcome(n: int) -> dict[str, Any]:
    """Return an inference test on which the tuned model scores higher."""
    case = {"id": f"t{n}", "prompt": [{"role": "user", "content": "?"}], "reference": "!", "tags": [], "weight": 1.0}
    answers = {
        name: {"text": text, "score": score, "rewards": {}} for name, text, score in (("base", "", 0.0), ("tuned", "!", 1.0))
    }
    return case | {"must_pass": False} | answers


def measure(figures: Figures) -> Any:
    """Start to count calls and their CPU time; return a function that stops the counting."""
    make_api_call = BaseClient._make_api_call

    def counting(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        figures.calls[operation] += 1
        started = time.process_time()
        try:
            return make_api_call(client, operation, arguments)
        finally:
            figures.cpu_in_calls += time.process_time() - started

    BaseClient._make_api_call = counting
    return lambda: setattr(BaseClient, "_make_api_call", make_api_call)


def check(world: World, uploads: int, figures: Figures) -> None:
    """Assert that every run was published after exactly one training job."""
    scanned = world.aws.runs._table.meta.client.get_paginator("scan").paginate(TableName=world.aws.runs._table.name)
    runs = [run_of_item(item) for page in scanned for item in page["Items"] if item["id"].startswith(RUN)]
    assert len(runs) == uploads
    assert {run.state for run in runs} == {RunState.PUBLISHED}
    trained = [request["TrainingJobName"] for request in world.job_requests if "-train-" in request["TrainingJobName"]]
    assert len(trained) == len(set(trained)) == uploads
    figures.trained = len(trained)
    assert figures.most_jobs <= int(os.environ["MAX_CONCURRENT_JOBS"])


def main() -> None:
    """Print the figures of a burst beside those of a burst of a tenth of its size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--uploads", type=int, default=1000)
    parser.add_argument("--duplicates", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=20)
    options = parser.parse_args()
    logging.disable()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # hides the metrics that the functions print
        small = burst(options.uploads // 10, options.duplicates // 10, options.jobs)
        large = burst(options.uploads, options.duplicates, options.jobs)
    rows: list[tuple[str, Any]] = [
        ("runs", lambda f: f"{f.runs}"),
        ("training jobs requested", lambda f: f"{f.trained}"),
        ("most concurrent jobs", lambda f: f"{f.most_jobs}"),
        ("runs per second", lambda f: f"{f.runs / f.seconds:.2f}"),
        ("handler CPU ms per run, own code", lambda f: f"{1000 * (f.cpu - f.cpu_in_calls) / f.runs:.1f}"),
        ("handler CPU ms per run, with SDK and moto", lambda f: f"{1000 * f.cpu / f.runs:.1f}"),
        ("invocations per run", lambda f: f"{f.invocations.total() / f.runs:.2f}"),
        ("DynamoDB calls per run", lambda f: f"{f.per_run(DYNAMODB):.2f}"),
        ("DynamoDB calls per invocation", lambda f: f"{f.per_run(DYNAMODB) * f.runs / f.invocations.total():.2f}"),
        ("S3 calls per run", lambda f: f"{f.per_run(S3):.2f}"),
        ("control plane, US dollars per run", lambda f: f"{f.dollars_per_run:.6f}"),
    ]
    for name, figure in rows:
        print(f"{name:42} {figure(small):>10} {figure(large):>10}")
    print(f"{'peak memory, MB (with all of moto)':42} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:>21.0f}")
    print("calls of the larger burst: " + ", ".join(f"{name} {number}" for name, number in large.calls.most_common()))


if __name__ == "__main__":
    main()
