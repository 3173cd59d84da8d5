"""The statistics of the learnability gate: whether the base model can learn from the rows and rewards.

GRPO learns from differences within a group. A group whose completions all get the same reward has no gradient. The gate
(`trainer.learnability_gate`) has the base model complete a sample of the prompts a few times, and estimates from the rewards
how many groups of `num_generations` completions will have a gradient. The model is Dirichlet-multinomial: its prior is the
distribution of the rewards over all prompts, with the strength that makes the observed rewards most likely (empirical
Bayes), and the rewards of each prompt update it.

The gate asks blocks of prompts, and ends when the answer is clear. Its first block has a fixed size, which most runs do not
exceed: this keeps the forecast honest, within 2 points of that of a fixed sample. There is nothing to learn if no group of
any block has different rewards, up to `most_gate_prompts` of tunedrop.config.schedule. If a share q of a run's N groups has
a gradient, n prompts of `num_generations` completions each show none with the probability (1 - q)^n. Therefore the gate
stops a run in which at least 30 groups, and at least 1 % of all, have a gradient in at most 5 % of the cases.
`python -m benchmarks.learnability --simulate 1000` measures it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple, TypeVar

from tunedrop.config.schedule import FIRST_GATE_PROMPTS

BLOCK = 8  # prompts of a block after the first
# Candidate strengths of the prior, in pseudo-completions.
STRENGTHS = [2.0 ** (power / 2) for power in range(-12, 17)]
# Rewards that are equal to this many digits count as one value, here and in the metric frac_reward_zero_std.
DIGITS = 6
STANDARD_ERRORS = 2.0

Value = TypeVar("Value")


class Learnability(NamedTuple):
    """The gate's estimate. `dead`, `learnable` and `solved` are shares of the prompts.

    `dead`: all completions of a prompt got the same reward, and not the best one, or differ in their form alone. `solved`:
    all got the best reward, and not for their form alone.
    `reward` is the mean and `reward_error` its standard error. `expected_nonzero_groups` is the expected share of groups
    with a gradient. `flat` are the indices of the prompts whose completions all got the same reward.
    """

    prompts: int
    samples: int
    dead: float
    learnable: float
    solved: float
    reward: float
    reward_error: float
    expected_nonzero_groups: float
    flat: list[int]

    def summary(self) -> dict[str, Any]:
        """Return the numbers for training.json."""
        return {name: round(value, 4) for name, value in self._asdict().items() if name != "flat"}

    def shares(self) -> dict[str, Any]:
        """Return the number of prompts and the shares of the dead, the learnable and the solved ones."""
        summary = self.summary()
        return {name: summary[name] for name in ("prompts", "dead", "learnable", "solved")}

    @property
    def has_gradient(self) -> bool:
        """Whether any prompt's completions got different rewards, for their form or for their answers."""
        return len(self.flat) < self.prompts

    def is_clear(self, threshold: float) -> bool:
        """Return whether the share of groups with a gradient is certainly below, or certainly above, this threshold.

        The interval of two standard errors is Agresti and Coull's (The American Statistician 52, 1998). It exceeds 0 from
        two groups with a gradient on.
        """
        prompts = self.prompts + STANDARD_ERRORS**2
        share = (self.expected_nonzero_groups * self.prompts + STANDARD_ERRORS**2 / 2) / prompts
        return abs(share - threshold) > STANDARD_ERRORS * math.sqrt(share * (1 - share) / prompts)


def blocks(most: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last prompt (exclusive) of each block, for at most so many prompts."""
    starts = [0, *range(FIRST_GATE_PROMPTS, most, BLOCK)]
    yield from zip(starts, [*starts[1:], most], strict=True)


def estimate(rewards: Sequence[Sequence[float]], group: int, answered: Sequence[bool] | None = None) -> Learnability:
    """Return the estimate for groups of `group` completions, from the rewards of each prompt's sampled completions.

    `answered` says for each prompt whether a completion earned something of a reward that compares with the answer. Prompts
    where none did are dead: a model that knows only the form would have solved them all, or would learn the form alone.
    """
    samples = min(len(each) for each in rewards)  # a run with few rows asks some of them again
    seen = [Counter(round(reward, DIGITS) for reward in each) for each in rewards]
    best = max(value for each in seen for value in each)
    means = [fmean(each) for each in rewards]
    flat = [index for index, each in enumerate(seen) if len(each) == 1]
    # If no completion was rewarded, the best reward does not mean "solved".
    answered = answered or [True] * len(seen)
    solved = sum(best > 0 and best in seen[index] and answered[index] for index in flat)
    learnable = sum(len(each) > 1 and answered[index] for index, each in enumerate(seen))
    pooled = sum(seen, Counter())
    prior = {value: count / pooled.total() for value, count in pooled.items()}
    alike = Counter(frozenset(each.items()) for each in seen)

    def fit(strength: float) -> float:
        return sum(prompts * log_likelihood(dict(counts), prior, strength) for counts, prompts in alike.items())

    strength = max(STRENGTHS, key=fit)
    equal = [_all_equal(each, prior, strength, group) for each in seen]
    return Learnability(
        prompts=len(seen),
        samples=samples,
        dead=(len(seen) - solved - learnable) / len(seen),
        learnable=learnable / len(seen),
        solved=solved / len(seen),
        reward=fmean(means),
        reward_error=math.sqrt(variance(means) / len(means)) if len(means) > 1 else 0.0,
        expected_nonzero_groups=1 - sum(equal) / len(equal),
        flat=flat,
    )


def log_likelihood(seen: Mapping[Value, float], prior: Mapping[Value, float], strength: float) -> float:
    """Return the log of the Dirichlet-multinomial probability of one prompt's rewards, as an ordered sequence."""
    total = math.lgamma(strength) - math.lgamma(strength + sum(seen.values()))
    return total + sum(
        math.lgamma(strength * prior[value] + count) - math.lgamma(strength * prior[value]) for value, count in seen.items()
    )


def _all_equal(seen: Counter[float], prior: dict[float, float], strength: float, group: int) -> float:
    """Return the probability that the next `group` completions of a prompt all get the same reward."""
    total = strength + seen.total()
    all_draws = math.lgamma(total + group) - math.lgamma(total)
    weights = [strength * share + seen[value] for value, share in prior.items()]
    return sum(math.exp(math.lgamma(weight + group) - math.lgamma(weight) - all_draws) for weight in weights)


def measured(history: Sequence[dict[str, Any]], asked: dict[str, Any], group: int) -> dict[str, Any]:
    """Return what the first steps measured: the share of groups with a gradient, and the number of groups.

    `asked` is the gate's summary. The measurement ends after as many groups as the gate sampled prompts, or when the reward
    differs from the gate's: then the model has changed. It is empty for a run without steps.
    """
    first: list[dict[str, Any]] = []
    for point in history:
        error = math.hypot(asked["reward_error"], point["reward_std"] / math.sqrt(point["answers"]))
        changed = abs(point["reward"] - asked["reward"]) > STANDARD_ERRORS * error
        if first and (changed or _groups(first, group) >= asked["prompts"]):
            break
        first.append(point)
    if not first:
        return {}
    share = 1 - fmean(point["frac_reward_zero_std"] for point in first)
    return {"measured_nonzero_groups": round(share, 4), "measured_groups": _groups(first, group)}


def _groups(points: Sequence[dict[str, Any]], group: int) -> int:
    answers = sum(int(point["answers"]) for point in points)
    return answers // group
