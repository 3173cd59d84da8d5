"""Chooses the prompts of a training: in a random order by epoch, or by their chance to teach (`sampling.policy`).

GRPO learns from differences within a group: a group whose completions all get the same reward has no gradient. `Curriculum`
keeps a posterior of each prompt's rewards, and draws the prompts whose groups will probably have different rewards
(Thompson sampling; MoPPS, arXiv 2507.04632, does it with success rates). What it draws is still a forecast: groups without
differences are replaced by groups of other prompts, up to a limit (dynamic sampling; DAPO, arXiv 2503.14476).

The posterior of a prompt's reward is a Dirichlet distribution over the values that its completions got, for the rewards 0
and 1 Beta(a + failures, a + successes). The prior `a` is the one that makes all observations most likely (empirical Bayes).
An observation counts less with each rollout, because the model changes.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler

from trainer.checkpoints import Record
from trainer.learnability import DIGITS, log_likelihood

if TYPE_CHECKING:
    from trl import GRPOTrainer

PRIORS: list[float] = [2.0 ** (power / 2) for power in range(-8, 5)]  # candidates: pseudo-completions of each value
KEPT = 0.9  # share of an observation that counts a rollout later
FORGOTTEN = 0.05  # completions: less is no observation


class ByEpoch(Sampler[int]):  # type: ignore[misc] # torch is untyped here
    """TRL's sampler with a new seed for each epoch.

    TRL's sampler continues from the generator's state at the end of the epoch before. A resumed process lacks that state.
    """

    def __init__(self, sampler: Any, seed: Callable[[], int]):
        self._sampler = sampler
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._seed())
        yield from self._sampler

    def __len__(self) -> int:
        return len(self._sampler)


class Group(NamedTuple):
    """A row of the training dataset, and its sampled completions: their token ids, and rewards (G, functions) with NaNs.

    `log_probs` are those of the completions' tokens, None if the sampler does not compute them.
    """

    row: dict[str, Any]
    ids: list[list[int]]
    rewards: Tensor
    log_probs: list[list[float]] | None = None


class Curriculum:
    """Draws rows by their chance to teach. Its state is `record.sampling`, so that each checkpoint has a copy.

    `refills`: how often a rollout replaces its groups without different rewards. Draws depend on `seed` and the state only.
    """

    def __init__(self, record: Record, seed: int, refills: int):
        empty: dict[str, Any] = {"rollouts": 0, "groups": 0, "taught": 0, "refilled": 0, "seen": {}}
        self._state = record.sampling = record.sampling or empty
        self._seed, self._refills = seed, refills

    def observe(self, row: int, scores: Sequence[float]) -> bool:
        """Update the posterior of a row by its completions' scores. Return whether the scores differ."""
        new = Counter(str(round(score, DIGITS)) for score in scores)
        counts = Counter(self._counts(row)) + new
        self._state["seen"][str(row)] = {"rollout": self._state["rollouts"], "counts": dict(counts)}
        return len(new) > 1

    def _counts(self, row: int) -> dict[str, float]:
        """Return how many completions of a row count for each value of the score."""
        seen = self._state["seen"].get(str(row), {"rollout": 0, "counts": {}})
        share = KEPT ** (self._state["rollouts"] - seen["rollout"])
        return {value: share * count for value, count in seen["counts"].items() if share * count >= FORGOTTEN}

    def draw(self, rows: Sequence[int], count: int, group: int) -> list[int]:
        """Return the `count` rows with the highest chances to teach with `group` completions, by one draw of each chance."""
        lots = random.Random(f"{self._seed} {self._state['rollouts']} {len(rows)}")
        prior = likely_prior([self._counts(int(row)) for row in self._state["seen"]])
        chances = {row: chance(self._counts(row), prior, group, lots) for row in rows}
        return heapq.nlargest(count, rows, key=lambda row: chances[row])

    def rollout(self, trainer: "GRPOTrainer", count: int) -> list[Group]:
        """Return `count` groups, those with different rewards first. Every rank gets the same groups.

        `trainer` is a run's trainer (`trainer.run_trainer`).
        """
        places = {row: place for place, row in enumerate(trainer.train_dataset["row"])}
        teaching: list[Group] = []
        flat: list[Group] = []
        for attempt in range(1 + self._refills):
            drawn = self.draw(list(places), count - len(teaching), trainer.num_generations)
            groups = sample_groups(trainer, [trainer.train_dataset[places.pop(row)] for row in drawn])
            for group in groups:
                taught = self.observe(group.row["row"], scores(group.rewards, trainer.reward_weights))
                (teaching if taught else flat).append(group)
            self._state["groups"] += len(groups)
            self._state["refilled"] += len(groups) if attempt else 0
            if len(teaching) == count:
                break
        self._state["taught"] += len(teaching)
        self._state["rollouts"] += 1
        return (teaching + flat)[:count]

    def summary(self) -> dict[str, int]:
        """Return the numbers for training.json."""
        return {name: self._state[name] for name in ("rollouts", "groups", "taught", "refilled")}


def values(counts: Mapping[str, float]) -> int:
    """Return the number of values that a prompt's scores may have: those it had, but at least two."""
    return max(2, len(counts))


def likely_prior(seen: Sequence[Mapping[str, float]]) -> float:
    """Return the prior that makes the observed counts of all prompts most likely."""

    def log_probability(prior: float) -> float:
        return sum(
            log_likelihood(each, dict.fromkeys(each, 1 / values(each)), prior * values(each)) for each in seen if each
        )

    return max(PRIORS, key=log_probability)


def chance(counts: Mapping[str, float], prior: float, group: int, lots: random.Random) -> float:
    """Return the probability that the scores of `group` completions differ, by a draw from a prompt's posterior.

    The draw is the probability p of each value: the scores are equal with the probability Σ pᴳ.
    """
    unseen = [0.0] * (values(counts) - len(counts))
    shares = [lots.gammavariate(prior + count, 1.0) for count in [*counts.values(), *unseen]]
    return 1.0 - math.fsum((share / sum(shares)) ** group for share in shares)


def sample_groups(trainer: "GRPOTrainer", rows: Sequence[dict[str, Any]]) -> list[Group]:
    """Sample and score a group of completions for each row. The ranks share the rows, and every rank gets all groups."""
    size, ranks, rank = trainer.num_generations, trainer.accelerator.num_processes, trainer.accelerator.process_index
    own = [row for row in rows[rank::ranks] for _ in range(size)]
    groups: list[tuple[int, Group]] = []
    if own:
        prompts = [row["prompt"] for row in own]
        ids, log_probs = trainer.complete(prompts, size), trainer.sampler_log_probs
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        numbers = [row["row"] for row in own]
        scored = [reward(prompts=prompts, completions=completions, row=numbers) for reward in trainer.reward_funcs]
        rewards = torch.tensor([[float("nan") if each is None else each for each in one] for one in scored]).t()
        for place, start in zip(range(rank, len(rows), ranks), range(0, len(own), size), strict=True):
            part = slice(start, start + size)
            groups.append((place, Group(own[start], ids[part], rewards[part], log_probs and log_probs[part])))
    return [group for _, group in sorted(gather_object(groups), key=lambda pair: pair[0])]


def scores(rewards: Tensor, weights: Tensor) -> list[float]:
    """Return the weighted sums of rewards (G, functions), without the completions that no function scored."""
    sums = (rewards * weights.cpu()).nansum(dim=1)
    return [float(each) for each in sums[~rewards.isnan().all(dim=1)]]
