"""Time limits: the steps that fit, and runs that end at their limit with the best model so far."""

import json
from types import SimpleNamespace

import pytest

from trainer import bounds, train
from trainer.bounds import Costs, enough_time, save_due
from trainer.job import JobError
from trainer.sampling import ScoredCompletion
from tunedrop.config.schedule import evaluation_steps


@pytest.mark.parametrize(
    ("spent", "costs", "fits"),
    [
        (0, Costs(), True),
        (970, Costs(), True),
        (971, Costs(), False),  # 3 % stay unused
        (900, Costs(step=56), True),
        (900, Costs(step=57), False),  # it may be a quarter slower
        (900, Costs(step=8, evaluation=20, save=20, finish=20), True),
        (900, Costs(step=8, evaluation=21, save=20, finish=20), False),
    ],
)
def test_a_step_and_what_follows_it_must_fit_into_the_limit(spent, costs, fits):
    assert enough_time(spent, 1000, costs) == fits


@pytest.mark.parametrize(
    ("since", "costs", "due"),
    [
        (200, Costs(step=10), False),
        (295, Costs(step=10), True),  # with the next step more than five minutes would be at stake
        (1, Costs(step=600), True),
        (900, Costs(step=10, save=20), False),  # saving may take 2 % of the time: every 1000 s
        (995, Costs(step=10, save=20), True),
    ],
)
def test_a_checkpoint_is_due_when_much_could_be_lost_but_not_all_the_time(since, costs, due):
    assert save_due(since, costs) == due


@pytest.mark.parametrize(
    ("max_steps", "answers", "rows", "steps"),
    [(1000, 64, 64, 100), (10, 48, 25, 6), (10, 1000, 10, 1), (50, 64, 64, 10)],
)
def test_evaluations_are_rare_enough_to_be_cheap(max_steps, answers, rows, steps):
    assert evaluation_steps(max_steps, answers, rows) == steps


class Clock:
    """A clock on which only steps take time, and the evaluations that a test makes take it."""

    def __init__(self, patch, step=10.0):
        self.now = 1_000.0
        clock = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now)
        patch.setattr("trainer.bounds.time", clock)
        patch.setattr("trainer.train.time", clock)
        patch.setattr(train, "started", lambda: 1_000.0)
        begin = bounds.Bounds.on_step_begin

        def slow(this, *args, **kwargs):
            begin(this, *args, **kwargs)
            self.now += step

        patch.setattr(bounds.Bounds, "on_step_begin", slow)


def bounded(job, **compute):
    job.config(grpo={"max_steps": 12}, lora={"r": 4}, compute=compute, learnability={"samples": 0})
    job.rows(24)
    job.heldout()


@pytest.mark.parametrize(
    ("compute", "flags", "name"),
    [({"max_runtime": 78}, [], "max_runtime"), ({"max_runtime": 3600}, ["--max-runtime", "78"], "max_cost_usd")],
)
def test_a_budget_for_half_the_steps_ends_with_the_best_model_by_then(job, monkeypatch, compute, flags, name):
    bounded(job, **compute)
    clock, rewards = Clock(monkeypatch), iter([0.75, 0.5])

    def evaluate(_trainer, _rewards, rows, _samples):
        clock.now += 3
        return [ScoredCompletion("", reward, {}, cut=False) for reward in [next(rewards)] * len(rows)]

    monkeypatch.setattr("trainer.sampling._batch", evaluate)
    monkeypatch.setattr("trainer.general_probe.Probe._right", lambda _probe: [True])
    train.train(train.parse_flags(flags))
    result = job.training()
    # 78 s less 3 % are six steps of 10 s and two evaluations of 3 s.
    assert (result["steps"], result["max_steps"], result["stopped"]) == (6, 12, True)
    assert result["bounded"] == result["ended"] == name
    assert result["evaluations"] == [{"step": 3, "heldout_reward": 0.75}, {"step": 6, "heldout_reward": 0.5}]
    assert result["checkpoint"] == {"step": 3, "heldout_reward": 0.75}
    best = job.root / "output/checkpoints/checkpoint-3/adapter_model.safetensors"
    assert (job.model / "adapter/adapter_model.safetensors").read_bytes() == best.read_bytes()
    assert (job.model / "merged/model.safetensors").exists()


def test_a_run_that_comes_back_without_time_ends_with_what_it_had(job, monkeypatch):
    bounded(job, max_runtime=85)
    Clock(monkeypatch)
    train.train(train.parse_flags([]))
    first = job.training()
    monkeypatch.setattr(train, "build_trainer", forbid_training(train.build_trainer))
    train.train(train.parse_flags([]))
    again = job.training()
    assert {**again, "seconds": 0, "proofs": 0} == {**first, "seconds": 0, "proofs": 0}
    assert [point["step"] for point in job.metrics()] == list(range(1, first["steps"] + 1))


def test_a_higher_limit_lets_it_go_on(job, monkeypatch):
    bounded(job, max_runtime=85)
    with monkeypatch.context() as patch:
        Clock(patch)
        train.train(train.parse_flags([]))
    bounded(job, max_runtime=3600)
    train.train(train.parse_flags([]))
    result = job.training()
    assert (result["steps"], result["ended"], result["bounded"]) == (12, "complete", None)


def forbid_training(build):
    def built(*args):
        trainer = build(*args)
        trainer.train = None
        return trainer

    return built


def test_a_limit_too_low_for_anything_is_said(job, monkeypatch):
    bounded(job, max_runtime=60)
    Clock(monkeypatch)
    monkeypatch.setattr(train, "started", lambda: 900.0)  # the container took its time
    with pytest.raises(JobError, match="max_runtime leaves 60 s, too few for a single step: raise max_runtime"):
        train.train(train.parse_flags([]))


def test_checkpoints_are_saved_for_time_alone(job, monkeypatch):
    bounded(job, max_runtime=36000)
    (job.root / "input/training/heldout.jsonl").unlink()
    Clock(monkeypatch, step=120.0)
    monkeypatch.setattr("trainer.train.CHECKPOINTS_KEPT", 10)
    train.train(train.parse_flags([]))
    saved = sorted(int(path.name.partition("-")[2]) for path in (job.root / "output/checkpoints").glob("checkpoint-*"))
    assert saved == [2, 4, 6, 8, 10, 12]  # with the next step more than five minutes would be at stake
    assert json.loads((job.root / "output/checkpoints/checkpoint-4/manifest.json").read_text())["record"]["seconds"] == 480.0
