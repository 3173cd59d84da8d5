"""Groups that teach: the posterior of a prompt's rewards, the draws, refills, and their effect on a run."""

import json
import math
import random
import shutil
from collections import Counter
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import curriculum, train
from trainer.checkpoints import Record
from trainer.curriculum import Curriculum, Group
from trainer.run_trainer import SharedPrefixRunTrainer

from .test_learnability import ByRow
from .test_learnability import prepare as prepare_rows


def expected_chance(counts, prior, group):
    """The chance to teach in expectation, by the Dirichlet-multinomial's closed form; two values are the Beta-binomial."""
    weights = [prior + count for count in counts]
    log_all = math.lgamma(sum(weights) + group) - math.lgamma(sum(weights))
    return 1 - sum(math.exp(math.lgamma(each + group) - math.lgamma(each) - log_all) for each in weights)


@pytest.mark.parametrize(
    ("seen", "counts"),
    [
        ({}, [0, 0]),
        ({"0.0": 8}, [8, 0]),
        ({"1.0": 7.3}, [7.3, 0]),
        ({"0.0": 7, "1.0": 1}, [7, 1]),
        ({"0.0": 4, "1.0": 4}, [4, 4]),
        ({"0.1": 1, "0.2": 1, "0.3": 1, "0.4": 5}, [1, 1, 1, 5]),
    ],
)
@pytest.mark.parametrize("prior", [0.25, 1.0])
def test_the_chance_to_teach_is_that_of_the_posterior(seen, counts, prior):
    lots = random.Random(0)
    found = fmean(curriculum.chance(seen, prior, 8, lots) for _ in range(4000))
    assert found == pytest.approx(expected_chance(counts, prior, 8), abs=0.02)


@pytest.mark.parametrize("prior", [0.125, 0.5, 2.0])
def test_the_prior_is_that_of_the_prompts(prior):
    lots = random.Random(0)
    rights = [
        sum(lots.random() < chance for _ in range(8)) for chance in (lots.betavariate(prior, prior) for _ in range(800))
    ]
    seen = [{name: float(count) for name, count in (("0.0", 8 - right), ("1.0", right)) if count} for right in rights]
    assert curriculum.likely_prior(seen) == pytest.approx(prior, rel=0.5)


@pytest.mark.parametrize(
    ("scores", "differ"),
    [([1.0, 1.0], False), ([0.0, 0.5], True), ([0.1 + 0.2, 0.3], False), ([], False), ([1.0], False), ([0.3, -0.3], True)],
)
def test_a_group_teaches_if_its_scores_differ(scores, differ):
    assert Curriculum(Record(), 0, 0).observe(0, scores) == differ


def test_completions_that_no_reward_scored_do_not_count():
    nan = math.nan
    rewards = torch.tensor([[1.0, nan], [nan, nan], [0.25, 0.5]])
    assert curriculum.scores(rewards, torch.tensor([1.0, 2.0])) == [1.0, 1.25]


def test_what_a_prompt_once_was_is_forgotten():
    chosen = Curriculum(Record(), 0, 0)
    chosen.observe(0, [0.0] * 8)
    counts = []
    for rollouts in (0, 10, 60):
        chosen._state["rollouts"] = rollouts
        counts.append(chosen._counts(0))
    assert counts == [{"0.0": 8}, {"0.0": pytest.approx(8 * 0.9**10)}, {}]
    chosen.observe(0, [0.5])
    assert chosen._state["seen"]["0"]["counts"] == {"0.5": 1}  # what is forgotten takes no memory


def test_draws_depend_on_the_seed_and_on_the_state_in_a_checkpoint():
    record = Record()
    one = Curriculum(record, 1, 0)
    for row in range(20):
        one.observe(row, [float(row % 3 == 0), 1.0])
    again = Curriculum(Record(sampling=json.loads(json.dumps(record.sampling))), 1, 0)
    other = Curriculum(Record(sampling=json.loads(json.dumps(record.sampling))), 2, 0)
    rows = range(30)
    assert one.draw(rows, 6, 8) == again.draw(rows, 6, 8) != other.draw(rows, 6, 8)
    assert len(set(one.draw(rows, 6, 8))) == 6


class Prompts:
    """A trainer's part that the curriculum uses: rows whose completions are right with a probability."""

    def __init__(self, monkeypatch, chances, group=8):
        self.chances, self.num_generations, self.lots = chances, group, random.Random(0)
        self.train_dataset = Rows({"row": row} for row in range(len(chances)))
        self.reward_weights = torch.ones(1)
        self.drawn: Counter[int] = Counter()
        monkeypatch.setattr(curriculum, "sample_groups", self.sample)

    def sample(self, _trainer, rows):
        self.drawn.update(row["row"] for row in rows)
        rights = [[float(self.lots.random() < self.chances[row["row"]]) for _ in range(8)] for row in rows]
        return [Group(row, [], torch.tensor(right)[:, None]) for row, right in zip(rows, rights, strict=True)]


