"""The latest rollout of a training, as groups of answers with all that the training used of them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tunedrop.dataset.rows import Row
from tunedrop.rollouts import Answer, Group

NAMED = 3  # groups that an alert names


@dataclass
class Rollout:
    """A rollout: G completions for each of its rows in succession, of all ranks in their order.

    `rewards` are by function, NaN where it gave no score. `sampler_log_probs` are the means of each completion's tokens,
    None if the sampler does not compute them. `trainer_log_probs` (B,) are those of the loss, of this rank's completions
    alone, and NaN until the loss has computed them.
    """

    rows: list[int]
    texts: list[str]
    tokens: list[int]
    cut: list[bool]
    rewards: dict[str, list[float]]
    advantages: list[float]
    sampler_log_probs: list[float] | None
    trainer_log_probs: Tensor

    def note_log_probs(self, places: Tensor, log_probs: Tensor, mask: Tensor) -> None:
        """Keep the mean log-probabilities of this rank's completions at `places` (b,), unless they are known already.

        `log_probs` and `mask` (b, C) are by token. A rollout that is used again would have those of changed weights.
        """
        means = (log_probs.detach() * mask).sum(1) / mask.sum(1).clamp(min=1)
        known = self.trainer_log_probs[places]
        self.trainer_log_probs[places] = torch.where(known.isnan(), means.float(), known)

    def telling(self, code: str, rows: Sequence[Row], size: int) -> list[str]:
        """Return the prompt ids of the groups of `size` answers that show an alert best (docs/alerts.md), at most NAMED."""
        order = _TELLING.get(code, _lowest_reward)
        starts = sorted(range(0, len(self.rows), size), key=lambda start: order(self, slice(start, start + size)))
        return [str(rows[self.rows[start]]["id"]) for start in starts[:NAMED]]

    def groups(self, step: int, rows: Sequence[Row], weights: Sequence[float], size: int) -> list[Group]:
        """Return the rollout as groups of `size` answers. Every rank must call it.

        `rows` are those of the training, `weights` those of the rewards.
        """
        trained: list[float] = gather_object(self.trainer_log_probs.tolist())
        sampled = self.sampler_log_probs or [math.nan] * len(self.texts)
        answers = []
        for at, text in enumerate(self.texts):
            scores = {name: _finite(values[at]) for name, values in self.rewards.items()}
            paid = [weight * score for weight, score in zip(weights, scores.values(), strict=True) if score is not None]
            answers.append(
                Answer(
                    text=text,
                    score=_finite(sum(paid)) if paid else None,
                    rewards=scores,
                    tokens=self.tokens[at],
                    cut=self.cut[at],
                    advantage=_finite(self.advantages[at]),
                    sampler_log_prob=_finite(sampled[at]),
                    trainer_log_prob=_finite(trained[at]),
                )
            )
        return [
            Group(step=step, answers=answers[start : start + size], **asked(rows[self.rows[start]]))
            for start in range(0, len(answers), size)
        ]


def asked(row: Row) -> dict[str, Any]:
    """Return the fields of a group that come from its row."""
    answer = row.get("answer")
    reference = answer if answer is None or isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return {"prompt_id": str(row["id"]), "prompt": row["prompt"], "reference": reference}


def _finite(value: float) -> float | None:
    """Return a number with the digits that matter, None for one that is not finite."""
    return round(value, 6) if math.isfinite(value) else None


# --- what shows an alert: groups with the smallest value first ---


def _scores(rollout: Rollout, group: slice) -> list[float]:
    """Return the sums of the answers' rewards; a reward without a score is 0."""
    by_reward = [values[group] for values in rollout.rewards.values()]
    return [sum(value for value in values if math.isfinite(value)) for values in zip(*by_reward, strict=True)]


def _lowest_reward(rollout: Rollout, group: slice) -> float:
    return sum(_scores(rollout, group))


def _highest_reward(rollout: Rollout, group: slice) -> float:
    return -sum(_scores(rollout, group))


def _equal_rewards(rollout: Rollout, group: slice) -> float:
    scores = _scores(rollout, group)
    return max(scores) - min(scores)


def _equal_answers(rollout: Rollout, group: slice) -> float:
    return len(set(rollout.texts[group]))


def _most_cut(rollout: Rollout, group: slice) -> float:
    return -sum(rollout.cut[group])


# By the alert's code; other alerts are shown by the lowest rewards.
_TELLING: dict[str, Callable[[Rollout, slice], float]] = {
    "DEAD_REWARD": _equal_rewards,
    "ENTROPY_COLLAPSE": _equal_answers,
    "HACKING_SUSPECT": _highest_reward,
    "TRUNCATION": _most_cut,
}
