"""The local application under load and under fire, for as long as it takes: `make soak`. See benchmarks/chaos.py."""

import os
import time

import pytest
from tiny_model import make_tiny_model

from benchmarks.chaos import Chaos, bring_up, chaos
from pipeline.runs.states import RunState

pytestmark = pytest.mark.soak


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_ten_minutes_of_chaos_lose_nothing(tmp_path, say):
    killed, ended, dropped = chaos(tmp_path, minutes=10, pause=8, seed=2026)
    say(f"killed {dict(killed)}; of {dropped} datasets {dict(ended)}")
    assert killed.keys() == {"function", "job", "application"}
    assert ended.total() == dropped
    assert ended["published"] > 0


def test_twenty_drops_wait_for_two_places_in_the_order_they_came_in(tmp_path):
    stack = bring_up(tmp_path / "app", {"MaxConcurrentJobs": "2"})
    try:
        app = Chaos(stack)
        app.drop(make_tiny_model(tmp_path / "tiny"))
        for _ in range(19):
            app.drop()
        sagemaker = stack.client("sagemaker")
        waited: set[str] = set()
        deadline = time.monotonic() + 1800
        while len(runs := app.runs()) < 20 or any(run.open for run in runs.values()):
            assert time.monotonic() < deadline, {name: run.state for name, run in runs.items()}
            assert len(sagemaker.list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]) <= 2
            waiting = [run for run in runs.values() if run.state == RunState.WAITING]
            waited |= {run.run_id for run in waiting}
            assert all(run.reason for run in waiting)
            time.sleep(0.5)
        assert len(waited) >= 15
        assert {run.state for run in runs.values()} == {RunState.PUBLISHED}
        queue = sorted((run for run in runs.values() if run.run_id in waited), key=lambda run: run.arrived)
        created = [sagemaker.describe_training_job(TrainingJobName=run.train_job)["CreationTime"] for run in queue]
        assert created == sorted(created)
    finally:
        stack.down()
