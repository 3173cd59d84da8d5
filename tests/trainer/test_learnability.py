"""The learnability gate: its estimate, its cost, and its effect on a run."""

import json
import random
from statistics import fmean

import pytest

from trainer import learnability, train
from trainer.job import JobError
from tunedrop.rewards import RewardSpec


@pytest.mark.parametrize(
    ("rewards", "dead", "learnable", "solved"),
    [
        ([[0, 0], [0, 1], [1, 1], [1, 0]], 0.25, 0.5, 0.25),
        ([[0, 0], [0, 0]], 1.0, 0.0, 0.0),
        ([[1, 1], [1, 1]], 0.0, 0.0, 1.0),
        ([[0.5, 0.5], [1, 0.2]], 0.5, 0.5, 0.0),  # always half right is not solved while better is to be had
        ([[-1, -1], [0, -1]], 0.5, 0.5, 0.0),
        ([[0.1 + 0.2, 0.3]], 0.0, 0.0, 1.0),  # equal, as for TRL
    ],
)
def test_prompts_are_dead_learnable_or_solved(rewards, dead, learnable, solved):
    found = learnability.estimate(rewards, 8)
    assert (found.dead, found.learnable, found.solved) == (dead, learnable, solved)
    assert found.flat == [index for index, each in enumerate(rewards) if abs(each[0] - each[1]) < 1e-6]


@pytest.mark.parametrize(("a", "b"), [(1, 3), (3, 3), (0.1, 0.1), (20, 1), (0.05, 5)])
@pytest.mark.parametrize("group", [4, 8, 16])
def test_four_answers_to_a_prompt_say_how_many_groups_have_a_gradient(a, b, group):
    """Prompts whose chance of a reward is Beta-distributed, each asked four times, against groups that are sampled."""
    generator = random.Random(0)
    chances = [generator.betavariate(a, b) for _ in range(1000)]
    rewards = [[float(generator.random() < chance) for _ in range(4)] for chance in chances]
    groups = [{generator.random() < chance for _ in range(group)} for chance in chances]
    expected = learnability.estimate(rewards, group).expected_nonzero_groups
    assert expected == pytest.approx(fmean(len(each) > 1 for each in groups), abs=0.05)


def test_rewards_of_many_values_are_expected_to_differ():
    generator = random.Random(0)
    rewards = [[generator.random() for _ in range(4)] for _ in range(24)]
    assert learnability.estimate(rewards, 8).expected_nonzero_groups > 0.99


@pytest.mark.parametrize(
    ("answers", "samples", "asked"),
    [(100_000, 8, 128), (12_000, 8, 45), (480, 8, 24)],  # 3 % of the run's answers, within limits
)
def test_the_gate_costs_a_small_part_of_the_run(answers, samples, asked):
    assert learnability.prompts_to_ask(answers, samples) == asked


@pytest.mark.parametrize(
    ("rewards", "shares", "measured", "groups"),
    [
        ([0.1] * 5, [0.5, 0.0, 0.5, 1.0, 1.0], 2 / 3, 24),  # as many groups as were asked
        ([0.1, 0.2, 0.9, 0.9, 0.9], [0.5, 0.0, 1.0, 1.0, 1.0], 0.75, 16),  # then it is another model
        ([0.9], [0.5], 0.5, 8),
    ],
)
def test_the_first_steps_are_what_the_forecast_is_compared_with(rewards, shares, measured, groups):
    history = [
        {"reward": reward, "reward_std": 0.4, "answers": 64.0, "frac_reward_zero_std": share}
        for reward, share in zip(rewards, shares, strict=True)
    ]
    asked = {"reward": 0.1, "reward_error": 0.05, "prompts": 24}
    found = learnability.measured(history, asked, group=8)
    assert found == {"measured_nonzero_groups": pytest.approx(measured, abs=1e-4), "measured_groups": groups}
    assert learnability.measured([], asked, group=8) == {}


class ByRow:
    """Pays by the row's answer: `always`, `never`, or by lot, whatever a machine's rounding made the completion."""

    __name__, weight, gate, spec = "by_row", 1.0, None, RewardSpec(type="contains", text="?")

    def __init__(self):
        self.lots = random.Random(0)

    def __call__(self, prompts, completions, answer, **_columns):
        return [{"always": 1.0, "never": 0.0}.get(kind, float(self.lots.random() < 0.5)) for kind in answer]


def prepare(job, monkeypatch, answers, **policy):
    job.config(learnability=policy, grpo={"max_steps": 4})
    rows = [{"id": f"r{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "answer": a} for i, a in enumerate(answers)]
    job.channel("training", "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(train, "build_rewards", lambda *_: [ByRow()])


def test_the_forecast_is_what_training_then_measures(job, monkeypatch):
    prepare(job, monkeypatch, ["never"] * 6 + ["sometimes"] * 12 + ["always"] * 6)
    train.train(train.parse_flags([]))
    result = job.training()["learnability"]
    assert (result["prompts"], result["samples"]) == (24, 8)
    assert (result["dead"], result["solved"]) == (pytest.approx(0.25, abs=0.1), pytest.approx(0.25, abs=0.1))
    assert result["expected_nonzero_groups"] == pytest.approx(0.5, abs=0.1)
    shares = [1 - point["frac_reward_zero_std"] for point in job.metrics()]
    assert result["measured_nonzero_groups"] == pytest.approx(fmean(shares), abs=1e-3)


def test_rows_that_teach_nothing_can_be_dropped(job, monkeypatch):
    prepare(job, monkeypatch, ["never", "sometimes", "always"] * 4, policy="drop", samples=16)
    train.train(train.parse_flags([]))
    result = job.training()
    assert (result["rows"], result["rows_dropped"]) == (4, 8)
    assert {point["frac_reward_zero_std"] for point in job.metrics()} == {0.0}


@pytest.mark.parametrize("policy", ["stop", "drop"])
def test_a_run_that_would_learn_nothing_can_be_stopped_before_it_starts(job, monkeypatch, policy):
    prepare(job, monkeypatch, ["never"] * 12, policy=policy)
    reason = {
        "stop": "learn from only 0% of the groups.* Of 12 prompts it never solved 100% and always solved 0%",
        "drop": "0 rows are too few for one step, .*: set learnability.policy to go_on",
    }
    with pytest.raises(JobError, match=reason[policy]):
        train.train(train.parse_flags([]))
    assert not (job.model / "metrics.jsonl").exists()


def test_without_samples_nobody_is_asked(job, monkeypatch):
    prepare(job, monkeypatch, ["sometimes"] * 12, policy="stop", samples=0, min_nonzero_groups=1)
    train.train(train.parse_flags([]))
    assert job.training()["learnability"] is None
