"""Rewards for TRL's trainer: TRL passes row numbers, and the rewards see the rows as Python objects.

TRL holds its dataset in Arrow. Arrow fails on a column of mixed types, and gives every nested object the keys of all other
objects.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, text_of
from tunedrop.rewards.sample import TRAINER_COLUMNS


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows as columns for rewards, without the prompt. The value is None where a row lacks a column."""
    names = {name for row in rows for name in row} - {"prompt"} - TRAINER_COLUMNS
    return {name: [row.get(name) for row in rows] for name in names}


class RowReward:
    """A reward that TRL calls with row numbers. The reward gets the columns of these rows."""

    def __init__(self, reward: Reward, rows: Sequence[Row]):
        self.__name__ = reward.__name__
        self._reward = reward
        self._rows = rows

    def __call__(self, prompts: list[Any], completions: list[Any], row: list[int], **_trainer: Any) -> list[float | None]:
        """Score completions; see `tunedrop.rewards.Reward`."""
        return self._reward(prompts, completions, **columns([self._rows[index] for index in row]))


class EarlyRowReward(RowReward):
    """A row reward that waits for a service: `begin` starts to score completions while the rollout goes on.

    The next call collects these scores and scores the remaining completions. No completion is scored twice.
    """

    def __init__(self, reward: Reward, rows: Sequence[Row]):
        super().__init__(reward, rows)
        self._pool = ThreadPoolExecutor(1)  # the reward itself sends several requests at a time
        self._begun: dict[tuple[int, str], list[tuple[Future[list[float | None]], int]]] = {}

    def begin(self, prompts: list[Any], completions: list[Any], row: list[int]) -> None:
        """Start scoring completions in the background."""
        future = self._pool.submit(super().__call__, prompts, completions, row)
        for index, key in enumerate(_keys(completions, row)):
            self._begun.setdefault(key, []).append((future, index))

    def __call__(self, prompts: list[Any], completions: list[Any], row: list[int], **_trainer: Any) -> list[float | None]:
        """Score completions, and wait for those that `begin` started. Raises the exceptions of both."""
        started = [self._begun[key].pop() if self._begun.get(key) else None for key in _keys(completions, row)]
        self._begun.clear()
        rest = [index for index, entry in enumerate(started) if entry is None]
        late = super().__call__(*([batch[index] for index in rest] for batch in (prompts, completions, row))) if rest else []
        scores = [None if entry is None else entry[0].result()[entry[1]] for entry in started]
        for index, value in zip(rest, late, strict=True):
            scores[index] = value
        return scores


def _keys(completions: list[Any], row: list[int]) -> list[tuple[int, str]]:
    return [(index, text_of(completion)) for index, completion in zip(row, completions, strict=True)]


def row_rewards(rewards: Sequence[Reward], rows: Sequence[Row]) -> list[RowReward]:
    """Return the rewards for TRL's trainer.

    A reward that waits for a service begins early. A gate and the reward behind it do not: they share the scores of one
    batch. A reward that ranks does not: it needs a whole group.
    """
    gates = {reward.gate for reward in rewards if reward.gate}

    def early(reward: Reward) -> bool:
        kind = reward.spec.reward_type
        return kind.waits and not kind.ranks and not reward.gate and reward not in gates

    return [EarlyRowReward(reward, rows) if early(reward) else RowReward(reward, rows) for reward in rewards]
