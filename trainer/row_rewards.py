"""The rewards of a run as TRL calls them: with row numbers, for rows that stay Python objects.

Arrow, which holds the trainer's dataset, would fail on a column of mixed types and give every nested object the keys of
all others.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, text_of


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows as columns but for the prompt, None where a row has no such column."""
    names = {name for row in rows for name in row} - {"prompt"}
    return {name: [row.get(name) for row in rows] for name in names}


class RowReward:
    """A reward that TRL calls with row numbers and that sees the rows' own columns."""

    def __init__(self, reward: Reward, rows: Sequence[Row]):
        self.__name__ = reward.__name__
        self._reward = reward
        self._rows = rows

    def __call__(self, prompts: list[Any], completions: list[Any], row: list[int], **_trainer: Any) -> list[float | None]:
        """Score completions; see `tunedrop.rewards.Reward`."""
        return self._reward(prompts, completions, **columns([self._rows[index] for index in row]))


class EarlyRowReward(RowReward):
    """The same for a reward that waits for others: `begin` starts scoring while a rollout goes on.

    What was begun is scored once: the call that follows collects it, and scores what is left.
    """

    def __init__(self, reward: Reward, rows: Sequence[Row]):
        super().__init__(reward, rows)
        self._pool = ThreadPoolExecutor(1)  # the reward itself asks for several batches at once, up to its limit
        self._begun: dict[tuple[int, str], list[tuple[Future[list[float | None]], int]]] = {}

    def begin(self, prompts: list[Any], completions: list[Any], row: list[int]) -> None:
        """Start scoring completions in the background."""
        future = self._pool.submit(super().__call__, prompts, completions, row)
        for at, key in enumerate(_keys(completions, row)):
            self._begun.setdefault(key, []).append((future, at))

    def __call__(self, prompts: list[Any], completions: list[Any], row: list[int], **_trainer: Any) -> list[float | None]:
        """Score completions; those that were begun are waited for. Raises what scoring them raised."""
        begun = [self._begun[key].pop() if self._begun.get(key) else None for key in _keys(completions, row)]
        self._begun.clear()
        left = [at for at, each in enumerate(begun) if each is None]
        late = super().__call__(*([each[at] for at in left] for each in (prompts, completions, row))) if left else []
        scores = [None if each is None else each[0].result()[each[1]] for each in begun]
        for at, value in zip(left, late, strict=True):
            scores[at] = value
        return scores


def _keys(completions: list[Any], row: list[int]) -> list[tuple[int, str]]:
    return [(index, text_of(completion)) for index, completion in zip(row, completions, strict=True)]


def row_rewards(rewards: Sequence[Reward], rows: Sequence[Row]) -> list[RowReward]:
    """Return the rewards as TRL's trainer takes them.

    One that waits for others begins early, unless it gates another or is gated: these are asked for the same batch.
    """
    gating = {reward.gate for reward in rewards if reward.gate}
    return [
        (EarlyRowReward if reward.spec.reward_type.waits and not reward.gate and reward not in gating else RowReward)(
            reward, rows
        )
        for reward in rewards
    ]