class Rows(list[dict[str, int]]):
    """A dataset's rows, and columns by name."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def teaching_share(monkeypatch, *, refills, seed=0, rollouts=30):
    """A third of 90 prompts is never right, a third always, and a third sometimes: the share of groups that taught."""
    prompts: Any = Prompts(monkeypatch, [0.0, 1.0, 0.5] * 30)
    chosen = Curriculum(Record(), seed, refills)
    taught = [
        sum(group.rewards.std() > 0 for group in groups) / 6
        for groups in (chosen.rollout(prompts, 6) for _ in range(rollouts))
    ]
    return fmean(map(float, taught)), chosen.summary(), prompts


def test_prompts_that_teach_are_found_and_drawn(monkeypatch):
    share, summary, prompts = teaching_share(monkeypatch, refills=0)
    assert share > 0.5  # in a random order: 0.33
    assert summary == {"rollouts": 30, "groups": 180, "taught": round(share * 180), "refilled": 0}
    learnable = [count for row, count in prompts.drawn.items() if row % 3 == 2]
    assert len(learnable) >= 20  # not always the same ones


def test_refills_replace_groups_that_teach_nothing_up_to_the_limit(monkeypatch):
    shares = []
    for refills in (0, 1, 3):
        share, summary, _ = teaching_share(monkeypatch, refills=refills)
        assert summary["groups"] == 180 + summary["refilled"] <= 180 * (1 + refills)
        assert summary["taught"] == round(share * 180)
        shares.append(share)
    assert shares[0] < shares[1] < shares[2]


def test_a_rollout_ends_when_no_prompt_is_left(monkeypatch):
    prompts: Any = Prompts(monkeypatch, [0.0] * 4)
    groups = Curriculum(Record(), 0, 5).rollout(prompts, 3)
    assert len(groups) == 3
    assert set(prompts.drawn.values()) == {1}


def test_ranks_share_the_groups_and_all_get_all(monkeypatch):
    rows, sampled = [{"row": row, "prompt": f"p{row}"} for row in range(3)], []

    def gather(own):
        sampled.append(own)
        return [pair for each in reversed(sampled) for pair in each]

    monkeypatch.setattr(curriculum, "gather_object", gather)
    for rank in (0, 1):
        trainer: Any = SimpleNamespace(
            num_generations=2,
            sampler_log_probs=None,
            accelerator=SimpleNamespace(num_processes=2, process_index=rank),
            complete=lambda prompts, _size: [[int(prompt[1]), at] for at, prompt in enumerate(prompts)],
            processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [str(each) for each in ids]),
            reward_funcs=[lambda row, **_: [float(each) for each in row], lambda row, **_: [None for _ in row]],
        )
        groups = curriculum.sample_groups(trainer, rows)
    assert [[place for place, _ in own] for own in sampled] == [[0, 2], [1]]
    assert [group.row["row"] for group in groups] == [0, 1, 2]
    assert [[ids[0] for ids in group.ids] for group in groups] == [[0, 0], [1, 1], [2, 2]]
    assert [group.rewards[:, 0].tolist() for group in groups] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert all(group.rewards[:, 1].isnan().all() for group in groups)


# ---- runs ------------------------------------------------------------------------------------------------------------

KINDS = ["never"] * 6 + ["sometimes"] * 12 + ["always"] * 6


class Counted(ByRow):
    """Also counts the completions that it scores."""

    def __init__(self):
        super().__init__()
        self.scored = 0

    def __call__(self, prompts, completions, answer, **columns):
        self.scored += len(prompts)
        return super().__call__(prompts, completions, answer, **columns)


def run(job, monkeypatch, stock=False, **config):
    prepare_rows(job, monkeypatch, KINDS)
    job.config(**{"grpo": {"max_steps": 6}, "learnability": {"samples": 4}} | config)
    reward = Counted()
    monkeypatch.setattr(train, "build_rewards", lambda *_: [reward])
    if stock:
        monkeypatch.setattr("trainer.shared_prefix_models.unsupported", lambda *_: "the test says so")
    train.train(train.parse_flags([]))
    return job.training(), job.metrics(), reward


@pytest.mark.parametrize("stock", [False, True])
def test_a_run_learns_from_more_groups_than_in_a_random_order(job, monkeypatch, stock):
    result, metrics, reward = run(job, monkeypatch, stock, sampling={"policy": "teach", "refills": 2})
    found = result["sampling"]
    assert found["rollouts"] == 6
    assert found["groups"] == 12 + found["refilled"]
    taught = sum(1 - point["frac_reward_zero_std"] for point in metrics) * 2  # two groups a step
    assert found["taught"] == pytest.approx(taught)
    assert found["taught"] >= 9
    # No completion is scored twice: those of the gate, of its first 16 prompts, and of the groups.
    assert reward.scored == 16 * 4 + 8 * found["groups"]
    assert {point["answers"] for point in metrics} == {16}
    assert metrics[-1]["grad_norm"] > 0


def test_the_gates_forecast_is_the_same_for_both_policies(job, monkeypatch):
    forecasts = []
    for policy in ("uniform", "teach"):
        result, *_ = run(job, monkeypatch, sampling={"policy": policy}, grpo={"max_steps": 1})
        forecasts.append(result["learnability"] | {"seconds": 0})
        assert (result["sampling"] is None) == (policy == "uniform")
        shutil.rmtree(job.root / "output")
    uniform, teach = forecasts
    assert {"measured_nonzero_groups", "measured_groups"} == uniform.keys() - teach.keys()
    assert teach.items() <= uniform.items()


def test_the_loss_gets_the_rewards_of_the_chosen_groups(job, monkeypatch):
    """In every rollout the advantages are those of the rewards that the curriculum knows, in its order."""
    seen = []

    class Spied(SharedPrefixRunTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            seen.append((batch, list(self._logs["rewards"]["by_row"])[-16:], list(self._logs["prompt"])[-16::8]))
            return batch

    monkeypatch.setattr("trainer.run_trainer.SharedPrefixRunTrainer", Spied)
    run(job, monkeypatch, sampling={"policy": "teach"}, grpo={"max_steps": 2})
    for batch, rewards, prompts in seen:
        groups = torch.tensor(rewards).view(2, 8)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert batch["advantages"].tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-4)
        kinds = [KINDS[int(prompt[-1]["content"].split()[-1])] for prompt in prompts]
        assert all(kind == "sometimes" or group.std() == 0 for kind, group in zip(kinds, groups, strict=True))
