"""The learnability gate: its estimate, its cost, and its effect on a run."""

import json
import math
import random
import re
from functools import partial
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import learnability, learnability_gate, train
from trainer.job import JobError, describe
from trainer.sampling import ScoredCompletion
from tunedrop.config.parse import parse_run_config
from tunedrop.config.schedule import most_gate_prompts
from tunedrop.rewards import RewardSpec, build_rewards


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


def test_prompts_whose_answers_differ_in_their_form_alone_are_dead_and_have_a_gradient():
    rewards = [[0.0, 0.2], [0.2, 0.2], [0.2, 1.2], [1.2, 1.2]]
    found = learnability.estimate(rewards, 8, [False, False, True, True])
    assert (found.dead, found.learnable, found.solved) == (0.5, 0.25, 0.25)
    assert found.has_gradient
    assert found.flat == [1, 3]
    form_alone = learnability.estimate(rewards[:2], 8, [False, False])
    assert (form_alone.dead, form_alone.learnable, form_alone.solved, form_alone.has_gradient) == (1, 0, 0, True)
    assert not learnability.estimate([[0.2, 0.2]], 8, [False]).has_gradient


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
    ("answers", "samples", "most"),
    [
        (100_000, 8, 300),
        (12_000, 8, 150),  # a tenth of the run's answers
        (1_920, 8, 24),
        (480, 8, 24),  # a tenth says too little
        (64, 8, 8),  # as many as the run itself
        (4, 8, 1),
    ],
)
def test_the_gate_costs_a_small_part_of_the_run(answers, samples, most):
    assert most_gate_prompts(answers, samples) == most


@pytest.mark.parametrize("groups", [30, 60, 240, 250, 300, 600, 1_500, 2_999, 3_000, 50_000])
def test_a_run_with_thirty_groups_and_one_percent_that_teach_is_hardly_ever_stopped(groups):
    """The rate that the module's docstring promises, of a gate which sees as many completions as a group has."""
    teaching = max(30 / groups, 0.01)
    assert (1 - teaching) ** most_gate_prompts(groups * 8, 8) <= 0.05


@pytest.mark.parametrize("most", [1, 15, 16, 17, 24, 30, 300])
def test_the_blocks_are_all_prompts_in_order(most):
    found = list(learnability.blocks(most))
    assert [place for start, end in found for place in range(start, end)] == list(range(most))
    assert found[0] == (0, min(most, 16))
    assert all(0 < end - start <= 8 for start, end in found[1:])


@pytest.mark.parametrize(
    ("differing", "prompts", "threshold", "clear"),
    [
        (0, 300, 0.0, False),  # no number of prompts proves that there is nothing
        (1, 16, 0.0, False),
        (4, 16, 0.0, True),
        (16, 16, 0.0, True),
        (0, 16, 0.1, False),
        (0, 64, 0.1, True),
        (3, 24, 0.1, False),
        (12, 16, 0.1, True),
    ],
)
def test_an_answer_is_clear_two_standard_errors_from_the_threshold(differing, prompts, threshold, clear):
    rewards = [[0.0, 1.0] * 4] * differing + [[0.0] * 8] * (prompts - differing)
    assert learnability.estimate(rewards, 8).is_clear(threshold) == clear


def completion(score, text="an answer", cut=False, **rewards):
    return ScoredCompletion(text, score, rewards or {"exact_match": score}, cut)


judge = partial(learnability_gate.estimate_of, group=8)


def asked(rows, chance, most, threshold, ends=lambda _estimate, _prompts: False):
    """Return the answers that the gate gets of `rows` rows, whose answers are right with this chance, and its estimate."""
    lots, seeds = random.Random(0), []

    def sample(chosen, seed):
        seeds.append(seed)
        return [[completion(float(lots.random() < chance)) for _ in range(8)] for _ in chosen]

    found = learnability_gate.ask(sample, range(rows), most, judge, threshold, ends)
    assert len(set(seeds)) == len(seeds)  # a row that is asked again answers anew
    return found


def test_the_gate_stops_asking_when_its_answer_is_clear():
    assert len(asked(1000, 0.3, 100, 0.0)[0]) == 16  # something to learn
    assert len(asked(1000, 0.3, 100, 0.1)[0]) == 16  # far above the threshold of `stop`
    assert 16 < len(asked(1000, 0.0, 100, 0.1)[0]) < 64  # far below it
    assert len(asked(1000, 0.0, 100, 0.0)[0]) == 100  # only more prompts without a difference make it sure
    assert 16 < len(asked(1000, 0.01, 300, 0.0)[0]) < 150  # a hard task: until two groups differ
    assert len(asked(1000, 0.3, 100, None)[0]) == 100  # `drop` judges each row


@pytest.mark.parametrize("threshold", [0.0, None])
def test_the_gate_stops_asking_when_its_caller_knows_enough(threshold):
    assert len(asked(1000, 0.0, 300, threshold, lambda estimate, _: estimate.prompts >= 24)[0]) == 24
    assert len(asked(1000, 0.0, 300, threshold, lambda *_: True)[0]) == 16


