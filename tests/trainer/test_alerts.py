"""Alerts: tables of histories, and trainings of a small model that go wrong in each way."""

import json
import math
import random
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from trainer import alerts, general_probe, probe_part, train, watchdog
from trainer.job import JobError
from trainer.latest_rollout import NAMED
from trainer.run_trainer import SharedPrefixGRPOTrainer
from tunedrop.config.model import AlertCode
from tunedrop.rewards import RewardSpec
from tunedrop.rollouts import decode, part_name

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


def evaluated(*rewards):
    """A curve of the held-out reward: an evaluation at every fourth of the points."""
    return [None if at % 4 else rewards[at // 4 - 1] for at in range(1, 4 * len(rewards) + 1)]


def probed(*pairs):
    """The figures of the general questions: (lost, gained) at every fourth of the points, of 24 with 15 right before."""
    lost, gained = evaluated(*(float(lost) for lost, _ in pairs)), evaluated(*(float(gained) for _, gained in pairs))
    score = evaluated(*((15 - lost + gained) / 24 for lost, gained in pairs))
    return {"probe_lost": lost, "probe_gained": gained, "probe_score": score}


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
    "held-out rows follow": points(40, heldout_reward=evaluated(0.2, 0.3, 0.35, 0.4, 0.5, 0.5, 0.55, 0.6, 0.6, 0.62)),
    "held-out rows stay where they are": points(
        40, heldout_reward=evaluated(0.5, 0.42, 0.47, 0.55, 0.44, 0.5, 0.41, 0.52, 0.43, 0.47)
    ),
    "a held-out curve that the training's own curve shares": points(
        20, reward=lambda x: 0.8 - 0.1 * x, heldout_reward=[0.6] * 6 + [0.6 - 0.02 * at for at in range(14)]
    ),
    "it ends soon after its best": points(20, heldout_reward=evaluated(0.2, 0.6, 0.7, 0.4, 0.3)),
    "sampler and trainer round differently": points(12, mismatch=0.01, mismatch_p99=0.2, mismatch_clipped=0.0),
    "one odd rollout": points(12, mismatch=[0.01] * 5 + [0.2] + [0.01] * 6, mismatch_p99=[0.1] * 12, mismatch_clipped=0.0),
    "general questions come and go": points(16, **probed((3, 2), (4, 4), (6, 5), (5, 1))),
    "one bad look at the general questions": points(16, **probed((0, 0), (9, 0), (2, 0), (9, 0))),
    "more is known than before": points(16, **probed((0, 3), (0, 9), (1, 8), (0, 9))),
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
    "it learns its rows by heart": (
        "OVERFIT",
        points(40, heldout_reward=evaluated(0.3, 0.5, 0.6, 0.6, 0.55, 0.45, 0.4, 0.3, 0.25, 0.2)),
        36,
    ),
    "it learns its rows by heart from the start": (
        "OVERFIT",
        points(24, heldout_reward=evaluated(0.6, 0.55, 0.56, 0.3, 0.2, 0.1)),
        24,
    ),
    "the sampler has other weights": (
        "ROLLOUT_MISMATCH",
        points(12, 100, mismatch=0.4, mismatch_p99=3.0, mismatch_clipped=0.05),
        3,
    ),
    "the sampler is far off at a few tokens": (
        "ROLLOUT_MISMATCH",
        points(12, 100, mismatch=0.05, mismatch_p99=1.5, mismatch_clipped=0.02),
        3,
    ),
    "it forgets what it knew": ("FORGETTING", points(16, 100, **probed((2, 1), (7, 0), (9, 1), (9, 0))), 12),
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
    assert found == {code for code, *_ in SICK.values()} - {"PLATEAU", "HACKING_SUSPECT", "OVERFIT"}


def test_every_code_can_be_named_in_a_config_and_is_tested_here():
    assert {code for code, _, _ in SICK.values()} | {"STALLED"} == set(get_args(AlertCode))


def test_overfitting_shows_its_gap_and_both_curves():
    _, history, since = SICK["it learns its rows by heart"]
    alert = alerts.overfit(history[:since])
    assert alert
    evidence: dict[str, Any] = alert.evidence
    assert evidence["heldout_curve"] == [0.3, 0.5, 0.6, 0.6, 0.55, 0.45, 0.4, 0.3, 0.25]
    assert len(evidence["reward_curve"]) == 9
    fall, rise = evidence["heldout_best"] - evidence["heldout_now"], evidence["reward_now"] - evidence["reward_then"]
    assert evidence["gap"] == pytest.approx(fall + rise, abs=1e-5)


@pytest.mark.parametrize(
    ("slope", "low", "high"), [(0.0, 0.0, 0.04), (0.4, 0.0, 0.0), (-0.8, 0.8, 1.0)], ids=["stays", "rises", "falls"]
)
def test_a_noisy_heldout_curve_is_rarely_named_and_a_falling_one_mostly(slope, low, high):
    lots, named = random.Random(1), 0
    for _ in range(300):
        curve = evaluated(*(0.8 + slope * at / 10 + lots.gauss(0, 0.05) for at in range(10)))
        history = points(40, heldout_reward=curve)
        named += any(alerts.overfit(history[:length]) for length in range(4, 41, 4))
    assert low <= named / 300 <= high


STALLS = [
    # seconds of the steps, seconds without one, steps of an evaluation, whether it is an alert
    ([], 3500, 1.0, False),
    ([], 3700, 1.0, True),
    ([1.0] * 5, 590, 1.0, False),
    ([1.0] * 5, 610, 1.0, True),
    ([100.0] * 5, 990, 1.0, False),
    ([100.0] * 5, 1010, 1.0, True),
    ([100.0] * 5, 1010, 32.0, False),  # an evaluation takes as long as 32 steps
    ([100.0] * 5, 32_010, 32.0, True),
    ([1.0, 1.0, 5000.0], 700, 1.0, True),  # one long step says nothing
]


@pytest.mark.parametrize(("seconds", "waited", "steps", "named"), STALLS)
def test_a_training_without_a_step_is_named_by_the_time_of_its_steps(seconds, waited, steps, named):
    history = points(len(seconds), 100, seconds=seconds) if seconds else []
    alert = alerts.stalled(history, waited, steps)
    assert (alert is not None) == named
    if alert:
        assert (alert.code, alert.step, alert.evidence["waited"]) == ("STALLED", len(seconds), waited)
        json.dumps(alert.evidence, allow_nan=False)


class OnlyWhole:
    """Pays an answer that ends before the limit of six characters."""

    __name__, weight, gate, spec = "only_whole", 1.0, None, RewardSpec(type="contains", text="?")

    def __call__(self, prompts, completions, **_columns):
        return [float(len(each[0]["content"]) < 6) for each in completions]


class ByHeart:
    """Pays the letter e in answers to training rows, and its absence in answers to held-out rows."""

    __name__, weight, gate, spec = "by_heart", 1.0, None, RewardSpec(type="contains", text="?")

    def __call__(self, prompts, completions, **_columns):
        return [
            ("e" in completion[0]["content"]) == prompt[0]["content"].startswith("say")
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


LETTER = {"type": "regex", "name": "letter", "pattern": "^[a-z]"}
NEVER = {"type": "contains", "text": "there is no room for so much"}
RUNS: dict[str, dict[str, Any]] = {
    "DEAD_REWARD": {"rewards": [NEVER], "grpo": {"max_steps": 30}},
    "TRUNCATION": {"grpo": {"max_steps": 30, "learning_rate": 1e-6}},
    "HACKING_SUSPECT": {"rewards": [LETTER, {"type": "exact_match"}], "grpo": {"max_steps": 30}},
    "KL_BLOWUP": {"grpo": {"max_steps": 30, "learning_rate": 0.5, "beta": 0.04}},
    "PLATEAU": {"rewards": [LETTER], "grpo": {"max_steps": 50}},
    "OVERFIT": {"grpo": {"max_steps": 50, "learning_rate": 2e-3}},
    "ROLLOUT_MISMATCH": {"grpo": {"max_steps": 20}},
    "FORGETTING": {"grpo": {"max_steps": 20}},
}


@contextmanager
def without_adapter(trainer):
    with trainer.accelerator.autocast(), trainer.model.disable_adapter():
        yield


def prepare(code, job, monkeypatch):
    """Make the fault that the config alone does not make."""
    if code == "TRUNCATION":
        monkeypatch.setattr(train, "build_rewards", lambda *_: [OnlyWhole()])
    if code == "OVERFIT":
        monkeypatch.setattr(train, "build_rewards", lambda *_: [ByHeart()])
    if code in {"OVERFIT", "FORGETTING"}:
        job.heldout()
    if code == "ROLLOUT_MISMATCH":  # the sampler forgets the adapter
        monkeypatch.setattr(SharedPrefixGRPOTrainer, "_sampling", without_adapter)
    if code == "FORGETTING":  # a model without a letter e is right; the training pays for the letter
        check = {"type": "regex", "pattern": "^[^e]*$"}
        questions = [{"id": f"p{n}", "prompt": f"ask {n}", "description": "x", "checks": [check]} for n in range(24)]
        probe = job.channel("probe", "probe.json", json.dumps({"evaluations": questions}))
        monkeypatch.setattr(probe_part, "PROBE", probe)
        monkeypatch.setattr(general_probe, "EVALUATION_SHARE", 100.0)  # its steps are small


@pytest.mark.parametrize("code", RUNS)
def test_a_model_whose_training_goes_wrong_is_caught_by_name(job, monkeypatch, code):
    job.config(**RUNS[code], alerts={"stop_on": [code]}, learnability={"samples": 0}, lora={"r": 4})
    job.rows()
    prepare(code, job, monkeypatch)
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
    best = 5 if code == "OVERFIT" else result["steps"]  # the first evaluation, before it learned anything by heart
    assert result["checkpoint"]["step"] == best
    assert set(named[0]["samples"][0]) == {"prompt", "completion", "rewards"}
    step = result["steps"]
    kept = {group.prompt_id for group in decode((job.model / "rollouts" / part_name("step", step)).read_bytes())}
    assert 0 < len(named[0]["rollouts"]) <= NAMED
    assert all(link["step"] == step and link["prompt_id"] in kept for link in named[0]["rollouts"])


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (2, 3))])
def test_a_training_that_learns_raises_no_alert(job, monkeypatch, seed):
    monkeypatch.setattr(general_probe, "EVALUATION_SHARE", 100.0)
    job.config(grpo={"max_steps": 12, "learning_rate": 3e-3, "seed": seed}, lora={"r": 4})
    job.rows()
    job.heldout()
    train.train(train.parse_flags([]))
    points = job.metrics()
    assert job.training()["alerts"] == []
    assert points[-1]["reward"] > points[0]["reward"]
    figures = {"mismatch", "mismatch_p99", "mismatch_clipped", "heldout_reward", "probe_score", "probe_lost", "probe_gained"}
    assert figures <= set().union(*points)


