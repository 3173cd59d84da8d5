"""Rewards that wait for a service begin while the rollout goes on, and score each completion once."""

import threading
from collections import Counter
from typing import cast

import pytest
import torch

from tests.trainer.test_shared_prefix import build
from trainer.row_rewards import EarlyRowReward, RowReward, row_rewards
from trainer.run_trainer import SharedPrefixGRPOTrainer
from tunedrop.rewards import Reward, RewardError, RewardPermissions, RewardSpec, build_rewards

ROWS = [{"id": str(index), "prompt": [{"role": "user", "content": f"q{index}"}], "answer": str(index)} for index in range(3)]


class Service:
    """A stand-in for the service behind a reward. It records the completions and the threads of its calls."""

    __name__ = "service"

    def __init__(self, fails=False):
        self.asked: Counter[tuple[str, str]] = Counter()
        self.threads = set()
        self._fails = fails

    def __call__(self, prompts, completions, answer, **_):
        self.threads.add(threading.current_thread())
        texts = [each[0]["content"] for each in completions]
        self.asked.update(zip(answer, texts, strict=True))
        if self._fails:
            raise RewardError("the service is down")
        return [float(row) + len(text) / 10 for row, text in zip(answer, texts, strict=True)]


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_started_scores_are_collected_and_the_rest_is_scored():
    service = Service()
    reward = EarlyRowReward(cast("Reward", service), ROWS)
    prompts = [ROWS[row]["prompt"] for row in (2, 0)]
    reward.begin(prompts=prompts, completions=messages("bb", "a"), row=[2, 0])
    batch = {"completions": messages("a", "a", "c", "bb", "bb"), "row": [0, 1, 1, 2, 2]}
    scores = reward(prompts=[ROWS[row]["prompt"] for row in batch["row"]], **batch, trainer_state=None)
    assert scores == [0.1, 1.1, 1.1, 2.2, 2.2]
    assert service.asked == {("2", "bb"): 2, ("0", "a"): 1, ("1", "a"): 1, ("1", "c"): 1}
    assert len(service.threads) == 2


def test_a_row_may_have_columns_named_as_trls_lists():
    rows = [ROWS[0] | {"prompts": "a", "completions": "b"}]
    (reward,) = row_rewards(build_rewards([RewardSpec(type="exact_match")]), rows)
    assert reward(prompts=[rows[0]["prompt"]], completions=messages("0"), row=[0]) == [1.0]


def test_scores_of_one_rollout_are_not_used_for_the_next():
    service = Service()
    reward = EarlyRowReward(cast("Reward", service), ROWS)
    reward.begin(prompts=[ROWS[0]["prompt"]], completions=messages("a"), row=[0])
    for _ in range(2):
        assert reward(prompts=[ROWS[0]["prompt"]], completions=messages("a"), row=[0]) == [0.1]
    assert service.asked == {("0", "a"): 2}


def test_a_failure_in_the_background_fails_the_step():
    reward = EarlyRowReward(cast("Reward", Service(fails=True)), ROWS)
    reward.begin(prompts=[ROWS[0]["prompt"]], completions=messages("a"), row=[0])
    with pytest.raises(RewardError, match="the service is down"):
        reward(prompts=[ROWS[0]["prompt"]], completions=messages("a"), row=[0])


def test_only_waiting_rewards_without_gates_begin_early():
    specs = [
        RewardSpec(type="exact_match"),
        RewardSpec(type="http", name="alone", url="http://127.0.0.1:1"),
        RewardSpec(type="http", name="gate", url="http://127.0.0.1:1"),
        RewardSpec(type="http", name="gated", url="http://127.0.0.1:1", only_if="gate"),
    ]
    made = row_rewards(build_rewards(specs, RewardPermissions(hosts=("127.0.0.1",))), ROWS)
    assert [type(each) for each in made] == [RowReward, EarlyRowReward, RowReward, RowReward]


def test_a_rollout_begins_rewards_for_finished_completions(tiny, tmp_path, monkeypatch):
    torch.manual_seed(0)
    service, begun = Service(), []
    trainer, _ = build(SharedPrefixGRPOTrainer, tiny, tmp_path, max_steps=2)
    trainer.generation_config.eos_token_id = trainer.eos_token_ids = list(range(20))  # some end early
    reward = EarlyRowReward(
        cast("Reward", service), [{"prompt": each["prompt"], "answer": "1"} for each in trainer.train_dataset]
    )
    begin = reward.begin

    def spy(**batch):
        begun.extend(batch["row"])
        begin(**batch)

    monkeypatch.setattr(reward, "begin", spy)
    trainer.reward_funcs = [reward]
    trainer.train_dataset = trainer.train_dataset.add_column("row", list(range(len(trainer.train_dataset))))
    trainer.train()
    assert 0 < len(begun) < 32
    assert sum(service.asked.values()) == 32  # every completion of the two rollouts once, begun or not