def test_the_gate_sees_while_it_asks_that_answers_differ_in_their_form_alone():
    seen = []

    def sample(chosen, _seed):
        return [[completion(float(n % 2), form=float(n % 2), answer=0.0) for n in range(8)] for _ in chosen]

    def ends(estimate, _prompts):
        seen.append(estimate.dead)
        return False

    learnability_gate.ask(sample, range(1000), 24, partial(judge, comparing=["answer"]), None, ends)
    assert seen == [1.0, 1.0]


def test_the_prompts_asked_are_counted_where_few_rows_are_asked_again():
    counts = []

    def ends(_estimate, prompts):
        counts.append(prompts)
        return False

    asked(10, 0.0, 40, 0.0, ends)
    assert counts == [16, 24, 32, 40]


def test_a_run_with_few_rows_asks_them_again():
    answers, estimate = asked(10, 0.0, 30, 0.0)
    assert [len(each) for each in answers.values()] == [24] * 10
    assert (estimate.prompts, estimate.samples, estimate.learnable) == (10, 24, 0)


@pytest.mark.parametrize(("teaching", "runs"), [(0.1, 300), (0.3, 100)])
def test_ending_early_hardly_moves_the_forecast(teaching, runs):
    """Mean forecasts of tasks in which all prompts have the same chance, with the gate's rule and without."""
    chance = next(p / 1000 for p in range(500) if 1 - (1 - p / 1000) ** 8 >= teaching)
    lots = random.Random(1)

    def sample(chosen, _seed):
        return [[completion(float(lots.random() < chance)) for _ in range(8)] for _ in chosen]

    def forecast(threshold):
        return learnability_gate.ask(sample, range(1000), 24, judge, threshold)[1].expected_nonzero_groups

    early, late = (fmean(forecast(threshold) for _ in range(runs)) for threshold in (0.0, None))
    assert early == pytest.approx(late, abs=0.03)


HOPELESS = [
    [completion(0.0, f"The capital is {'very ' * 60}far away.\n{i}", cut=i < 6) for _ in range(8)] for i in range(24)
]


def explained(answers, limit=64):
    estimate = learnability.estimate([[each.score for each in group] for group in answers], 8)
    return learnability_gate.explain(learnability_gate.nothing_to_learn(estimate), estimate, answers, limit)


def test_a_hopeless_run_says_what_each_reward_gave_three_answers_and_the_ways_out():
    text = explained(HOPELESS)
    first, rewards, _, *answers, ways = text.split("\n")
    assert first.startswith("Nothing to learn: all answers to each prompt got the same reward")
    assert "Of 24 prompts the model never solved 100% and always solved 0%, in 192 answers." in first
    assert rewards == "Rewards: exact_match always 0."
    assert len(answers) == 3
    assert all(each.startswith('0: "The capital is very ') and each.endswith('…"') for each in answers)
    for way in ("another reward", "partial credit", "a warm start", "easier rows", "64 tokens cut 48 of 192 answers"):
        assert way in ways
    assert ways.endswith("set learnability.policy to go_on.")


def test_the_reason_fits_into_sagemakers_with_its_whole_end():
    sagemaker = f"AlgorithmError: {explained(HOPELESS)}, exit code: 1"
    assert 900 < len(sagemaker) <= 1024
    assert describe(JobError(explained(HOPELESS))).endswith("go_on.")


def test_no_answer_is_said_to_be_cut_where_none_was():
    assert "max_completion_length" not in explained([[completion(0.0)] * 8] * 24)


def test_each_reward_is_named_with_its_range_and_an_abstention():
    group = [completion(0.5, form=0.5, answer=None), completion(0.0, form=0.0, answer=None)]
    assert learnability_gate.given(group) == ["form 0 to 0.5, 0.25 on average", "answer no score"]


def test_a_solved_task_needs_harder_rows_and_not_easier_ones():
    text = explained([[completion(1.0)] * 8] * 24)
    assert text.startswith("Nothing to learn: every answer already gets the best reward.")
    assert "harder rows" in text
    assert "easier" not in text


def test_the_answers_shown_have_the_lowest_the_middle_and_the_highest_score():
    groups = [[completion(score, f"scored {score}")] * 8 for score in (0.3, 0.1, 0.2, 0.5, 0.4)]
    assert [each.score for each in learnability_gate.examples(groups)] == [0.1, 0.3, 0.5]
    assert len(learnability_gate.examples([[completion(0.0, "the same")] * 8] * 5)) == 1


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


