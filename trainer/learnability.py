"""The learnability gate: estimates before the first step whether the base model can learn from the rows and rewards.

GRPO learns from differences within a group. A group whose completions all get the same reward has no gradient. The gate
has the base model complete a sample of the prompts a few times, and estimates from the rewards how many groups of
`num_generations` completions will have a gradient. The model is Dirichlet-multinomial: its prior is the distribution of the
rewards over all prompts, with the strength that makes the observed rewards most likely (empirical Bayes), and the rewards
of each prompt update it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple, TypeVar

# The gate may use this share of the run's completions. In a short run it uses FEWEST_PROMPTS, since fewer say nothing.
SHARE, FEWEST_PROMPTS, MOST_PROMPTS = 0.03, 24, 128
# Candidate strengths of the prior, in pseudo-completions.
STRENGTHS = [2.0 ** (power / 2) for power in range(-12, 17)]
# Rewards that are equal to this many digits count as one value, as in TRL's frac_reward_zero_std.
DIGITS = 6
STANDARD_ERRORS = 2.0

Value = TypeVar("Value")


class Learnability(NamedTuple):
    """The gate's estimate. `dead`, `learnable` and `solved` are shares of the prompts.

    `dead`: all completions of a prompt got the same reward, and not the best one. `solved`: all got the best reward.
    `reward` is the mean and `reward_error` its standard error. `expected_nonzero_groups` is the expected share of groups
    with a gradient. `flat` are the indices of the dead and the solved prompts.
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


def prompts_to_ask(completions_of_run: int, samples: int) -> int:
    """Return the number of prompts that the gate samples, for a run's completions and the gate's samples per prompt."""
    return min(MOST_PROMPTS, max(FEWEST_PROMPTS, int(completions_of_run * SHARE / samples)))


def estimate(rewards: Sequence[Sequence[float]], group: int) -> Learnability:
    """Return the estimate for groups of `group` completions, from the rewards of each prompt's sampled completions."""
    seen = [Counter(round(reward, DIGITS) for reward in each) for each in rewards]
    best = max(value for each in seen for value in each)
    means = [fmean(each) for each in rewards]
    flat = [index for index, each in enumerate(seen) if len(each) == 1]
    # If no completion was rewarded, the best reward does not mean "solved".
    solved = sum(best > 0 and best in seen[index] for index in flat)
    pooled = sum(seen, Counter())
    prior = {value: count / pooled.total() for value, count in pooled.items()}
    strength = max(STRENGTHS, key=lambda strength: sum(log_likelihood(each, prior, strength) for each in seen))
    equal = [_all_equal(each, prior, strength, group) for each in seen]
    return Learnability(
        prompts=len(seen),
        samples=seen[0].total(),
        dead=(len(flat) - solved) / len(seen),
        learnable=1 - len(flat) / len(seen),
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
