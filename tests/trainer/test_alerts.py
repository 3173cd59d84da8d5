"""Alerts: tables of histories, and trainings of a small model that go wrong in each way."""

import json
import math
from typing import Any, get_args

import pytest

from trainer import alerts, train
from trainer.job import JobError
from tunedrop.config.model import AlertCode
from tunedrop.rewards import RewardSpec

NAN = math.nan


def points(length=10, max_steps=None, **values):
    """A history: each value is a constant, a list, or a function of how far the run is (0 to 1)."""

    def at(value, index):
        if callable(value):
            return value(index / (length - 1))
        return value[index] if isinstance(value, list) else value

    healthy = {
        "reward": lambda x: 0.2 + 0.6 * x,
        "reward_best": 1.0,
        "frac_reward_zero_std": 0.2,
        "clipped_ratio": 0.1,
        "reward_finished": lambda x: 0.2 + 0.6 * x,
        "entropy": lambda x: 1.5 - x,
        "loss": 0.01,
        "grad_norm": 0.5,
    }
    named = {name: value for name, value in (healthy | values).items() if name != "rewards"}
    rewards = values.get("rewards", {"numeric": named["reward"]})
    return [
        {
            "step": index + 1,
            "max_steps": max_steps or length,
            **{name: at(value, index) for name, value in named.items()},
            "rewards": {name: at(value, index) for name, value in rewards.items()},
        }
        for index in range(length)
    ]


def noisy(level, by=0.02, slope=0.0):
    return lambda x: level + slope * x + by * math.sin(50 * x)