def prepare(job, monkeypatch, answers, steps=4, grpo=(), **policy):
    job.config(learnability=policy, grpo={"max_steps": steps} | dict(grpo))
    rows = [{"id": f"r{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "answer": a} for i, a in enumerate(answers)]
    job.channel("training", "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(train, "build_rewards", lambda *_: [ByRow()])


@pytest.mark.parametrize("scaling", ["group", "batch"])
def test_the_forecast_is_what_training_then_measures(job, monkeypatch, scaling):
    grpo = {"scale_rewards": scaling}
    prepare(job, monkeypatch, ["never"] * 6 + ["sometimes"] * 12 + ["always"] * 6, steps=12, grpo=grpo)
    train.train(train.parse_flags([]))
    result = job.training()["learnability"]
    assert (result["prompts"], result["samples"]) == (16, 8)
    assert result["dead"] + result["learnable"] + result["solved"] == pytest.approx(1, abs=1e-3)
    assert result["expected_nonzero_groups"] == pytest.approx(0.5, abs=0.2)
    flat = sum(2 * point["frac_reward_zero_std"] for point in job.metrics())  # two groups a step, each row once
    assert flat == pytest.approx(12, abs=1)
    points = job.metrics()[: result["measured_groups"] // 2]
    shares = [1 - point["frac_reward_zero_std"] for point in points]
    assert result["measured_nonzero_groups"] == pytest.approx(fmean(shares), abs=1e-3)


def test_rows_that_teach_nothing_can_be_dropped(job, monkeypatch):
    prepare(job, monkeypatch, ["never", "sometimes", "always"] * 4, steps=12, policy="drop", samples=16)
    train.train(train.parse_flags([]))
    result = job.training()
    assert (result["rows"], result["rows_dropped"]) == (4, 8)
    assert {point["frac_reward_zero_std"] for point in job.metrics()} == {0.0}


@pytest.mark.parametrize("policy", [{}, {"policy": "stop"}, {"policy": "drop"}])
def test_a_run_with_nothing_to_learn_ends_before_it_starts(job, monkeypatch, policy):
    prepare(job, monkeypatch, ["never"] * 12, steps=8, **policy)
    with pytest.raises(SystemExit, match=r"The job failed: Nothing to learn[\s\S]*\nRewards: by_row always 0\.\n"):
        train.main([])
    assert "Of 12 prompts the model never solved 100%" in job.failure()
    assert len(re.findall(r'^0: "', job.failure(), re.MULTILINE)) == 3
    assert job.failure().endswith("set learnability.policy to go_on.")
    assert not (job.model / "metrics.jsonl").exists()


def test_who_asks_to_go_on_trains_with_nothing_to_learn_and_hears_at_the_end_why_nothing_changed(job, monkeypatch):
    prepare(job, monkeypatch, ["never"] * 12, steps=2, policy="go_on")
    with pytest.raises(JobError, match=r"does not change the base model's output: every answer scored 0, so that no group"):
        train.train(train.parse_flags([]))
    assert len(job.metrics()) == 2


class Slow:
    """A clock on which a sampled completion takes a second."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sample(self, _trainer, _rewards, rows, samples, **_):
        self.now += samples * len(rows)
        return [[completion(0.0)] * samples for _ in rows]


# 16 prompts of 2 samples take 32 s, each block of 8 more 16 s.
@pytest.mark.parametrize(("policy", "seconds", "prompts"), [
    ("stop_if_nothing_to_learn", 0.0, 16),
    ("stop_if_nothing_to_learn", 32.0, 16),
    ("stop_if_nothing_to_learn", 49.0, 24),
    ("stop_if_nothing_to_learn", 100.0, 48),
    ("stop_if_nothing_to_learn", math.inf, 300),
    ("drop", 49.0, 24),
    ("go_on", math.inf, 16),  # the training goes on whatever the answer is
])  # fmt: skip
def test_the_gate_asks_no_longer_than_its_share_of_the_time(monkeypatch, policy, seconds, prompts):
    clock = Slow()
    monkeypatch.setattr(learnability_gate, "time", clock)
    monkeypatch.setattr(learnability_gate, "sample_completions", clock.sample)
    grpo = {"num_generations": 8, "per_device_train_batch_size": 8, "num_train_epochs": 100}
    learnability_section = {"samples": 2, "policy": policy}
    config = parse_run_config(
        {"model": "m", "rewards": [{"type": "exact_match"}], "grpo": grpo, "learnability": learnability_section}
    )
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1), row_order=lambda: list(range(1000)), num_generations=8
    )
    rewards = build_rewards(config.rewards)
    found = learnability_gate.ask_model(trainer, config, rewards, [{"answer": "1"}] * 1000, seconds)
    assert found
    assert found.estimate.prompts == prompts


def test_a_task_with_too_little_to_learn_is_stopped_on_request(job, monkeypatch):
    prepare(job, monkeypatch, ["sometimes", "never", "never"] * 4, steps=12, policy="stop", min_nonzero_groups=0.8)
    with pytest.raises(JobError, match=r"learn from only \d+% of the groups, fewer than .*\(80%\)[\s\S]*Ways out: "):
        train.train(train.parse_flags([]))


def test_too_few_rows_after_dropping_end_the_run(job, monkeypatch):
    prepare(job, monkeypatch, ["sometimes", *["never"] * 11], steps=12, policy="drop")
    with pytest.raises(JobError, match=r"1 rows are too few for one step, .*: set learnability.policy to go_on"):
        train.train(train.parse_flags([]))


def test_without_samples_nobody_is_asked(job, monkeypatch):
    prepare(job, monkeypatch, ["sometimes"] * 12, policy="stop", samples=0, min_nonzero_groups=1)
    train.train(train.parse_flags([]))
    assert job.training()["learnability"] is None