def test_a_training_that_hangs_is_caught_by_name_and_keeps_its_last_step(job, monkeypatch, capfd):
    monkeypatch.setattr(alerts, "STALLED_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.1)
    job.patch.setenv("ALLOW_PYTHON_REWARDS", "true")
    hangs = "def reward(completions, **_):\n    CALLS.append(1)\n    if len(CALLS) > 4: time.sleep(600)\n"
    code = f"import time\nCALLS = []\n{hangs}    return [float('e' in each[0]['content']) for each in completions]\n"
    job.channel("rewards", "own.py", code)
    job.config(rewards=[{"type": "python", "file": "own.py"}], grpo={"max_steps": 8}, learnability={"samples": 0})
    job.rows()
    began = time.monotonic()
    assert train.train(train.parse_flags([])) == "STALLED"
    assert time.monotonic() - began < 120
    result, (alert,) = job.training(), job.alerts()
    assert (result["ended"], result["steps"], result["checkpoint"]["step"], alert["code"]) == ("STALLED", 4, 4, "STALLED")
    assert "own.py" in capfd.readouterr().err  # the stack of the main thread
    assert result["proofs"]


def test_a_job_that_stalled_ends_without_waiting_for_its_threads(monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(train, "train", lambda _flags: "STALLED")
    monkeypatch.setattr("os._exit", codes.append)
    train.main([])
    assert codes == [0]


def test_a_process_that_does_not_react_is_ended_with_the_reason(job, monkeypatch, tiny):
    codes: list[int] = []
    monkeypatch.setattr(alerts, "FIRST_STEP_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr("os.kill", lambda *_: None)  # a signal's handler waits for code of CUDA to return
    monkeypatch.setattr("os._exit", codes.append)
    trainer: Any = SimpleNamespace(state=SimpleNamespace(log_history=[], max_steps=9), add_callback=lambda _: None)
    with watchdog.Watchdog(trainer, 1.0):
        time.sleep(1.0)
    assert codes == [1]
    assert job.failure().startswith("The job stalled: the training has done nothing for 0 s: the log has the stack")


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