HEALTHY = {
    "it learns": points(),
    "it learns slowly, with noise": points(60, reward=noisy(0.3, 0.05, 0.4)),
    "it has just begun": points(5, 100, reward=0.0, frac_reward_zero_std=1.0, clipped_ratio=1.0),
    "answers are cut and paid all the same": points(
        12, clipped_ratio=0.95, reward_truncated=0.9, reward=noisy(0.8), reward_finished=0.8
    ),
    "answers are cut and it learns all the same": points(12, clipped_ratio=0.95, reward_truncated=0.1, reward_finished=0.9),
    "it has learned everything": points(
        12,
        reward=lambda x: min(1.0, 0.3 + 2 * x),
        frac_reward_zero_std=lambda x: float(x > 0.35),
        entropy=lambda x: 1.5 * 0.01**x,
    ),
    "form and content are learned": points(24, rewards={"xml_format": lambda x: x, "numeric": lambda x: x / 2}),
    "the form was good from the start": points(
        24, reward=noisy(0.5, 0.1, 0.3), rewards={"xml_format": 1.0, "numeric": noisy(0.3)}
    ),
    "no reference, so no divergence": points(12, kl=None),
    "no answer is ever finished, and all are paid": points(
        12, clipped_ratio=1.0, reward=noisy(0.4, 0.1), reward_truncated=noisy(0.4, 0.1), reward_finished=None
    ),
    "finished answers get more by chance": points(
        12,
        clipped_ratio=0.97,
        reward=noisy(0.4, 0.1),
        reward_truncated=noisy(0.4, 0.1),
        reward_finished=[1.0, None, 0.0] * 4,
    ),
    "a little off its base": points(12, kl=0.3),
    "a reused rollout has no rewards": points(12, reward_truncated=None, reward_finished=None),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_named_in_a_healthy_run(name):
    for length in range(1, len(HEALTHY[name]) + 1):
        assert alerts.find(HEALTHY[name][:length], {"xml_format"}) == []


SICK = {
    "no answer is ever paid": ("DEAD_REWARD", points(8, 80, reward=0.0, reward_best=0.0, frac_reward_zero_std=1.0), 8),
    "all answers were right before": ("DEAD_REWARD", points(8, 80, reward=1.0, frac_reward_zero_std=1.0), 8),
    "it was alive once": (
        "DEAD_REWARD",
        points(20, reward=lambda x: 0.2 * x * (x < 0.5), frac_reward_zero_std=lambda x: float(x >= 0.5)),
        18,
    ),
    "cut answers earn nothing": (
        "TRUNCATION",
        points(8, 80, clipped_ratio=0.7, reward=noisy(0.2), reward_truncated=0.0, reward_finished=0.8),
        8,
    ),
    "no answer is ever finished, and none is paid": (
        "TRUNCATION",
        points(8, 80, clipped_ratio=1.0, reward=0.0, frac_reward_zero_std=1.0, reward_truncated=0.0, reward_finished=None),
        8,
    ),
    "the form alone": (
        "HACKING_SUSPECT",
        points(12, 50, rewards={"xml_format": lambda x: x, "numeric": noisy(0.1, 0.01)}),
        12,
    ),
    "the form at the content's cost": (
        "HACKING_SUSPECT",
        points(40, rewards={"xml_format": lambda x: x, "numeric": lambda x: 0.5 - x / 2}),
        12,
    ),
    "it says the same again and again": (
        "ENTROPY_COLLAPSE",
        points(12, 80, reward=noisy(0.5), entropy=[1.5, 1.4, 1.3, 0.8] + [0.05] * 8),
        12,
    ),
    "far from its base": ("KL_BLOWUP", points(12, 100, kl=[0.1, 0.2, 0.2, 0.1, 3.0, 4.0, 5.0, 6, 7, 8, 9, 9]), 5),
    "a loss that is no number": ("NON_FINITE", points(3, 100, loss=[0.1, 0.2, NAN]), 3),
    "a gradient without end": ("NON_FINITE", points(2, 100, grad_norm=[0.1, math.inf]), 2),
    "nothing more to gain": ("PLATEAU", points(60, reward=lambda x: min(0.8, 0.2 + 2 * x)), 37),
    "it never learned": ("PLATEAU", points(40, reward=noisy(0.3, 0.1)), 21),
}


@pytest.mark.parametrize("name", SICK)
def test_each_trouble_is_named_as_soon_as_it_shows(name):
    code, history, since = SICK[name]
    named: dict[str, alerts.Alert] = {}
    for length in range(1, len(history) + 1):
        for alert in alerts.find(history[:length], {"xml_format"}):
            named.setdefault(alert.code, alert)
    assert set(named) == {code} | ({"DEAD_REWARD"} if "none is paid" in name else set())
    assert named[code].step == since
    assert named[code].message
    json.dumps(named[code].evidence, allow_nan=False)


def test_chosen_prompts_raise_no_alert_for_a_reward_that_does_not_rise():
    found = {
        alert.code
        for _, history, _ in SICK.values()
        for length in range(1, len(history) + 1)
        for alert in alerts.find(history[:length], {"xml_format"}, mean_rises=False)
    }
    assert found == {code for code, *_ in SICK.values()} - {"PLATEAU", "HACKING_SUSPECT"}


def test_every_code_can_be_named_in_a_config_and_is_tested_here():
    assert {code for code, _, _ in SICK.values()} == set(get_args(AlertCode))


class OnlyWhole:
    """Pays an answer that ends before the limit of six characters."""

    __name__, weight, gate, spec = "only_whole", 1.0, None, RewardSpec(type="contains", text="?")

    def __call__(self, prompts, completions, **_columns):
        return [float(len(each[0]["content"]) < 6) for each in completions]


LETTER = {"type": "regex", "name": "letter", "pattern": "^[a-z]"}
NEVER = {"type": "contains", "text": "there is no room for so much"}
RUNS: dict[str, dict[str, Any]] = {
    "DEAD_REWARD": {"rewards": [NEVER], "grpo": {"max_steps": 30}},
    "TRUNCATION": {"grpo": {"max_steps": 30, "learning_rate": 1e-6}},
    "HACKING_SUSPECT": {"rewards": [LETTER, {"type": "exact_match"}], "grpo": {"max_steps": 30}},
    "KL_BLOWUP": {"grpo": {"max_steps": 30, "learning_rate": 0.5, "beta": 0.04}},
    "PLATEAU": {"rewards": [LETTER], "grpo": {"max_steps": 50}},
}


@pytest.mark.parametrize("code", RUNS)
def test_a_model_whose_training_goes_wrong_is_caught_by_name(job, monkeypatch, code):
    job.config(**RUNS[code], alerts={"stop_on": [code]}, learnability={"samples": 0}, lora={"r": 4})
    job.rows()
    if code == "TRUNCATION":
        monkeypatch.setattr(train, "build_rewards", lambda *_: [OnlyWhole()])
    if code == "DEAD_REWARD":
        with pytest.raises(JobError, match="output: every answer scored 0, so that no group had a gradient"):
            train.train(train.parse_flags([]))
        assert [alert["code"] for alert in job.alerts()] == [code]
        return
    train.train(train.parse_flags([]))
    result, named = job.training(), job.alerts()
    assert [alert["code"] for alert in named] == result["alerts"] == [code]
    assert result["ended"] == code
    assert result["steps"] == named[0]["step"] < result["max_steps"]
    assert result["checkpoint"]["step"] == result["steps"]
    assert set(named[0]["samples"][0]) == {"prompt", "completion", "rewards"}


def test_weights_that_are_no_numbers_end_the_run_with_the_last_that_were(job, monkeypatch):
    import torch

    job.config(grpo={"max_steps": 8, "save_steps": 1}, learnability={"samples": 0}, alerts={"stop_on": []})
    job.rows()

    def break_weights(_self, _args, state, _control, model, **_):
        if state.global_step == 4:
            next(each for each in model.parameters() if each.requires_grad).data.fill_(torch.nan)

    monkeypatch.setattr("trainer.bounds.Bounds.on_optimizer_step", break_weights)
    train.train(train.parse_flags([]))
    result = job.training()
    assert (result["steps"], result["ended"], result["alerts"]) == (5, "NON_FINITE", ["NON_FINITE"])
    assert result["checkpoint"]["step"] == 4


def test_without_a_checkpoint_before_it_there_is_nothing_to_save(job):
    job.config(grpo={"max_steps": 8, "learning_rate": 1e30}, learnability={"samples": 0})
    job.rows()
    with pytest.raises(JobError, match="There is nothing to save: the adapter's weights are not finite"):
        train.train(train.parse_flags([]))
